"""The pages that a scorer pool serves to people: its own, and Swagger UI for its endpoints.

They hold no data, so they need no token: their scripts ask for it and send it with each request for data. A strict
Content-Security-Policy allows only these scripts, by their hash, and requests to this server. Knows nothing about
scores.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, HTTPException, Response

PAGE, DOCS = "/", "/docs"
SWAGGER = {"/docs/swagger-ui.css": "text/css", "/docs/swagger-ui-bundle.js": "text/javascript"}
PAGE_PATHS = frozenset({PAGE, DOCS, *SWAGGER})
PAGE_FILE, DOCS_FILE = Path(__file__).with_name("page.html"), Path(__file__).with_name("docs.html")
POLICY = {
    "default-src": "'none'",
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
# The page writes texts as texts only. A browser that knows this directive refuses everything else.
TEXTS_ONLY = {"require-trusted-types-for": "'script'", "trusted-types": "'none'"}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """Returns the routes of the pages. They are not part of the OpenAPI document."""
    router = APIRouter(include_in_schema=False)

    @router.get(PAGE)
    async def page() -> Response:
        return _page(PAGE_FILE, "", TEXTS_ONLY)

    @router.get(DOCS)
    async def docs() -> Response:
        return _page(DOCS_FILE, "'self' ", {})

    @router.get("/docs/{name}")
    async def swagger(name: str) -> Response:
        kind = SWAGGER.get(f"{DOCS}/{name}")
        if kind is None:
            raise HTTPException(404, f"there is no {name[:80]!r} here")
        return Response(_swagger_file(name), media_type=kind, headers=HEADERS)

    return router


def _page(file: Path, sources: str, more: dict[str, str]) -> Response:
    text = _text_of(file)
    own = {f"{kind}-src": sources + _hash_of(text, kind) for kind in ("script", "style")}
    policy = "; ".join(f"{name} {value}" for name, value in {**POLICY, **own, **more}.items())
    return Response(text, media_type="text/html", headers={**HEADERS, "Content-Security-Policy": policy})


@cache
def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def _swagger_file(name: str) -> bytes:
    return (files("fastapi_swagger") / "resources" / name).read_bytes()


def _hash_of(page: str, element: str) -> str:
    """Returns the source expression of a page's only inline ``script`` or ``style``."""
    (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
