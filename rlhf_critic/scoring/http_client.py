"""HTTP transport for `rlhf_critic.scoring.client.ScorerClient`."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import httpx
from pydantic import ValidationError

from rlhf_critic.errors import ConfigError, ScorerFailed, ScorerRejected, ScorerUnavailable, VersionMismatch
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.http_schema import ErrorDetail, ErrorResponse, ScoreRequest, ScoreResponse
from rlhf_critic.scoring.items import Item, Scores

RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})  # Serve's proxy answers 500 if a replica dies during a request
# Text of a 404 from Serve's proxy. A restarted proxy answers so until it knows the routes of the pools.
NO_ROUTE_YET = "/-/routes for available routes"


class HttpTransport:
    """Calls ``POST /score``.

    Args:
        url: URL of the pool, without a path: ``http://127.0.0.1:8000``.
        token: Bearer token, if the pool requires one. Surrounding white space is removed.

    Raises:
        ConfigError: The URL is invalid or holds a password, or the token has characters that a header cannot hold.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        if "@" in url:  # errors and logs show the URL
            raise ConfigError("the URL of a pool must not hold a user or password: write http://HOST:PORT")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} is not a URL ({error}): write http://HOST:PORT") from error
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise ConfigError(f"{url!r} is not the URL of a pool: write http://HOST:PORT")
        self._url, self._token = url.rstrip("/"), token and token.strip()
        if self._token and not (self._token.isascii() and self._token.isprintable()):  # httpx's error would show it
            raise ConfigError("the bearer token has characters that an HTTP header cannot hold: give one line of ASCII")
        # Connections belong to the event loop that opened them.
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return HttpTransport, (self._url, self._token)

    async def ask(self, items: list[Item], values: bool, version: str | None, timeout_s: float) -> Scores:
        """See `rlhf_critic.scoring.client.Transport`."""
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            client = httpx.AsyncClient(headers=headers, limits=httpx.Limits(max_connections=None))
            self._clients[loop] = client
        try:
            body = ScoreRequest.of(items, values, version)
            response = await client.post(f"{self._url}/score", json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise ScorerUnavailable(f"{self._url}: {type(error).__name__}: {error}") from error
        except (TypeError, ValueError) as error:
            raise ScorerRejected("not_text", f"an item cannot be written as JSON: {error}") from error
        if response.status_code == httpx.codes.OK:
            try:
                return ScoreResponse.model_validate_json(response.content).to_scores()
            except (ValidationError, OverflowError) as error:
                raise ScorerFailed(f"{self._url}: the answer holds no scores: {response.text[:200]!r}") from error
        raise _error_of(self._url, response)

    async def close(self) -> None:
        """Closes the connections of the running event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()


def connect_http(url: str, token: str | None = None, **options: Any) -> ScorerClient:
    """Returns a client of the pool at a URL; see `rlhf_critic.scoring.client.ScorerClient` for the options."""
    return ScorerClient(HttpTransport(url, token), **options)


def _error_of(url: str, response: httpx.Response) -> Exception:
    status = response.status_code
    try:
        detail = ErrorResponse.model_validate_json(response.content).error
    except ValidationError:
        detail = ErrorDetail(kind="", message=f"{url}: HTTP {status}: {response.text[:200]}")
    if status == httpx.codes.CONFLICT:
        return VersionMismatch(detail.message)
    knows_no_route = status == httpx.codes.NOT_FOUND and NO_ROUTE_YET in response.text
    if (status in RETRYABLE and detail.kind != "failed") or knows_no_route:
        return ScorerUnavailable(detail.message)
    if detail.kind == "failed":
        return ScorerFailed(detail.message)
    return ScorerRejected(detail.kind or f"http_{status}", detail.message, detail.item)
