"""Continuous batching: joins the requests of many callers into micro-batches for one critic.

Every request waits in one queue. Whenever the critic is free, the oldest requests are planned together
(`rlhf_critic.batching.planner`), so sequences of different callers that share a prefix meet in one prefix tree. The
micro-batch with the oldest sequence is computed next. A plan is used until new requests could change its rest.
Nothing waits for a batch to fill: an idle critic starts at once, and under load the queue fills the batches. Knows
nothing about text, models or networks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.batching.planner import plan_sequences
from rlhf_critic.batching.prefix_tree import TokenIds, lexicographic_order, shared_lengths
from rlhf_critic.errors import NonFiniteRewardError, ScorerUnavailable

logger = logging.getLogger(__name__)

# One array per sequence: its reward, fp32 [1], or its values, fp32 [tokens]. The standard deviation of the reward
# follows if the critic is calibrated.
Outputs: TypeAlias = list[NDArray[np.float32]]


class Computed(NamedTuple):
    """Outputs of a micro-batch, the number of tokens computed for them, and what a prefix cache did meanwhile.

    Attributes:
        outputs: See `Outputs`.
        tokens: Number of computed tokens.
        hit_tokens: Tokens of the sequences that the cache had, each sequence counted separately.
        evicted_tokens: Tokens that the cache evicted.
        cache_bytes: Bytes that the cache now uses.
    """

    outputs: Outputs
    tokens: int
    hit_tokens: int = 0
    evicted_tokens: int = 0
    cache_bytes: int = 0


Forward: TypeAlias = Callable[[Sequence[TokenIds], bool], Computed]
KnownLengths: TypeAlias = Callable[[Sequence[TokenIds], bool], list[int]]

# Micro-batches that are planned together: most are full then, and planning stays much faster than computing.
PLANNED_AHEAD = 4


class OutOfDeviceMemory(ScorerUnavailable):
    """A micro-batch needs more memory than the device has. Smaller ones may fit."""


@dataclass(eq=False)
class _Request:
    sequences: Sequence[TokenIds]
    rewards_only: bool
    tokens: int  # number to compute if it were planned alone
    future: Future[Outputs] = field(default_factory=Future)
    outputs: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def waiting(self) -> list[int]:
        return [index for index in range(len(self.sequences)) if index not in self.outputs]

    @property
    def is_complete(self) -> bool:
        return len(self.outputs) == len(self.sequences)


# Sequences of a micro-batch: each is one of a request.
_Chosen: TypeAlias = list[tuple[_Request, int]]


@dataclass(frozen=True)
class BatchRecord:
    """Figures of one micro-batch, for metrics.

    Attributes:
        sequences: Number of sequences.
        requests: Number of requests they came from.
        tokens: Sum of the sequences' lengths in tokens.
        computed_tokens: Number of tokens computed; shared prefixes count once.
        queue: Number of unfinished requests after it, including its own.
        seconds: Duration in seconds.
        hit_tokens: Tokens of the sequences that the prefix cache had; see `Computed`.
        evicted_tokens: Tokens that the prefix cache evicted.
        cache_bytes: Bytes that the prefix cache uses after it.
    """

    sequences: int
    requests: int
    tokens: int
    computed_tokens: int
    queue: int
    seconds: float
    hit_tokens: int = 0
    evicted_tokens: int = 0
    cache_bytes: int = 0


class RequestBatcher:
    """Computes requests on a separate thread and joins those that wait at the same time.

    Args:
        forward: Computes a micro-batch: token ids to rewards (``rewards_only``) or values. Called by one thread. If it
            raises `OutOfDeviceMemory`, the budget is halved and its sequences are planned again.
        token_budget: Maximum tokens of a micro-batch. With ``prefix_tree``, shared tokens count once.
        prefix_tree: Whether ``forward`` computes shared prefixes once.
        on_batch: Called with the figures of every computed micro-batch.
        known_lengths: Returns how many first tokens of each sequence ``forward`` would not compute, because a cache has
            them. Called by the thread of ``forward``, with the same arguments.
    """

    def __init__(
        self,
        forward: Forward,
        token_budget: int,
        prefix_tree: bool,
        on_batch: Callable[[BatchRecord], None] = lambda _: None,
        known_lengths: KnownLengths | None = None,
    ) -> None:
        self._forward = forward
        self._known_lengths = known_lengths
        self._token_budget = token_budget
        self._prefix_tree = prefix_tree
        self._on_batch = on_batch
        self._queue: deque[_Request] = deque()
        self._planned: deque[_Chosen] = deque()
        self._submitted = 0
        self._considered = 0  # value of `_submitted` at the last plan, if every request of its kind was planned
        self._changed = threading.Condition()
        self._closed = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="request-batcher", daemon=True)
        self._thread.start()

    def submit(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Future[Outputs]:
        """Requests the reward of each sequence, or the values at its tokens.

        A future that is cancelled before its turn is not computed.

        Args:
            sequences: Token ids; at least one sequence, none empty.
            rewards_only: Whether to compute rewards instead of values.

        Returns:
            A future of one fp32 array per sequence: its reward ``[1]`` or its values ``[tokens]``.

        Raises:
            ValueError: There is no sequence, or one is empty. It would fail the requests planned together with it.
            ScorerUnavailable: `close` was called.
        """
        if not sequences or not all(len(sequence) for sequence in sequences):
            raise ValueError("a request needs at least one sequence and every sequence at least one token")
        request = _Request(sequences, rewards_only, self._tokens_of(sequences))
        with self._changed:
            if self._closed:
                raise ScorerUnavailable("this scorer is shutting down: use another")
            self._queue.append(request)
            self._submitted += 1
            self._changed.notify()
        return request.future

    @property
    def busy_s(self) -> float:
        """Seconds since the micro-batch that is being computed began; 0 without one."""
        since = self._busy_since
        return 0.0 if since is None else time.perf_counter() - since

    def close(self, timeout_s: float) -> bool:
        """Rejects new requests and computes the waiting ones.

        Returns:
            Whether all were computed in time. If not, the others fail with `ScorerUnavailable`.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return True
        with self._changed:
            left, self._queue = self._queue, deque()
        for request in left:
            _fail(request, ScorerUnavailable(f"this scorer shut down with unfinished calls after {timeout_s:g} s"))
        return False

    def _tokens_of(self, sequences: Sequence[TokenIds]) -> int:
        tokens = sum(len(sequence) for sequence in sequences)
        if not self._prefix_tree:
            return tokens
        arrays = [np.asarray(sequence) for sequence in sequences]
        return tokens - sum(shared_lengths([arrays[index] for index in lexicographic_order(arrays)]))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                self._drop_finished()
                if self._closed and not self._queue:
                    return
            self._busy_since = time.perf_counter()
            self._compute_next()
            self._busy_since = None

    def _drop_finished(self) -> None:
        self._queue = deque(request for request in self._queue if not request.future.done())

    def _compute_next(self) -> None:
        """Computes the micro-batch with the oldest sequence, if not every request was cancelled."""
        chosen: _Chosen = []
        try:
            chosen = self._next()
            if chosen:
                self._compute(chosen)
        except OutOfDeviceMemory as error:
            if len(chosen) == 1:
                _fail(chosen[0][0], error)
                return
            self._token_budget = max(1, min(self._token_budget, self._tokens_of(_sequences_of(chosen))) // 2)
            self._planned.clear()
            logger.warning("out of device memory sequences=%d new_token_budget=%d", len(chosen), self._token_budget)
        except Exception as error:
            for request in _requests_of(chosen) or list(self._queue)[:1]:
                _fail(request, error)

    def _next(self) -> _Chosen:
        """Takes the next micro-batch from the plan, or from a new plan if requests outside could change it."""
        with self._changed:
            queue, submitted = list(self._queue), self._submitted
        rests = ([one for one in chosen if not one[0].future.done()] for chosen in self._planned)
        self._planned = deque(rest for rest in rests if rest)
        has_room = len(self._planned) < PLANNED_AHEAD and self._considered != submitted
        # The oldest request may be of the other kind, rewards or values.
        if queue and (not self._planned or has_room or queue[0] not in _requests_of(self._planned[0])):
            kind = [request for request in queue if request.rewards_only == queue[0].rewards_only]
            window, known, requests = self._window(kind)
            (plan,) = plan_sequences(_sequences_of(window), 1, self._token_budget, self._prefix_tree, known)
            units = sorted((one.units for one in plan), key=min)
            self._planned = deque([window[unit] for unit in of_one] for of_one in units)
            self._considered = submitted if requests == len(kind) else -1
        return self._planned.popleft() if self._planned else []

    def _window(self, queue: Sequence[_Request]) -> tuple[_Chosen, list[int] | None, int]:
        """Returns the sequences to plan, the known tokens of each, and the number of requests they come from."""
        window: _Chosen = []
        known: list[int] = []
        tokens, requests = 0.0, 0
        for request in queue:
            waiting = request.waiting
            window += [(request, index) for index in waiting]
            alone = request.tokens * len(waiting) / len(request.sequences)
            if self._known_lengths:
                sequences = [request.sequences[index] for index in waiting]
                lengths = self._known_lengths(sequences, request.rewards_only)
                alone = min(alone, sum(map(len, sequences)) - sum(lengths))
                known += lengths
            tokens += alone
            requests += 1
            if tokens > PLANNED_AHEAD * self._token_budget:
                break
        return window, known if self._known_lengths else None, requests

    def _compute(self, chosen: _Chosen) -> None:
        started = time.perf_counter()
        sequences = _sequences_of(chosen)
        computed = self._forward(sequences, chosen[0][0].rewards_only)
        for (request, index), output in zip(chosen, computed.outputs, strict=True):
            request.outputs[index] = output
        for request in _requests_of(chosen):
            _finish(request)
        with self._changed:
            self._drop_finished()
            queue = len(self._queue)
        record = BatchRecord(
            sequences=len(chosen),
            requests=len(_requests_of(chosen)),
            tokens=sum(len(sequence) for sequence in sequences),
            computed_tokens=computed.tokens,
            queue=queue,
            seconds=time.perf_counter() - started,
            hit_tokens=computed.hit_tokens,
            evicted_tokens=computed.evicted_tokens,
            cache_bytes=computed.cache_bytes,
        )
        try:
            self._on_batch(record)
        except Exception:  # must not end this thread, which answers every request
            logger.exception("micro-batch not recorded")


def _sequences_of(chosen: _Chosen) -> list[TokenIds]:
    return [request.sequences[index] for request, index in chosen]


def _requests_of(chosen: _Chosen) -> list[_Request]:
    return list(dict.fromkeys(request for request, _ in chosen))


def _finish(request: _Request) -> None:
    """Answers a request once all its sequences are computed."""
    if not request.is_complete:
        return
    outputs = [request.outputs[index] for index in range(len(request.sequences))]
    bad = [index for index, output in enumerate(outputs) if not np.isfinite(output).all()]
    if bad:
        _fail(request, NonFiniteRewardError(f"the critic's output for item {bad[0]} is NaN or infinite"))
        return
    with suppress(InvalidStateError):  # cancelled, or failed by `close`
        request.future.set_result(outputs)


def _fail(request: _Request, error: Exception) -> None:
    with suppress(InvalidStateError):
        request.future.set_exception(error)
