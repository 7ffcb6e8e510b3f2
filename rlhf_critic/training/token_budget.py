"""Token budget of a micro-batch, found by a short measured probe.

Small micro-batches waste time on fixed costs (kernel launches, gathers, the embedding's gradient). Large ones use
memory without a gain. The probe doubles the size until the gain is too small. Knows nothing about models or ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

FIRST_TOKENS = 256
MAX_TOKENS = 16384
WORTHWHILE_GAIN = 1.1  # doubling continues while it makes a token faster by at least this factor
MAX_GPU_TOKENS = 131072
MEMORY_SHARE = 0.5  # maximum fraction of the initially free memory that activations of a micro-batch may take


def probe_token_budget(
    measure: Callable[[int], tuple[float, int] | None],
    free_bytes: int,
    max_tokens: int = MAX_TOKENS,
    memory_share: float = MEMORY_SHARE,
) -> int:
    """Finds the smallest token budget beyond which micro-batches are hardly faster or do not fit.

    Args:
        measure: Runs a number of tokens forward and backward, and returns the seconds that it took and the bytes that
            the forward pass kept; None if memory did not suffice. The time of the first call, a warm-up, is not used.
        free_bytes: Memory that is free for activations and everything else.
        max_tokens: Maximum budget.
        memory_share: Maximum fraction of the free memory that a micro-batch may take.

    Returns:
        The budget in tokens, a power of two times `FIRST_TOKENS`.
    """
    if (warm_up := measure(FIRST_TOKENS // 2)) is None:
        return FIRST_TOKENS
    bytes_of_half = warm_up[1]
    best, seconds_per_token = FIRST_TOKENS, float("inf")
    tokens = FIRST_TOKENS
    while tokens <= max_tokens:
        if (measured := measure(tokens)) is None:
            break
        seconds, kept_bytes = measured
        if seconds / tokens * WORTHWHILE_GAIN > seconds_per_token:
            break
        best, seconds_per_token = tokens, seconds / tokens
        # Memory that does not depend on the size, such as ZeRO-3's gathered parameters, cancels in the difference.
        if 4 * (kept_bytes - bytes_of_half) > memory_share * free_bytes:
            break
        bytes_of_half = kept_bytes
        tokens *= 2
    return best


class DeviceMemory(Protocol):
    """The memory of a device, as `measure_on_device` uses it."""

    def reset(self) -> None:
        """Frees unused memory, waits for the device and starts a new peak."""

    def peak(self) -> int:
        """Waits for the device and returns the bytes of the peak since `reset`, above the level at `reset`."""


class CudaMemory:
    """The memory of the current GPU."""

    def __init__(self) -> None:
        self._before = 0

    def reset(self) -> None:
        """See `DeviceMemory`."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        """See `DeviceMemory`."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before

    def free(self) -> int:
        """Returns the bytes that this process can still allocate."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def measure_on_device(
    run: Callable[[], None], memory: DeviceMemory, on_any_rank: Callable[[bool], bool]
) -> tuple[float, int] | None:
    """Measures a forward and a backward pass on a device. All ranks call it together.

    The pass runs twice, because the first one of a size may compile kernels. The second one is measured.

    Args:
        run: Runs the pass. It must not communicate, because a rank out of memory would leave the others waiting.
        memory: The device's memory.
        on_any_rank: Returns whether its argument is true on any rank.

    Returns:
        The seconds and the bytes of the peak; None if any rank ran out of memory.
    """
    seconds, failed = 0.0, False
    for _ in range(2):
        memory.reset()
        started = time.perf_counter()
        try:
            run()
            peak = memory.peak()
        except torch.OutOfMemoryError:
            failed = True
        seconds = time.perf_counter() - started
        if on_any_rank(failed):
            memory.reset()
            return None
    return seconds, peak


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
