"""Access to scorers inside a Ray cluster: a `ScorerClient` over a Ray Serve handle."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException

from actors.runtime.ray_internals import get_serve_client
from actors.runtime.session import init_ray
from rlhf_critic.errors import CriticError, ScorerFailed, ScorerLost, ScorerUnavailable
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Item, Scores

SCORER_DEPLOYMENT = "Scorer"
DEFAULT_APP = "scorers"
CHECK_AFTER_S = 5.0  # a call without an answer for so long may be one that no scorer will answer
ANSWERING = ("RUNNING", "UPDATING")  # states of a replica


class HandleTransport:
    """Calls the replicas of the pool ``app`` through Serve's router."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._handle: Any = None
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return HandleTransport, (self._app,)

    async def ask(self, items: list[Item], values: bool, version: str | None, timeout_s: float) -> Scores:
        """See `rlhf_critic.scoring.client.Transport`."""
        response = None
        if os.getpid() != self._process:
            raise ScorerFailed("Ray does not work in a forked process: connect there anew, after ray.init()")
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(serve.get_deployment_handle, SCORER_DEPLOYMENT, self._app)
            response = self._handle.score.remote(items, values, version)
            answer: Scores | CriticError = await self._answer(response, timeout_s)
        except asyncio.TimeoutError as error:
            _cancel(response)
            raise ScorerUnavailable(f"no replica answered within {timeout_s:.1f} s") from error
        except asyncio.CancelledError:
            _cancel(response)
            raise
        except RayTaskError as error:
            raise ScorerFailed(f"a scorer failed: {type(error.cause).__name__}: {error.cause}") from error
        except BackPressureError as error:
            raise ScorerUnavailable("the pool's queue is full") from error
        except ActorDiedError as error:
            raise ScorerLost(f"a replica died during the call: {str(error).splitlines()[0]}") from error
        except (RayError, RayServeException, TaskCancelledError) as error:
            raise ScorerUnavailable(f"{type(error).__name__}: {error}") from error
        if isinstance(answer, CriticError):
            raise answer
        return answer

    async def _answer(self, response: Any, timeout_s: float) -> Scores | CriticError:
        """Waits for an answer. Serve queues calls for a pool whose replicas cannot start, without an end or a reason.

        Raises:
            asyncio.TimeoutError: There is no answer, and a replica is running.
            ScorerUnavailable: There is none, and the reason is known.
        """
        task = asyncio.ensure_future(_awaited(response))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio logs an unread one
        try:
            for wait_s in (min(timeout_s, CHECK_AFTER_S), max(0.0, timeout_s - CHECK_AFTER_S)):
                done, _ = await asyncio.wait({task}, timeout=wait_s)
                if done:
                    return task.result()
                if reason := await asyncio.to_thread(why_down, self._app):
                    _cancel(response)
                    raise ScorerUnavailable(reason)
            raise asyncio.TimeoutError
        finally:
            task.cancel()

    async def close(self) -> None:
        """Does nothing: a handle holds no resources."""


async def _awaited(response: Any) -> Any:
    return await response


def why_down(app: str) -> str:
    """Returns why no replica of a pool can start; empty if one runs, or the first one has not failed yet."""
    client = get_serve_client(raise_if_no_controller_running=False)
    # Not `serve.status`, which fails if two threads call it at once.
    application = client and client.get_serve_details()["applications"].get(app)
    if not application:
        return f"there is no pool {app!r}"
    scorers = application["deployments"].get(SCORER_DEPLOYMENT)
    if scorers is None or any(replica["state"] in ANSWERING for replica in scorers["replicas"]):
        return ""
    message: str = scorers["message"]
    lines = [line.strip() for line in message.splitlines() if line.strip()]  # the last one names the error
    return f"no scorer is running: {lines[-1]}" if "fail" in message else ""


def _cancel(response: Any) -> None:
    """Cancels a call that nobody waits for. A failure meanwhile, such as the end of its pool, does not matter."""
    if response is not None:
        with contextlib.suppress(RayError, RayServeException):
            response.cancel()


def connect(app: str = DEFAULT_APP, **options: Any) -> ScorerClient:
    """Returns a client of the pool that ``python -m jobs.serve`` runs in this Ray cluster.

    Args:
        app: The pool's name.
        **options: Options of `rlhf_critic.scoring.client.ScorerClient`.
    """
    if not ray.is_initialized():
        init_ray()
    return ScorerClient(HandleTransport(app), **options)
