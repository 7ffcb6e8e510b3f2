"""Intervals cover as often as they say, for samples that are resampled in blocks and for pairs of rankings."""

from statistics import NormalDist

import numpy as np
import pytest

from rlhf_critic.evaluation import bootstrap, calibration, length_control
from rlhf_critic.evaluation.bootstrap import blocks_of, bootstrap_mean, bootstrap_statistic
from rlhf_critic.evaluation.calibration import reliability
from rlhf_critic.evaluation.length_control import length_controlled_accuracy
from rlhf_critic.evaluation.preferences import evaluate_rewards

TRIALS = 150


@pytest.fixture
def few_blocks(monkeypatch):
    """Makes samples of a thousand large, so that they are resampled in blocks."""
    for module in (bootstrap, calibration, length_control):
        monkeypatch.setattr(module, "MAX_BLOCKS", 200)


@pytest.mark.parametrize("share", [0.7, 0.99])
def test_a_mean_of_blocks_covers_as_often_as_it_says(few_blocks, share):
    rng = np.random.default_rng(0)
    estimates = [bootstrap_mean((rng.random(1990) < share).astype(float), seed) for seed in range(TRIALS)]
    covered = sum(one.low <= share <= one.high for one in estimates)
    assert 0.90 <= covered / TRIALS <= 0.99
    assert max(one.high for one in estimates) <= 1.0


def test_blocks_are_whole_groups_of_about_equal_size(few_blocks):
    groups = np.repeat(np.arange(500) * 7, 3)
    blocks = blocks_of(len(groups), groups)
    assert all(len(set(blocks[groups == group])) == 1 for group in np.unique(groups))
    assert set(np.bincount(blocks)) == {6, 9}
    assert blocks_of(120).tolist() == list(range(120))


def rankings(rng: np.random.Generator, rows: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples the results of pairs, those of one row being more often right or more often wrong."""
    rights = rng.random((rows, pairs)) < rng.beta(1.4, 0.6, rows)[:, None]  # 0.7 on average
    return rights.astype(float).ravel(), np.repeat(np.arange(rows), pairs)


@pytest.mark.parametrize("rows", [150, 800], ids=["rows", "blocks of rows"])
def test_pairs_of_a_ranking_are_resampled_together(few_blocks, rows):
    """Resampling pairs alone, as if they were independent, gives intervals that are too narrow."""
    rng = np.random.default_rng(1)
    covered = {"together": 0, "alone": 0}
    for _ in range(TRIALS):
        rights, row_of_pair = rankings(rng, rows, 10)
        for name, groups in (("together", row_of_pair), ("alone", None)):
            estimate = bootstrap_mean(rights, groups_P=groups)
            covered[name] += estimate.low <= 0.7 <= estimate.high
    assert 0.89 <= covered["together"] / TRIALS <= 0.99
    assert covered["alone"] / TRIALS < 0.80


def test_an_evaluation_of_rankings_has_wider_intervals_than_one_of_its_pairs():
    rng = np.random.default_rng(2)
    rights, rows = rankings(rng, 40, 6)
    margins, lengths = np.where(rights > 0, 1.0, -1.0), rng.integers(1, 99, (240, 2))
    alone, together = (evaluate_rewards(margins, np.zeros(240), lengths, rows_P=of) for of in (None, rows))
    for figure in ("accuracy", "log_loss", "length_controlled_accuracy"):
        narrow, wide = getattr(alone, figure), getattr(together, figure)
        assert narrow.mean == wide.mean
        assert wide.high - wide.low > 1.25 * (narrow.high - narrow.low)
    assert evaluate_rewards(margins, np.zeros(240), lengths, rows_P=np.arange(240)) == alone


def test_a_statistic_draws_groups_whole():
    groups = np.array([3, 1, 1, 3, 2])
    drawn: list[np.ndarray] = []
    bootstrap_statistic(lambda rows: drawn.append(rows) or float(len(rows)), 5, groups)
    for rows in drawn[:50]:
        counts = np.bincount(rows, minlength=5)
        assert counts[0] == counts[3]
        assert counts[1] == counts[2]


def with_length_bias(rng: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.exp(rng.normal(5, 0.8, (pairs, 2))).astype(int) + 1
    return rng.normal(0.8, 1.0, pairs) + 0.002 * (lengths[:, 0] - lengths[:, 1]), lengths


def test_length_control_in_blocks_has_the_interval_of_fitting_each_resample(few_blocks, monkeypatch):
    margins, lengths = with_length_bias(np.random.default_rng(3), 1500)
    of_blocks = length_controlled_accuracy(margins, lengths)
    monkeypatch.setattr(length_control, "MAX_BLOCKS", 1500)
    exact = length_controlled_accuracy(margins, lengths)
    assert of_blocks.mean == exact.mean
    width = exact.high - exact.low
    assert of_blocks.low == pytest.approx(exact.low, abs=0.2 * width)
    assert of_blocks.high == pytest.approx(exact.high, abs=0.2 * width)


def test_length_control_in_blocks_covers_as_often_as_it_says(few_blocks):
    truth, rng = NormalDist().cdf(0.8), np.random.default_rng(4)
    estimates = [length_controlled_accuracy(*with_length_bias(rng, 1000)) for _ in range(60)]
    assert sum(one.low <= truth <= one.high for one in estimates) / 60 >= 0.88


def test_a_critic_that_counts_tokens_is_a_coin_in_blocks_too(few_blocks):
    _, lengths = with_length_bias(np.random.default_rng(5), 1000)
    margins = (0.01 * lengths).astype(np.float32).astype(float)
    estimate = length_controlled_accuracy(margins[:, 0] - margins[:, 1], lengths)
    assert estimate.mean == pytest.approx(0.5, abs=0.01)
    assert estimate.low <= 0.5 <= estimate.high


def test_the_error_by_chance_of_many_is_that_of_a_simulation(monkeypatch):
    margins = np.random.default_rng(6).normal(0.5, 1.5, 1500)
    simulated = reliability(margins).error_by_chance
    monkeypatch.setattr(calibration, "MAX_BLOCKS", 1000)
    assert reliability(margins).error_by_chance == pytest.approx(simulated, rel=0.05)
