"""What asks scorers for rewards: splits large calls, retries what may be retried, and never makes up a number.

`ScorerClient` works over a `Transport`: a Ray Serve handle (`actors.serving.handle.connect`) or HTTP
(`rlhf_critic.scoring.http_client.connect_http`). Scoring is pure, so a call that was lost is simply made again; an answer
reaches its caller once. Knows nothing of how a transport reaches the scorers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_delay, wait_random_exponential

from rlhf_critic.errors import ScorerRejected, ScorerUnavailable, VersionMismatch
from rlhf_critic.scoring.items import Item, Scores, conversations

if TYPE_CHECKING:
    from rlhf_critic.data.conversation import Prompt

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 2.0
GRACE_S = 30.0  # beyond a deadline, before a client that does not answer is taken for broken


class Transport(Protocol):
    """A way to one call of a scorer. Pickles, and connects again where it is unpickled."""

    async def ask(self, items: list[Item], values: bool, version: str | None, timeout_s: float) -> Scores:
        """Asks once.

        Raises:
            ScorerUnavailable: Nobody answered in time, or was there; asking again may help.
            ScorerRejected: The items cannot be scored; asking again does not help.
            VersionMismatch: Another version than ``version`` is served.
            CriticError: The scorer failed; asking again does not help.
        """

    async def close(self) -> None:
        """Lets go of connections."""


class ScorerClient:
    """Asks scorers for rewards, from any thread and any event loop; can be sent to other processes.

    Args:
        transport: The way to the scorers.
        max_items_per_call: Larger calls are split into parts of this size, which several replicas may answer.
        max_in_flight: Most parts that wait for their answers at once.
        deadline_s: Seconds from a call to its answer, retries included, unless the call says otherwise.
    """

    def __init__(
        self, transport: Transport, *, max_items_per_call: int = 64, max_in_flight: int = 16, deadline_s: float = 300.0
    ) -> None:
        if min(max_items_per_call, max_in_flight) < 1 or deadline_s <= 0:
            raise ValueError("max_items_per_call and max_in_flight must be at least 1, deadline_s positive")
        self._options = {
            "max_items_per_call": max_items_per_call,
            "max_in_flight": max_in_flight,
            "deadline_s": deadline_s,
        }
        self._transport = transport
        self._max_items = max_items_per_call
        self._max_in_flight = max_in_flight
        self._deadline_s = deadline_s
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.current_thread()  # until the client has one of its own

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._transport, self._options)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, deadline_s: float | None = None
    ) -> NDArray[np.float32]:
        """The reward of each response to its prompt, fp32 ``[S]``.

        Args:
            prompts: Texts, or turns with ``role`` and ``content``; one for each response.
            responses: Texts.
            deadline_s: Instead of the client's.

        Raises:
            ScorerRejected: Something cannot be scored; the message names it by its index.
            ScorerUnavailable: No answer came before the deadline.
            VersionMismatch: A new version was being published, and no single one answered all before the deadline.
            CriticError: A scorer failed.
        """
        return self.score_items(conversations(prompts, responses), deadline_s=deadline_s).rewards_S

    def score_items(
        self,
        items: Sequence[Item],
        *,
        values: bool = False,
        version: str | None = None,
        deadline_s: float | None = None,
    ) -> Scores:
        """Scores conversations, finished texts or token ids, all by one version of the critic.

        Args:
            items: See `rlhf_critic.scoring.items`.
            values: Whether to give the value at every token too.
            version: The version that must answer; None takes the one that is served.
            deadline_s: Instead of the client's.

        Raises:
            CriticError: As `score`; `VersionMismatch` also where ``version`` is not served.
        """
        patience = (self._deadline_s if deadline_s is None else deadline_s) + GRACE_S
        future = self.submit(items, values=values, version=version, deadline_s=deadline_s)
        try:
            return future.result(patience)
        except FutureTimeoutError as error:
            future.cancel()
            raise ScorerUnavailable(f"this client did not keep its deadline: waited {patience:g} s") from error

    def submit(
        self,
        items: Sequence[Item],
        *,
        values: bool = False,
        version: str | None = None,
        deadline_s: float | None = None,
    ) -> Future[Scores]:
        """`score_items` without waiting, so that scoring overlaps with what the caller does next.

        Returns:
            A future of the scores, or of the errors of `score_items`. Cancelling it takes the call back.
        """
        work = self._score(list(items), values, version, self._deadline_s if deadline_s is None else deadline_s)
        with self._starting:  # so that `close` cancels it, or it comes to the next loop
            return asyncio.run_coroutine_threadsafe(work, self._running_loop())

    async def score_async(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, deadline_s: float | None = None
    ) -> NDArray[np.float32]:
        """`score` for an event loop."""
        return (await self.score_items_async(conversations(prompts, responses), deadline_s=deadline_s)).rewards_S

    async def score_items_async(
        self,
        items: Sequence[Item],
        *,
        values: bool = False,
        version: str | None = None,
        deadline_s: float | None = None,
    ) -> Scores:
        """`score_items` for an event loop."""
        return await asyncio.wrap_future(self.submit(items, values=values, version=version, deadline_s=deadline_s))

    def close(self) -> None:
        """Lets go of connections and the client's thread; calls that wait are cancelled."""
        with self._starting:
            loop, self._loop = self._loop, None
            thread = self._thread
        if loop is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._wind_up(), loop).result(GRACE_S)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(GRACE_S)

    def __enter__(self) -> ScorerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _wind_up(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._transport.close()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._in_flight = asyncio.Semaphore(self._max_in_flight)
            self._thread = threading.Thread(target=_run_loop, args=(self._loop,), name="scorer-client", daemon=True)
            self._thread.start()
        return self._loop

    async def _score(self, items: list[Item], values: bool, version: str | None, deadline_s: float) -> Scores:
        """One version answers every part: parts that another one answered are asked again."""
        if not items:
            raise ScorerRejected("no_items", "there is nothing to score: give at least one item")
        deadline = time.monotonic() + deadline_s
        parts = [items[start : start + self._max_items] for start in range(0, len(items), self._max_items)]
        answers: dict[int, Scores] = {}

        async def answer(index: int) -> None:
            answers.pop(index, None)
            try:
                answers[index] = await self._ask(parts[index], values, version, deadline, deadline_s)
            except ScorerRejected as error:
                raise error.after(index * self._max_items) from error

        missing = list(range(len(parts)))
        while True:
            tasks = [asyncio.create_task(answer(index)) for index in missing]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:  # of which one may have failed
                    task.cancel()
            *_, latest = (scores.model_version for scores in answers.values())  # in the order of arrival
            missing = [index for index, scores in answers.items() if scores.model_version != latest]
            if not missing:
                return _join([answers[index] for index in range(len(parts))])
            if _left(deadline) < FIRST_WAIT_S:
                raise VersionMismatch(
                    f"no single version answered all {len(items)} items within {deadline_s:g} s, but "
                    f"{sorted({scores.model_version for scores in answers.values()})}: a new critic is being "
                    "published; ask again"
                )
            await asyncio.sleep(FIRST_WAIT_S)

    async def _ask(
        self, part: list[Item], values: bool, version: str | None, deadline: float, deadline_s: float
    ) -> Scores:
        async def once() -> Scores:
            async with self._in_flight:
                return await self._transport.ask(part, values, version, _left(deadline))

        backoff = wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
        reason = "they are all busy"
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(ScorerUnavailable),
                wait=lambda state: min(backoff(state), _left(deadline)),
                stop=stop_after_delay(_left(deadline)),
            ):
                with attempt:
                    try:
                        return await asyncio.wait_for(once(), _left(deadline))
                    except asyncio.TimeoutError as error:
                        raise ScorerUnavailable(reason) from error
                    except ScorerUnavailable as error:
                        reason = str(error)
                        raise
        except RetryError as error:
            raise ScorerUnavailable(
                f"no scorer answered {len(part)} items within {deadline_s:g} s ({reason}): look whether the pool is "
                "up, give it more replicas, or the call a later deadline"
            ) from error
        raise AssertionError("unreachable: an attempt returns or raises")


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _join(answers: list[Scores]) -> Scores:
    """The answers to the parts of one call, in order."""
    if len(answers) == 1:
        return answers[0]
    values = [answer.values for answer in answers]
    return Scores(
        rewards_S=np.concatenate([answer.rewards_S for answer in answers]),
        model_version=answers[0].model_version,
        truncated_S=np.concatenate([answer.truncated_S for answer in answers]),
        tokens_S=np.concatenate([answer.tokens_S for answer in answers]),
        components={
            name: np.concatenate([answer.components[name] for answer in answers]) for name in answers[0].components
        },
        values=None if values[0] is None else tuple(value for part in values if part is not None for value in part),
    )


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _rebuild(transport: Transport, options: dict[str, Any]) -> ScorerClient:
    return ScorerClient(transport, **options)
