"""The probe stops when more tokens give no gain or do not fit in memory."""

import pytest
import torch

from rlhf_critic.training.token_budget import FIRST_TOKENS, MAX_TOKENS, ActivationMeter, probe_token_budget


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
