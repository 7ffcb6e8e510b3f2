"""Token budget of a micro-batch, found by a short measured probe.

Small micro-batches waste time on fixed costs (kernel launches, gathers, the embedding's gradient). Large ones use
memory without a gain. The probe doubles the size until the gain is too small. Knows nothing about models or ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

FIRST_TOKENS = 256
MAX_TOKENS = 16384
WORTHWHILE_GAIN = 1.1  # doubling continues while it makes a token faster by at least this factor
MEMORY_SHARE = 0.5  # maximum fraction of the initially free memory that activations of a micro-batch may take


def probe_token_budget(measure: Callable[[int], tuple[float, int]], free_bytes: int) -> int:
    """Finds the smallest token budget beyond which micro-batches are hardly faster or do not fit.

    Args:
        measure: Runs a number of tokens forward and backward, and returns the seconds that it took and the bytes that
            the forward pass kept. The time of the first call, a warm-up, is not used.
        free_bytes: Memory that is free for activations and everything else.

    Returns:
        The budget in tokens, a power of two times `FIRST_TOKENS`.
    """
    _, bytes_of_half = measure(FIRST_TOKENS // 2)
    best, seconds_per_token = FIRST_TOKENS, float("inf")
    tokens = FIRST_TOKENS
    while tokens <= MAX_TOKENS:
        seconds, kept_bytes = measure(tokens)
        if seconds / tokens * WORTHWHILE_GAIN > seconds_per_token:
            break
        best, seconds_per_token = tokens, seconds / tokens
        # Memory that does not depend on the size, such as ZeRO-3's gathered parameters, cancels in the difference.
        if 4 * (kept_bytes - bytes_of_half) > MEMORY_SHARE * free_bytes:
            break
        bytes_of_half = kept_bytes
        tokens *= 2
    return best


@dataclass
class ActivationMeter:
    """Meter of the memory that autograd keeps between a forward and a backward pass, without parameters.

    Attributes:
        seconds: Duration of the block inside `running`.
        bytes: Bytes of the distinct storages kept.
    """

    seconds: float = 0.0
    bytes: int = 0
    _seen: set[int] = field(default_factory=set)

    @contextmanager
    def running(self, parameters: Any, synchronize: Callable[[], None]) -> Iterator[None]:
        """Measures the block inside."""
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept):
            yield
        synchronize()
        self.seconds = time.perf_counter() - started

    def _pack(self, kept: torch.Tensor) -> torch.Tensor:
        storage = kept.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return kept
