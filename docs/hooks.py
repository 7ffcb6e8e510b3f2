"""A hook of MkDocs: links to files outside docs/ become links to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TOP = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Returns the page with its links out of docs/ changed; without ``repo_url`` they become the path as text.

    Raises:
        FileNotFoundError: A link names a file that does not exist.
    """

    def changed(link: re.Match[str]) -> str:
        path = (TOP / "docs" / link[2]).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{link[2]} is linked from a page and does not exist")
        name = path.relative_to(TOP)
        if not config["repo_url"]:
            return link[1] if link[1] == str(name) else f"{link[1]} (`{name}`)"
        return f"[{link[1]}]({config['repo_url'].rstrip('/')}/blob/main/{name}{link[3] or ''})"

    return LINK.sub(changed, markdown)
