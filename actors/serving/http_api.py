"""The scorers' HTTP endpoints: authentication, limits, three request formats, and errors that programs can read.

`build_app` creates a FastAPI application around any `ScoringService`, so it also runs without Serve.
`rlhf_critic.scoring.http_schema` defines requests and responses. Knows nothing about replicas or models.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol
from urllib.parse import quote, urlencode, urlsplit

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.serving.judging import add_judging
from actors.serving.page import PAGE_PATHS, page_router
from rlhf_critic.errors import ConfigError, CriticError, ScorerRejected, ScorerUnavailable, VersionMismatch
from rlhf_critic.scoring import http_schema as schema
from rlhf_critic.scoring.items import Adjusted, Item, ScorerInfo, Scores, Text

HEALTH = "/health"
GET_REWARD = "/get_reward"
WHY = "why"  # the query in an address of an error
SHOWN_STATUSES = (401, 403, 409, 422)  # that the caller can change something about
MAX_SHOWN = 200  # characters of a field name chosen by the caller
KIND_OF_STATUS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
    422: "too_many_items",
    503: "unavailable",
}
# Names of OpenAI's errors, which vLLM uses too.
TYPE_OF_STATUS = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
}
BODIES_AT_ONCE = 8  # bodies of the maximum size that may be in memory together
BODY_TIMEOUT_S = 30.0  # time for a body to arrive, so that slow callers do not take up all places
PARTS_PER_ITEM = 256  # texts, lists and objects in a body for each item that a call may have
ITEM_FIELDS = ("items", "query", "prompts", "input")
KNOWN_TOKENS = frozenset(hashlib.sha256(token).hexdigest() for token in (b"", b"change-me"))


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can connect to a server that listens on ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class HttpSettings:
    """The limits of the endpoints.

    Attributes:
        token_sha256: SHA-256 of the bearer token that callers must send, in hexadecimal; None requires no token.
        auth: ``off`` allows ``host`` to be reachable from other machines without a token. YAML reads ``off`` as False.
        host: Address on which HTTP listens.
        max_items: Maximum number of items per call.
        max_body_bytes: Maximum size of a request's body in bytes.
        deadline_s: Maximum time that a request waits for its scores, in seconds.
        collect: File for judged preferences; None saves none.

    Raises:
        ConfigError: Strangers could use the endpoints, because a valid digest is missing.
    """

    token_sha256: str | None = None
    auth: str | bool = "auto"
    host: str = "127.0.0.1"
    max_items: int = 1024
    max_body_bytes: int = 16 * 1024 * 1024
    deadline_s: float = 60.0
    collect: str | None = None

    def __post_init__(self) -> None:
        digest = self.token_sha256
        if self.auth not in ("auto", "off", False):
            raise ConfigError(f"http.auth: expected auto or off, found {self.auth!r}")
        if digest is None:
            if self.auth == "auto" and not is_loopback(self.host):
                raise ConfigError(
                    f"http.token_sha256 is missing, and other machines can reach {self.host}: set the SHA-256 of a "
                    "token, or auth: off if a proxy in front authenticates callers"
                )
        elif not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest) or digest in KNOWN_TOKENS:
            raise ConfigError(
                f"http.token_sha256: expected the SHA-256 of a secret token in hexadecimal, found {digest!r:.80}"
            )


class ScoringService(Protocol):
    """A scorer behind the endpoints."""

    settings: HttpSettings

    async def score(self, items: list[Item], values: bool, version: str | None) -> Scores:
        """Scores items; raises the errors of `rlhf_critic.scoring.client.ScorerClient`."""

    async def info(self) -> ScorerInfo:
        """Describes the served version; raises `ScorerUnavailable` if no scorer is ready."""

    async def replicas(self) -> list[schema.ReplicaModel]:
        """Lists the replicas that reported lately."""

    async def published(self) -> list[schema.PublishedModel]:
        """Lists the last published versions, the latest first."""

    def on_refusal(self, kind: str) -> None:
        """Called for every request that gets no scores, with the kind of its error."""


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorResponse, "description": description}
    for status, description in {
        400: "The body is not JSON.",
        401: "The bearer token is missing or wrong.",
        403: "A web page of another site sent the request, or it names another host.",
        408: "The body did not arrive in time.",
        409: "The pool serves another version than the requested one.",
        413: "The body is too large.",
        422: "The request has an invalid field, or an item that cannot be scored.",
        500: "A scorer failed.",
        503: "No scorer answered in time, or too many bodies are being read. Try again.",
    }.items()
}


class _StrictRequest(Request):
    """A request whose JSON follows the standard. Python's parser also accepts NaN and Infinity."""

    async def json(self) -> Any:
        body = await self.body()
        max_items = self.app.state.settings().max_items
        if _has_more_parts(body, max_items * PARTS_PER_ITEM):  # before they take memory
            raise HTTPException(
                422, f"the body has too many texts, lists and objects for {max_items} items: split the call"
            )
        try:
            parsed = json.loads(body, parse_constant=_reject_constant)
        except (UnicodeDecodeError, RecursionError, ValueError) as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from error
        count = max(_item_count(parsed.get(name)) for name in ITEM_FIELDS) if isinstance(parsed, dict) else 0
        if count > max_items:  # before each is validated
            raise HTTPException(422, f"{count} items in one call, the maximum is {max_items}: split the call")
        return parsed


