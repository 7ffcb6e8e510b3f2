"""Length-controlled accuracy is correct for synthetic critics with known bias, and equals plain least squares."""

import math

import numpy as np
import pytest

from rlhf_critic.evaluation.length_control import length_controlled_accuracy
from rlhf_critic.evaluation.preferences import evaluate_rewards

P = 1500


def lengths_of(longer_wins: float, seed: int = 0) -> np.ndarray:
    """Samples lengths over two orders of magnitude; the longer side is chosen in a given share."""
    rng = np.random.default_rng(seed)
    sides = np.sort(np.exp(rng.normal(5, 0.8, (P, 2))).astype(int) + 1, axis=1)
    chosen_first = sides[:, ::-1]
    return np.where(rng.random(P)[:, None] < longer_wins, chosen_first, sides)


def difference(values: np.ndarray) -> np.ndarray:
    return values[:, 0] - values[:, 1]


def test_a_critic_that_counts_tokens_falls_to_a_coin():
    lengths = lengths_of(0.8)
    rewards = (0.01 * lengths).astype(np.float32)
    evaluation = evaluate_rewards(rewards[:, 0], rewards[:, 1], lengths)
    assert evaluation.accuracy.mean > 0.75
    assert evaluation.length_controlled_accuracy.mean == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("count", [np.sqrt, np.log])
def test_so_does_one_that_counts_them_less_and_less_with_noise(count):
    lengths = lengths_of(0.8)
    margin = difference(count(lengths.astype(float)))
    margin = margin + np.random.default_rng(1).normal(0, margin.std(), P)
    controlled = length_controlled_accuracy(margin, lengths)
    assert (margin > 0).mean() > 0.62
    assert controlled.low <= 0.5 <= controlled.high


def test_quality_keeps_its_credit_though_longer_sides_are_chosen():
    lengths = lengths_of(0.8)
    quality = np.random.default_rng(2).normal(0.8, 1.0, P)
    truth = (quality > 0).mean()
    for length_effect in (0.0, 0.02, -0.02):
        controlled = length_controlled_accuracy(quality + length_effect * difference(lengths), lengths)
        assert controlled.mean == pytest.approx(truth, abs=0.02)
        assert controlled.low <= truth <= controlled.high


def test_it_equals_least_squares_by_the_book():
    lengths = lengths_of(0.7)[:60]
    margin = np.random.default_rng(3).normal(0.3, 1.0, 60) + 0.002 * difference(lengths)
    longer = difference(lengths).astype(float)
    deviation = math.sqrt(sum((d - longer.mean()) ** 2 for d in longer) / 60)
    rows = [[1.0, d / deviation, math.tanh(d / deviation)] for d in longer]
    coefficients, *_ = np.linalg.lstsq(np.array(rows), margin, rcond=None)
    right = 0.0
    for row, one in zip(rows, margin, strict=True):
        rest = one - sum(c * x for c, x in zip(coefficients, row, strict=True))
        at_equal_lengths = coefficients[0] + rest
        right += 1.0 if at_equal_lengths > 0 else 0.0
    assert length_controlled_accuracy(margin, lengths).mean == pytest.approx(right / 60)


def test_where_length_cannot_be_told_from_the_rest_there_is_no_figure():
    margin = np.random.default_rng(0).normal(size=40)
    assert length_controlled_accuracy(margin, np.array([[9, 4]] * 40)) is None
    assert length_controlled_accuracy(margin[:20], lengths_of(0.5)[:20]) is None
