"""Pages as tests read them: fenced blocks, commands, links, anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.cli import COMMANDS

TOP = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: Path of the page from the top of the repository.
        line: Line of its first row.
        language: The word after the fence; empty where there is none.
        text: Its text.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        indent, language, content = found.groups()
        lines = [line.removeprefix(indent) for line in content.splitlines()]
        yield Block(
            str(path.relative_to(TOP)), text[: found.start()].count("\n") + 2, language, "\n".join(lines) + "\n"
        )


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block of shell lines, as words; comments and background signs are left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "&"]
        if words:
            yield words


def job_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The job module that a command runs and its arguments, also within ``ray job submit``; None for other commands."""
    if "--" in words and words[0] == "ray":
        words = words[words.index("--") + 1 :]
    program = words[0].rpartition("/")[2]
    if program == "rlhf-critic":
        return COMMANDS[words[1]].module, words[2:]
    if program.startswith("python") and words[1:2] == ["-m"] and words[2].startswith("jobs."):
        return words[2], words[3:]
    return None


def anchors(path: Path) -> set[str]:
    """The anchors that a page's headings get, on GitHub and in MkDocs."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