def _item_count(value: Any) -> int:
    """Returns the number of items in a field of a request. A list of token ids is one item."""
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


def _has_more_parts(body: bytes, limit: int) -> bool:
    """Returns whether JSON has more than ``limit`` texts, lists and objects, without parsing it."""
    if body.count(b'"') // 2 + body.count(b"[") + body.count(b"{") <= limit:
        return False
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    texts = bare.count(b'"') // 2
    if texts > limit:
        return True
    outside = b"".join(bare.split(b'"')[::2])
    return texts + outside.count(b"[") + outside.count(b"{") > limit


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _Gate:
    """Checks the caller before reading the body, and stops reading a body that is too large, despite its headers.

    Without a token, web pages are callers too. A page of another site is rejected, and so is one whose own name was
    made to point to this machine (DNS rebinding). All bodies in memory together have a limit too.
    """

    def __init__(self, app: ASGIApp, service: Callable[[], ScoringService]) -> None:
        self._app, self._service = app, service
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings = self._service().settings
        request = Request(scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_open = path == HEALTH or path in PAGE_PATHS
        if settings.token_sha256 is None:
            if reason := _foreign(request, is_loopback(settings.host), path in PAGE_PATHS):
                await _error(request, 403, KIND_OF_STATUS[403], reason)(scope, receive, send)
                return
        elif not is_open and not _has_token(request, settings.token_sha256):
            message = "the bearer token is missing or wrong: send the header Authorization: Bearer TOKEN"
            refusal = _error(request, 401, KIND_OF_STATUS[401], message, {"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
            return
        read = 0
        more = True
        ends = time.monotonic() + BODY_TIMEOUT_S

        async def counted() -> Message:
            nonlocal read, more
            if not more:
                return await receive()  # waits for the caller to leave
            try:
                received = await asyncio.wait_for(receive(), ends - time.monotonic())
            except asyncio.TimeoutError as error:
                raise HTTPException(
                    408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s: split the call"
                ) from error
            more = received.get("more_body", False)
            size = len(received.get("body", b""))
            read += size
            self._held_bytes += size
            if read > settings.max_body_bytes:
                raise HTTPException(413, f"the body is larger than {settings.max_body_bytes} bytes: split the call")
            if self._held_bytes > BODIES_AT_ONCE * settings.max_body_bytes:
                raise HTTPException(503, "too many large bodies are being read: try again", {"Retry-After": "1"})
            return received

        try:
            await self._app(scope, counted, send)
        finally:
            self._held_bytes -= read


def build_app(service: Callable[[], ScoringService]) -> FastAPI:
    """Creates the application. It calls ``service`` for every request, to get the service that answers."""
    app = FastAPI(
        title="rlhf-critic scorers",
        description="Rewards of a critic. A text has the same reward at every endpoint.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        strict_content_type=True,  # a web page of any site may send a body without one
    )
    app.state.settings = lambda: service().settings
    app.state.on_refusal = lambda kind: service().on_refusal(kind)
    app.add_middleware(_Gate, service=service)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_http_exception)
    app.add_exception_handler(CriticError, _on_critic_error)
    app.add_exception_handler(Exception, _on_bug)
    # Documents the authentication of `_Gate` in the OpenAPI document.
    bearer = HTTPBearer(auto_error=False, description="The pool's token, if authentication is on.")
    router = APIRouter(route_class=_StrictRoute, dependencies=[Depends(bearer)])

    @router.post("/score", responses=ERRORS, response_model_exclude_unset=True)
    async def score(request: schema.ScoreRequest) -> schema.ScoreResponse:
        """Scores conversations, chats, finished texts or token ids."""
        items: list[Item] = []
        for item in request.items:
            try:
                items.append(item.to_item())
            except ScorerRejected as error:
                raise ScorerRejected(error.kind, f"item {len(items)}: {error.message}", len(items)) from error
        if request.token_texts:
            items = [item if isinstance(item, Adjusted) else Adjusted(item, token_texts=True) for item in items]
        return schema.ScoreResponse.of(await service().score(items, request.values, request.version))

    @router.post(GET_REWARD, responses=ERRORS)
    async def get_reward(request: schema.GetRewardRequest) -> schema.GetRewardResponse:
        """Answers OpenRLHF's ``remote_rm_url`` clients. Replaces the end of each query by the critic's own ending."""
        queries = [request.query] if isinstance(request.query, str) else request.query
        prompts: Sequence[str | None] | None = (
            [request.prompts] if isinstance(request.prompts, str) else request.prompts
        )
        if prompts is not None and len(prompts) != len(queries):
            raise ScorerRejected(
                "unequal_lengths", f"{len(queries)} queries and {len(prompts)} prompts: send one prompt per query"
            )
        items: list[Item] = [
            Text(query, _response_of(query, prompt), finish=True)
            for query, prompt in zip(queries, prompts if prompts is not None else [None] * len(queries), strict=True)
        ]
        scores = await service().score(items, False, None)
        rewards = scores.rewards_S.tolist()
        logs = {name: value_S.tolist() for name, value_S in scores.logs().items()}
        return schema.GetRewardResponse(
            rewards=rewards,
            scores=rewards,
            extra_logs=logs,
            truncated=scores.truncated_S.tolist(),
            model_version=scores.model_version,
        )

    @router.post("/classify", responses=ERRORS)
    async def classify(request: schema.ClassifyRequest) -> schema.ClassifyResponse:
        """Answers in the format of vLLM's classification endpoint. The raw reward is the only entry of ``probs``."""
        scores = await service().score(request.to_items(), False, request.version)
        return schema.ClassifyResponse.of(request, scores)

    @router.get("/v1/models", responses={status: ERRORS[status] for status in (401, 403, 500, 503)})
    async def models() -> schema.ModelsResponse:
        """Lists the served version, as OpenAI's clients ask for it. ``/classify`` takes any other name as well."""
        served = await service().info()
        model = schema.ServedModel(id=served.model_version, max_model_len=served.max_length)
        return schema.ModelsResponse(data=[model])

    @router.get("/info", responses={status: ERRORS[status] for status in (401, 403, 500, 503)})
    async def info() -> schema.InfoResponse:
        """Describes the served critic and the limits of a call."""
        served = await service().info()
        limits = schema.LimitsModel(**served.limits.model_dump(), max_body_bytes=service().settings.max_body_bytes)
        return schema.InfoResponse(
            model_version=served.model_version,
            fingerprint=served.fingerprint,
            max_length=served.max_length,
            normalized=served.normalized,
            components=served.components,
            limits=limits,
            replicas=await service().replicas(),
            prefix_cache=schema.PrefixCacheModel(**asdict(cache)) if (cache := served.prefix_cache) else None,
            collects=service().settings.collect is not None,
            published=await service().published(),
        )

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> JSONResponse:
        root_path = request.scope.get("root_path", "")
        return JSONResponse(app.openapi() | ({"servers": [{"url": root_path}]} if root_path else {}))

    add_judging(router, service, ERRORS)
    app.include_router(router)
    app.include_router(page_router())

    @app.get(HEALTH, responses={status: ERRORS[status] for status in (403, 500, 503)})
    async def health() -> schema.HealthResponse:
        """Reports whether a scorer is ready. This is the only endpoint that needs no token."""
        return schema.HealthResponse(model_version=(await service().info()).model_version)

    return app


def _response_of(query: str, prompt: str | None) -> str | None:
    """Returns the part of a query after its prompt, None if the query does not begin with the prompt."""
    return query[len(prompt) :] if prompt is not None and query.startswith(prompt) else None


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _has_token(request: Request, sha256: str) -> bool:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    sent = hashlib.sha256(token.strip().encode()).hexdigest()
    return scheme.lower() == "bearer" and hmac.compare_digest(sent, sha256)


def _foreign(request: Request, only_loopback: bool, is_page: bool) -> str:
    """Returns why a request comes from a web page that may not send it; empty if it does not.

    A link on another site may lead to this pool's page. That site can read nothing of it.
    """
    host = request.headers.get("Host", "")
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    try:
        hostname = urlsplit(f"//{host}").hostname or ""
        own = (site in ("none", "same-origin")) if site else origin is None or urlsplit(origin).netloc == host
        own = own or (is_page and request.headers.get("Sec-Fetch-Dest") == "document")
    except ValueError:  # not an address
        return "the header Host or Origin is not an address: leave Origin out and name the pool's host"
    if only_loopback and not is_loopback(hostname):
        return f"this pool answers only on loopback, not as {hostname[:MAX_SHOWN]!r}: call http://127.0.0.1:PORT"
    return "" if own else "web pages of other sites may not call this pool without a token: start it with --auth on"


def _error(
    request: Request,
    status: int,
    kind: str,
    message: str,
    headers: dict[str, str] | None = None,
    item: int | None = None,
    param: str | None = None,
) -> JSONResponse:
    if why := _shown_by_openrlhf(request, status, message):
        return JSONResponse(None, 307, {"Location": why})
    request.app.state.on_refusal(kind)
    name = TYPE_OF_STATUS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    detail = schema.ErrorDetail(kind=kind, message=message, item=item, type=name, param=param, code=status)
    body = schema.ErrorResponse(error=detail)
    return JSONResponse(body.model_dump(), status, headers)


def _shown_by_openrlhf(request: Request, status: int, message: str) -> str:
    """Returns an address whose name says what is wrong, for a client of OpenRLHF; empty for others.

    That client shows nothing of an error but its status and the address that it came from. So the same request is sent
    to an address with the message in it, where it gets the same error.
    """
    is_openrlhf = request.url.path.endswith(GET_REWARD) and "aiohttp/" in request.headers.get("User-Agent", "")
    if not is_openrlhf or status not in SHOWN_STATUSES or WHY in request.query_params:
        return ""
    return f"?{urlencode({WHY: message[:MAX_SHOWN]}, quote_via=quote)}"


async def _on_invalid(request: Request, error: Any) -> JSONResponse:
    # For a union, reports the alternative that matched furthest, which is probably the intended one.
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    field = _field_of(first["loc"][1:], error.body, first["type"] == "missing")[:MAX_SHOWN]
    return _error(request, 422, "invalid_request", f"{field or 'the body'}: {first['msg']}", param=field)


def _field_of(place: Sequence[str | int], body: Any, is_missing: bool) -> str:
    """Returns the place of an error in a body as the caller wrote it, such as ``items[0].prompt[1].role``.

    pydantic's place also names the alternatives of a union, which the body does not have. ``is_missing`` tells that the
    last part of the place is a name that the body lacks.
    """
    field = ""
    for number, part in enumerate(place, 1):
        if isinstance(part, int) and isinstance(body, list) and part < len(body):
            field, body = f"{field}[{part}]", body[part]
        elif isinstance(body, dict) and (part in body or (is_missing and number == len(place))):
            field, body = f"{field}.{part}" if field else str(part), body.get(part)
    return field


async def _on_http_exception(request: Request, error: Any) -> JSONResponse:
    kind = KIND_OF_STATUS.get(error.status_code, "bad_request")
    return _error(request, error.status_code, kind, str(error.detail), error.headers)


async def _on_critic_error(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, ScorerRejected):
        return _error(request, 422, error.kind, error.message, item=error.item)
    if isinstance(error, VersionMismatch):
        return _error(request, 409, "version_mismatch", str(error))
    if isinstance(error, ScorerUnavailable):
        return _error(request, 503, "unavailable", str(error), {"Retry-After": "1"})
    return _error(request, 500, "failed", str(error))


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    return _error(request, 500, "failed", f"internal error: {type(error).__name__}")
