"""How many tokens a micro-batch should have: a short measured probe.

Small micro-batches waste time on what each costs once (kernel launches, gathers, the embedding's gradient), large ones
waste memory for nothing. The probe doubles the size until that no longer pays. Knows nothing of models or ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

FIRST_TOKENS = 256
MOST_TOKENS = 16384
# Doubling goes on while it makes tokens at least so much cheaper.
WORTHWHILE_GAIN = 1.1
# Activations of a micro-batch may take so much of the memory that was free at the start.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Measurement:
    """What a forward and a backward pass over some tokens took.

    Attributes:
        seconds: Time.
        activation_bytes: Memory that the forward pass kept for the backward pass.
    """

    seconds: float
    activation_bytes: int


def probe_token_budget(measure: Callable[[int], Measurement], free_bytes: int) -> int:
    """The smallest token budget beyond which micro-batches get hardly faster or do not fit.

    Args:
        measure: Runs that many tokens forward and backward. The time of the first call, which warms up, is not used.
        free_bytes: Memory that is free for activations and everything else.

    Returns:
        Tokens, a power of two times `FIRST_TOKENS`.
    """
    bytes_of_half = measure(FIRST_TOKENS // 2).activation_bytes
    best, seconds_per_token = FIRST_TOKENS, float("inf")
    tokens = FIRST_TOKENS
    while tokens <= MOST_TOKENS:
        measured = measure(tokens)
        if measured.seconds / tokens * WORTHWHILE_GAIN > seconds_per_token:
            break
        best, seconds_per_token = tokens, measured.seconds / tokens
        # What is kept whatever the size (ZeRO-3 shows gathered parameters here) drops out of the difference.
        bytes_of_double = 4 * (measured.activation_bytes - bytes_of_half)
        if bytes_of_double > MEMORY_SHARE * free_bytes:
            break
        bytes_of_half = measured.activation_bytes
        tokens *= 2
    return best


@dataclass
class ActivationMeter:
    """Counts the memory that autograd keeps between a forward and a backward pass, parameters left out.

    Attributes:
        seconds: Since `running` began, when it ends.
        bytes: Of distinct storages.
    """

    seconds: float = 0.0
    bytes: int = 0
    _seen: set[int] = field(default_factory=set)

    @contextmanager
    def running(self, parameters: Any, synchronize: Callable[[], None]) -> Iterator[None]:
        """Measures what runs inside."""
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
