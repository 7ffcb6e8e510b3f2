"""The scorers' HTTP endpoints: authentication, limits, three dialects of one question, errors that programs can read.

`build_app` makes a FastAPI application around anything that scores (`ScoringService`), so it also runs without Serve.
What crosses the wire is defined in `rlhf_critic.scoring.http_schema`. Knows nothing of replicas or models.
"""

import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_critic.errors import CriticError, ScorerRejected, ScorerUnavailable, VersionMismatch
from rlhf_critic.scoring.http_schema import (
    ClassifyDatum,
    ClassifyRequest,
    ClassifyResponse,
    ErrorDetail,
    ErrorResponse,
    GetRewardRequest,
    GetRewardResponse,
    HealthResponse,
    InfoResponse,
    LimitsModel,
    ScoreRequest,
    ScoreResponse,
    Usage,
    conversation_of,
)
from rlhf_critic.scoring.items import Item, ScorerInfo, Scores, Text

HEALTH = "/health"
RETRY_AFTER_S = "1"
MOST_SHOWN = 200  # characters of a name that a caller made up
KIND_OF_STATUS = {400: "bad_request", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed"}


@dataclass(frozen=True)
class HttpSettings:
    """What the endpoints allow.

    Attributes:
        token_sha256: Hex digest of the bearer token that callers must show; None lets everyone in.
        max_body_bytes: Most bytes of a request's body.
        deadline_s: Seconds that a request waits for its scores.
    """

    token_sha256: str | None = None
    max_body_bytes: int = 16 * 1024 * 1024
    deadline_s: float = 60.0


class ScoringService(Protocol):
    """What the endpoints stand before."""

    settings: HttpSettings

    async def score(self, items: list[Item], values: bool, version: str | None) -> Scores:
        """Scores; raises the errors of `rlhf_critic.scoring.client.ScorerClient`."""

    async def info(self) -> ScorerInfo:
        """What is served; raises `ScorerUnavailable` where nothing is ready."""

    def on_refusal(self, kind: str) -> None:
        """Is told of every request that gets no scores, and why."""


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON."},
    401: {"model": ErrorResponse, "description": "The bearer token is missing or wrong."},
    409: {"model": ErrorResponse, "description": "Another version is served than the one asked for."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    422: {"model": ErrorResponse, "description": "The request says something that cannot be scored."},
    500: {"model": ErrorResponse, "description": "A scorer failed."},
    503: {"model": ErrorResponse, "description": "No scorer answered in time: try again."},
}


class _StrictRequest(Request):
    """Reads JSON as its standard has it: Python's reader also takes NaN and Infinity."""

    async def json(self) -> Any:
        try:
            return json.loads(await self.body(), parse_constant=_refuse_constant)
        except (UnicodeDecodeError, RecursionError, ValueError) as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from error


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _Gate:
    """Looks at a token before it reads a body, and stops reading one that is too large, whatever its headers say."""

    def __init__(self, app: ASGIApp, service: Callable[[], ScoringService]) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings = self._service().settings
        request = Request(scope)
        is_open = scope["path"].removeprefix(scope.get("root_path", "")) == HEALTH
        if settings.token_sha256 and not is_open and not _shows_token(request, settings.token_sha256):
            message = "show the pool's token: Authorization: Bearer TOKEN"
            refusal = _error(request, 401, KIND_OF_STATUS[401], message, {"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
            return
        limit = settings.max_body_bytes
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, f"the body is larger than {limit} bytes: split the call")
            return message

        await self._app(scope, counted, send)


def build_app(service: Callable[[], ScoringService]) -> FastAPI:
    """The application.

    Args:
        service: Gives what answers, when a request comes.
    """
    app = FastAPI(
        title="rlhf-critic scorers",
        description="Rewards of a critic. One text has one reward, whichever endpoint is asked.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.on_refusal = lambda kind: service().on_refusal(kind)
    app.add_middleware(_Gate, service=service)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_http_exception)
    app.add_exception_handler(CriticError, _on_critic_error)
    app.add_exception_handler(Exception, _on_bug)
    # Says in the OpenAPI document what `_Gate` does.
    bearer = HTTPBearer(auto_error=False, description="The pool's token, if it wants one.")
    router = APIRouter(route_class=_StrictRoute, dependencies=[Depends(bearer)])

    @router.post("/score", responses=ERRORS)
    async def score(request: ScoreRequest) -> ScoreResponse:
        """Scores conversations, chats, finished texts or token ids."""
        items: list[Item] = []
        for item in request.items:
            try:
                items.append(item.to_item())
            except ScorerRejected as error:
                raise ScorerRejected(error.kind, f"item {len(items)}: {error.message}", len(items)) from error
        return ScoreResponse.of(await service().score(items, request.values, request.version))

    @router.post("/get_reward", responses=ERRORS)
    async def get_reward(request: GetRewardRequest) -> GetRewardResponse:
        """Answers OpenRLHF's ``remote_rm_url`` clients. A query's end is put right: the critic's own ending."""
        queries = [request.query] if isinstance(request.query, str) else request.query
        prompts: Sequence[str | None] | None = (
            [request.prompts] if isinstance(request.prompts, str) else request.prompts
        )
        if prompts is not None and len(prompts) != len(queries):
            raise ScorerRejected("unequal_lengths", f"{len(queries)} queries and {len(prompts)} prompts: send as many")
        items: list[Item] = [
            Text(query, _response_of(query, prompt), finish=True)
            for query, prompt in zip(queries, prompts if prompts is not None else [None] * len(queries), strict=True)
        ]
        scores = await service().score(items, False, None)
        rewards = scores.rewards_S.tolist()
        logs = {name: value_S.tolist() for name, value_S in scores.components.items()}
        return GetRewardResponse(rewards=rewards, scores=rewards, extra_logs=logs, model_version=scores.model_version)

    @router.post("/classify", responses=ERRORS)
    async def classify(request: ClassifyRequest) -> ClassifyResponse:
        """Answers in the shape of vLLM's classification endpoint: the raw reward is the only entry of ``probs``."""
        scores = await service().score(_classified(request), False, request.model)
        tokens = int(scores.tokens_S.sum())
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=scores.model_version,
            data=[
                ClassifyDatum(index=index, label="LABEL_0", probs=[reward])
                for index, reward in enumerate(scores.rewards_S.tolist())
            ],
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )

    @router.get("/info", responses={status: ERRORS[status] for status in (401, 500, 503)})
    async def info() -> InfoResponse:
        """Says what is served and what a call may ask."""
        told = await service().info()
        limits = LimitsModel(
            max_items=told.limits.max_items,
            max_text_bytes=told.limits.max_text_bytes,
            max_tokens=told.limits.max_tokens,
            max_body_bytes=service().settings.max_body_bytes,
        )
        return InfoResponse(
            model_version=told.model_version,
            fingerprint=told.fingerprint,
            max_length=told.max_length,
            normalized=told.normalized,
            components=told.components,
            limits=limits,
        )

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    app.include_router(router)

    @app.get(HEALTH, responses={status: ERRORS[status] for status in (500, 503)})
    async def health() -> HealthResponse:
        """Says whether a warm scorer is there; the one endpoint that needs no token."""
        return HealthResponse(model_version=(await service().info()).model_version)

    return app


def _response_of(query: str, prompt: str | None) -> str | None:
    """What a query adds to its prompt, if it begins with it."""
    return query[len(prompt) :] if prompt is not None and query.startswith(prompt) else None


def _classified(request: ClassifyRequest) -> list[Item]:
    if (request.input is None) == (request.messages is None):
        raise ScorerRejected("no_items", "give input or messages, one of them")
    if request.messages is not None:
        return [conversation_of(request.messages)]
    if isinstance(request.input, str):
        return [Text(request.input)]
    assert request.input is not None
    if request.input and all(isinstance(token, int) for token in request.input):
        return [request.input]  # type: ignore[list-item]
    return [Text(entry) if isinstance(entry, str) else entry for entry in request.input]  # type: ignore[misc]


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _shows_token(request: Request, sha256: str) -> bool:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    shown = hashlib.sha256(token.strip().encode()).hexdigest()
    return scheme.lower() == "bearer" and hmac.compare_digest(shown, sha256)


def _error(
    request: Request,
    status: int,
    kind: str,
    message: str,
    headers: dict[str, str] | None = None,
    item: int | None = None,
) -> JSONResponse:
    request.app.state.on_refusal(kind)
    body = ErrorResponse(error=ErrorDetail(kind=kind, message=message, item=item))
    return JSONResponse(body.model_dump(), status, headers)


async def _on_invalid(request: Request, error: Any) -> JSONResponse:
    # Of the alternatives of a union, the one that got furthest is what the caller meant.
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    place = ".".join(str(part) for part in first["loc"] if not str(part).endswith("Model"))
    return _error(request, 422, "invalid_request", f"{place[:MOST_SHOWN]}: {first['msg']}")


async def _on_http_exception(request: Request, error: Any) -> JSONResponse:
    kind = "body_too_large" if error.status_code == 413 else KIND_OF_STATUS.get(error.status_code, "bad_request")
    return _error(request, error.status_code, kind, str(error.detail), error.headers)


async def _on_critic_error(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, ScorerRejected):
        return _error(request, 422, error.kind, error.message, item=error.item)
    if isinstance(error, VersionMismatch):
        return _error(request, 409, "version_mismatch", str(error))
    if isinstance(error, ScorerUnavailable):
        return _error(request, 503, "unavailable", str(error), {"Retry-After": RETRY_AFTER_S})
    return _error(request, 500, "failed", str(error))


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    return _error(request, 500, "failed", f"an internal error: {type(error).__name__}")
