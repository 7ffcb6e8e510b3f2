"""Every loss equals a slow computation from its definition, in fp32, also where the naive formula overflows."""

import math

import pytest
import torch

from rlhf_critic.algorithms.preference_losses import (
    bradley_terry_loss,
    centering_penalty,
    per_token_loss,
    plackett_luce_loss,
)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_bradley_terry_equals_the_definition():
    chosen, rejected = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([0.5, 1.0, 0.3])
    expected = [-log_sigmoid(c - r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected, rel=1e-6)


def test_margin_and_label_smoothing_equal_their_definitions():
    chosen, rejected, margins = [1.0, -2.0, 0.3], [0.5, 1.0, 0.3], [0.0, 0.7, 2.0]
    loss = bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected), torch.tensor(margins), 0.1)
    expected = []
    for c, r, m in zip(chosen, rejected, margins, strict=True):
        advantage = c - r - m
        expected.append(-0.9 * log_sigmoid(advantage) - 0.1 * log_sigmoid(-advantage))
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_stays_finite_and_fp32():
    loss = bradley_terry_loss(torch.tensor([-500.0], dtype=torch.bfloat16), torch.tensor([500.0], dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1000.0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="margins"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), torch.zeros(3))


# chosen and rejected token ids that diverge in the middle, at once, never; a prefix of the other; one token
TOKEN_PAIRS = [
    ([1, 2, 3, 4], [1, 2, 5]),
    ([1, 2], [3, 4, 5]),
    ([1, 2, 3], [1, 2, 3]),
    ([1, 2, 3], [1, 2, 3, 4, 5]),
    ([7], [8]),
]


def test_per_token_equals_a_loop_over_tokens():
    torch.manual_seed(0)
    longest = 6
    values = torch.randn(2, len(TOKEN_PAIRS), longest, dtype=torch.float32, requires_grad=True)
    divergences, expected = [], []
    for row, (chosen, rejected) in enumerate(TOKEN_PAIRS):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        divergences.append(shared)
        end = max(len(chosen), len(rejected))
        losses = []
        for t in range(min(shared, end - 1), end):
            c = values[0, row, min(t, len(chosen) - 1)].item()
            r = values[1, row, min(t, len(rejected) - 1)].item()
            losses.append(-log_sigmoid(c - r))
        expected.append(sum(losses) / len(losses))
    lengths = [torch.tensor([len(pair[side]) for pair in TOKEN_PAIRS]) for side in (0, 1)]
    loss = per_token_loss(values[0], values[1], torch.tensor(divergences), *lengths)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    loss.sum().backward()
    for row, pair in enumerate(TOKEN_PAIRS):
        for side, ids in enumerate(pair):
            assert not values.grad[side, row, len(ids) :].any(), "a token past the end has a say"


def test_plackett_luce_equals_the_definition():
    rankings = [[2.0, 1.0, -1.0], [0.5, 0.7], [0.0, 3.0, 1.0, -2.0]]
    rewards, present = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4, dtype=torch.bool)
    with torch.no_grad():
        for row, ranking in enumerate(rankings):
            rewards[row, : len(ranking)] = torch.tensor(ranking)
            present[row, : len(ranking)] = True
    expected = [
        -sum(
            math.log(math.exp(ranking[place]) / sum(math.exp(reward) for reward in ranking[place:]))
            for place in range(len(ranking))
        )
        for ranking in rankings
    ]
    loss = plackett_luce_loss(rewards, present)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    loss.sum().backward()
    assert torch.isfinite(rewards.grad).all()
    assert not rewards.grad[~present].any()


def test_a_ranking_of_two_is_a_preference():
    rewards = torch.tensor([[1.0, -0.5], [-300.0, 300.0]])
    present = torch.ones(2, 2, dtype=torch.bool)
    torch.testing.assert_close(
        plackett_luce_loss(rewards, present), bradley_terry_loss(rewards[:, 0], rewards[:, 1]), rtol=1e-6, atol=1e-6
    )


def test_centering_is_the_squared_sum_of_a_pair():
    rewards = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])
    present = torch.tensor([[True, True, False], [True, True, True]])
    assert centering_penalty(rewards, present).tolist() == pytest.approx([9.0, 64.0])
