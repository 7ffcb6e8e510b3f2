"""Client of scorers: splits large calls, retries calls that may be retried and never substitutes a default reward.

`ScorerClient` works over a `Transport`: a Ray Serve handle (`actors.serving.handle.connect`) or HTTP
(`rlhf_critic.scoring.http_client.connect_http`). Scoring is pure, so a lost call is made again.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_delay, wait_random_exponential

from rlhf_critic.errors import ScorerFailed, ScorerLost, ScorerRejected, ScorerUnavailable, VersionMismatch
from rlhf_critic.scoring.items import Item, Scores, StepConversation, conversations

if TYPE_CHECKING:
    from rlhf_critic.data.conversation import Prompt

FIRST_WAIT_S = 0.05
MAX_WAIT_S = 2.0
LOSSES_PER_ITEM = 2  # scorers that die while they score an item alone, until the item counts as their killer
GRACE_S = 30.0  # time after a deadline before the client counts as broken


class Transport(Protocol):
    """Connection to scorers that makes one attempt per call. It can be pickled and reconnects after unpickling."""

    async def ask(self, items: list[Item], values: bool, version: str | None, timeout_s: float) -> Scores:
        """Makes one attempt.

        Raises:
            ScorerLost: The scorer died during the call.
            ScorerUnavailable: No scorer exists or answered in time. A retry may help.
            ScorerRejected: The items cannot be scored. A retry does not help.
            VersionMismatch: The served version is not ``version``.
            CriticError: The scorer failed. A retry does not help.
        """

    async def close(self) -> None:
        """Closes connections."""


class _Running(NamedTuple):
    """The event loop of a client, its thread, the places for parts that wait for an answer, and the one for suspects.

    A scorer takes all calls down with it that it works on. So of the items that may have killed one, this client asks
    for one at a time.
    """

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    in_flight: asyncio.Semaphore
    suspects: asyncio.Lock


class ScorerClient:
    """Requests rewards from scorers, from any thread and any event loop. It can be sent to other processes.

    Every answer is checked: one finite reward per item, and the version that was requested. If a scorer dies during a
    call, its items are scored together again, and one by one if another scorer dies. An item whose own calls then kill
    two scorers is rejected. A forked process continues with connections of its own.

    Args:
        transport: Connection to the scorers.
        max_items_per_call: Maximum items in a part. Larger calls are split into parts for several replicas.
        max_in_flight: Maximum number of parts that wait for an answer at the same time.
        deadline_s: Default time limit of a call in seconds, including retries.
    """

    def __init__(
        self, transport: Transport, *, max_items_per_call: int = 64, max_in_flight: int = 16, deadline_s: float = 300.0
    ) -> None:
        if min(max_items_per_call, max_in_flight) < 1 or deadline_s <= 0:
            raise ValueError("max_items_per_call and max_in_flight must be at least 1, deadline_s positive")
        self._transport = transport
        self._max_items = max_items_per_call
        self._max_in_flight = max_in_flight
        self._deadline_s = deadline_s
        self._starting = threading.Lock()
        self._running: _Running | None = None
        _clients.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = partial(
            ScorerClient,
            max_items_per_call=self._max_items,
            max_in_flight=self._max_in_flight,
            deadline_s=self._deadline_s,
        )
        return rebuild, (self._transport,)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, deadline_s: float | None = None
    ) -> NDArray[np.float32]:
        """Returns the reward of each response to its prompt, fp32 ``[S]``.

        Args:
            prompts: One prompt per response: a text, or turns with ``role`` and ``content``.
            responses: Response texts.
            deadline_s: Time limit of this call in seconds. None takes the client's.

        Raises:
            ScorerRejected: An item cannot be scored; the message names its index.
            ScorerUnavailable: No answer came before the deadline.
            VersionMismatch: A new version was being published, and no single version answered all items in time.
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
        """Scores conversations, finished texts or token ids. One version of the critic answers the whole call.

        Args:
            items: Items to score; see `rlhf_critic.scoring.items`.
            values: Whether to return the value at every token too.
            version: The version that must answer. None accepts the served version.
            deadline_s: Time limit of this call in seconds. None takes the client's.

        Raises:
            CriticError: See `score`. `VersionMismatch` is also raised if ``version`` is not served.
        """
        patience = (self._deadline_s if deadline_s is None else deadline_s) + GRACE_S
        future = self.submit(items, values=values, version=version, deadline_s=deadline_s)
        try:
            return future.result(patience)
        except FutureTimeoutError as error:
            future.cancel()
            raise ScorerUnavailable(f"this client missed its deadline: no answer after {patience:g} s") from error

    def submit(
        self,
        items: Sequence[Item],
        *,
        values: bool = False,
        version: str | None = None,
        deadline_s: float | None = None,
    ) -> Future[Scores]:
        """Starts `score_items` without waiting, so that scoring overlaps with the caller's next work.

        Returns:
            A future with the scores or an error of `score_items`. Cancelling the future cancels the call.
        """
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        with self._starting:  # `close` either cancels this call or leaves it to the next loop
            if self._running is None:
                self._running = _start(self._max_in_flight)
            work = self._score(list(items), values, version, deadline_s, self._running)
            return asyncio.run_coroutine_threadsafe(work, self._running.loop)

    async def score_async(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, deadline_s: float | None = None
    ) -> NDArray[np.float32]:
        """Runs `score` in an event loop."""
        return (await self.score_items_async(conversations(prompts, responses), deadline_s=deadline_s)).rewards_S

    async def score_items_async(
        self,
        items: Sequence[Item],
        *,
        values: bool = False,
        version: str | None = None,
        deadline_s: float | None = None,
    ) -> Scores:
        """Runs `score_items` in an event loop."""
        return await asyncio.wrap_future(self.submit(items, values=values, version=version, deadline_s=deadline_s))

    def close(self) -> None:
        """Cancels pending calls, closes connections and ends the client's thread."""
        with self._starting:
            running, self._running = self._running, None
        if running is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._wind_up(), running.loop).result(GRACE_S)
        finally:
            running.loop.call_soon_threadsafe(running.loop.stop)
            running.thread.join(GRACE_S)

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

    async def _score(
        self, items: list[Item], values: bool, version: str | None, deadline_s: float, running: _Running
    ) -> Scores:
        """Scores all parts by one version. Parts that another version answered are scored again."""
        if not items:
            raise ScorerRejected("no_items", "there is nothing to score: give at least one item")
        deadline = time.monotonic() + deadline_s
        # By the index of their first item.
        parts = {start: items[start : start + self._max_items] for start in range(0, len(items), self._max_items)}
        answers: dict[int, Scores] = {}

        async def answer(start: int, is_suspect: bool = False) -> None:
            answers.pop(start, None)
            part = parts[start]
            try:
                answers[start] = await self._ask(part, values, version, deadline, deadline_s, running, is_suspect)
            except ScorerRejected as error:
                raise error.after(start) from error
            except ScorerLost as error:
                if not is_suspect:  # a node was taken away, or an item kills scorers: the next loss tells
                    return await answer(start, is_suspect=True)
                if len(part) == 1:
                    raise ScorerRejected(
                        "kills_scorers",
                        f"item {start}: {LOSSES_PER_ITEM} scorers died while they scored it alone: leave it out, and "
                        f"report it with the log of a replica; the last error: {error}",
                        start,
                    ) from error
                parts.update({start + index: [item] for index, item in enumerate(part)})
                await _run_all(answer(start + index, is_suspect=True) for index in range(len(part)))

        missing = list(parts)
        while True:
            await _run_all(map(answer, missing))
            *_, latest = (scores.model_version for scores in answers.values())  # in order of arrival
            missing = [start for start, scores in answers.items() if scores.model_version != latest]
            if not missing:
                return _join([answers[start] for start in sorted(parts)])
            if _left(deadline) < FIRST_WAIT_S:
                raise VersionMismatch(
                    f"no single version answered all {len(items)} items within {deadline_s:g} s; the versions "
                    f"{sorted({scores.model_version for scores in answers.values()})} answered. A new critic is being "
                    "published: retry this call"
                )
            await asyncio.sleep(FIRST_WAIT_S)

    async def _ask(
        self,
        part: list[Item],
        values: bool,
        version: str | None,
        deadline: float,
        deadline_s: float,
        running: _Running,
        is_suspect: bool,
    ) -> Scores:
        """Asks for a part until a scorer answers. Of the parts that are suspects, one is asked for at a time.

        Raises:
            ScorerLost: Scorers died too often during this part.
            ScorerUnavailable: No scorer answered before the deadline.
        """

        async def once() -> Scores:
            async with running.suspects if is_suspect else nullcontext(), running.in_flight:
                scores = await self._transport.ask(part, values, version, _left(deadline))
            _validate(scores, part, values, version)
            return scores

        backoff = wait_random_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S)
        reason = "they are all busy"
        losses_left = LOSSES_PER_ITEM if is_suspect and len(part) == 1 else 1
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
                        losses_left -= isinstance(error, ScorerLost)
                        if not losses_left:
                            break
                        raise
        except RetryError as error:
            raise ScorerUnavailable(
                f"no scorer answered {len(part)} items within {deadline_s:g} s ({reason}): check that the pool is "
                "running, add replicas, or raise the deadline"
            ) from error
        raise ScorerLost(reason)


