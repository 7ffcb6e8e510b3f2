"""The probe stops when more tokens give no gain or do not fit in memory."""

import pytest
import torch

from rlhf_critic.training.token_budget import (
    FIRST_TOKENS,
    MAX_GPU_TOKENS,
    MAX_TOKENS,
    ActivationMeter,
    measure_on_device,
    probe_token_budget,
)


def machine(overhead_s: float, bytes_per_token: int, calls: list[int] | None = None):
    """Returns a simulated cost: fixed time and memory for each micro-batch, 1 ms a token, and a slow first call."""
    made = [] if calls is None else calls

    def measure(tokens: int) -> tuple[float, int]:
        made.append(tokens)
        return overhead_s + tokens * 1e-3 + (10.0 if len(made) == 1 else 0.0), 10**9 + tokens * bytes_per_token

    return measure


def test_it_grows_until_the_fixed_cost_no_longer_matters():
    calls: list[int] = []
    assert probe_token_budget(machine(0.3, 1, calls), free_bytes=10**12) == 8 * FIRST_TOKENS
    assert calls == [FIRST_TOKENS // 2, *(FIRST_TOKENS * 2**power for power in range(5))]
    assert probe_token_budget(machine(0.0, 1), free_bytes=10**12) == FIRST_TOKENS
    assert probe_token_budget(machine(1e9, 1), free_bytes=10**12) == MAX_TOKENS


@pytest.mark.parametrize(("free_tokens", "expected"), [(4 * FIRST_TOKENS, 2 * FIRST_TOKENS), (1, FIRST_TOKENS)])
def test_it_never_runs_what_would_not_fit(free_tokens, expected):
    calls: list[int] = []
    measure = machine(1e9, 1000, calls)
    assert probe_token_budget(measure, free_bytes=free_tokens * 1000) == expected
    assert max(calls) == expected


def test_the_meter_counts_what_autograd_keeps_once_and_without_parameters():
    layer = torch.nn.Linear(16, 8, bias=False)
    inputs = torch.randn(100, 16)
    meter = ActivationMeter()
    with meter.running(layer.parameters(), lambda: None):
        hidden = layer(inputs)
        (hidden * hidden).sum().backward()
    assert meter.bytes == (100 * 16 + 100 * 8) * 4
    assert meter.seconds > 0


def test_a_size_that_runs_out_of_memory_ends_the_probe_at_the_size_before():
    def measure(tokens: int) -> tuple[float, int] | None:
        return None if tokens > 8 * FIRST_TOKENS else (1.0, 0)

    assert probe_token_budget(measure, free_bytes=1, max_tokens=MAX_GPU_TOKENS) == 8 * FIRST_TOKENS
    assert probe_token_budget(lambda _: None, free_bytes=1) == FIRST_TOKENS


def test_gpus_may_take_larger_micro_batches():
    assert probe_token_budget(machine(1e9, 1), free_bytes=10**12, max_tokens=MAX_GPU_TOKENS) == MAX_GPU_TOKENS
    measure = machine(1e9, 1000)
    assert probe_token_budget(measure, 4 * FIRST_TOKENS * 1000, MAX_GPU_TOKENS, memory_share=1.0) == 4 * FIRST_TOKENS


class SimulatedMemory:
    """A device's memory whose peaks are given."""

    def __init__(self, peaks: list[int]) -> None:
        self.peaks = peaks
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def peak(self) -> int:
        return self.peaks.pop(0)


def test_the_second_pass_of_a_size_is_the_one_that_counts(monkeypatch):
    times = iter([0.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("rlhf_critic.training.token_budget.time.perf_counter", lambda: next(times))
    runs: list[None] = []
    memory = SimulatedMemory([500, 300])
    assert measure_on_device(lambda: runs.append(None), memory, lambda failed: failed) == (1.0, 300)
    assert len(runs) == memory.resets == 2


def test_all_ranks_stop_together_when_one_of_them_runs_out_of_memory():
    def run_out() -> None:
        raise torch.OutOfMemoryError

    asked: list[bool] = []

    def on_any_rank(failed: bool) -> bool:
        asked.append(failed)
        return True

    memory = SimulatedMemory([1, 1])
    assert measure_on_device(run_out, memory, on_any_rank) is None
    assert measure_on_device(lambda: None, memory, on_any_rank) is None  # another rank failed
    assert asked == [True, False]
    with pytest.raises(RuntimeError, match="something else"):
        measure_on_device(lambda: (_ for _ in ()).throw(RuntimeError("something else")).__next__(), memory, bool)