async def _run_all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs coroutines together; if one fails, the others end."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _validate(scores: Scores, asked: list[Item], values: bool, version: str | None) -> None:
    """Checks that an answer belongs to its call, because the server may be anyone's.

    Raises:
        ScorerFailed: A list does not have one entry per item, or a number is not finite.
        VersionMismatch: Another version than the requested one answered.
    """
    items = len(asked)
    if version not in {None, scores.model_version}:
        raise VersionMismatch(f"version {version} was requested, and {scores.model_version} answered")
    told = {"rewards": scores.rewards_S, **{f"component {name}": value for name, value in scores.components.items()}}
    if scores.stds_S is not None:
        told["stds"] = scores.stds_S
    shapes = {name: value.shape for name, value in told.items()}
    shapes |= {"truncated": scores.truncated_S.shape, "tokens": scores.tokens_S.shape}
    if values:
        told |= {f"values of item {index}": value_T for index, value_T in enumerate(scores.values or ())}
        shapes["values"] = (len(scores.values or ()),)
    steps = [len(item.steps) if isinstance(item, StepConversation) else 0 for item in asked]
    if any(steps):
        found = scores.step_values or ()
        told |= {f"step values of item {index}": value for index, value in enumerate(found) if value is not None}
        shapes["step_values"] = (len(found),)
    wrong = [f"{name} {shape}" for name, shape in shapes.items() if shape != (items,)]
    wrong += [f"{name} is NaN or infinite" for name, value in told.items() if not np.isfinite(value).all()]
    if values and not wrong:
        assert scores.values is not None
        lengths = [len(value_T) for value_T in scores.values]
        wrong += [] if lengths == scores.tokens_S.tolist() else ["there is not one value per token"]
    if any(steps) and not wrong:
        counts = [0 if value is None else len(value) for value in scores.step_values or ()]
        wrong += [] if counts == steps else ["there is not one value per step"]
    if wrong:
        raise ScorerFailed(
            f"the answer does not belong to a call of {items} items ({'; '.join(wrong[:3])}): check that a pool of "
            "this version of rlhf-critic answers there"
        )


def _join(answers: list[Scores]) -> Scores:
    """Joins the answers to the parts of one call, in order."""
    if len(answers) == 1:
        return answers[0]
    if len({frozenset(answer.components) for answer in answers}) > 1:
        raise ScorerFailed(f"version {answers[0].model_version} answered with different components: check the pool")
    values, texts = [answer.values for answer in answers], [answer.token_texts for answer in answers]
    stds = [answer.stds_S for answer in answers if answer.stds_S is not None]
    has_steps = any(answer.step_values is not None for answer in answers)
    step_values = [answer.step_values or (None,) * len(answer.rewards_S) for answer in answers]
    return Scores(
        rewards_S=np.concatenate([answer.rewards_S for answer in answers]),
        model_version=answers[0].model_version,
        truncated_S=np.concatenate([answer.truncated_S for answer in answers]),
        tokens_S=np.concatenate([answer.tokens_S for answer in answers]),
        components={
            name: np.concatenate([answer.components[name] for answer in answers]) for name in answers[0].components
        },
        values=None if values[0] is None else tuple(value for part in values if part is not None for value in part),
        token_texts=None if texts[0] is None else tuple(one for part in texts if part is not None for one in part),
        stds_S=np.concatenate(stds) if len(stds) == len(answers) else None,
        step_values=tuple(value for part in step_values for value in part) if has_steps else None,
    )


def _start(max_in_flight: int) -> _Running:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run_loop, args=(loop,), name="scorer-client", daemon=True)
    thread.start()
    return _Running(loop, thread, asyncio.Semaphore(max_in_flight), asyncio.Lock())


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


_clients: weakref.WeakSet[ScorerClient] = weakref.WeakSet()


def _forget_threads() -> None:
    """Makes clients start again in a forked process, which has none of its parent's threads."""
    for client in _clients:
        client._starting = threading.Lock()
        client._running = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
