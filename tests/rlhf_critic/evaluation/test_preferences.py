"""Every figure of an evaluation equals a slow computation from its definition."""

import json
import math

import numpy as np
import pytest

from rlhf_critic.errors import NonFiniteRewardError
from rlhf_critic.evaluation.preferences import bootstrap_mean, evaluate_rewards


def test_figures_equal_their_definitions():
    chosen, rejected = [1.0, 0.0, 2.0, -1.0], [0.0, 0.0, 3.0, -2.0]
    lengths = np.array([[5, 3], [2, 2], [1, 9], [4, 6]])
    evaluation = evaluate_rewards(chosen, rejected, lengths)
    assert evaluation.preferences == 4
    assert evaluation.accuracy.mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert evaluation.length_baseline.mean == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert evaluation.accuracy_where_shorter_wins.mean == pytest.approx((0 + 1) / 2)
    assert evaluation.margin.mean == pytest.approx((1 + 0 - 1 + 1) / 4)
    losses = [math.log(1 + math.exp(-(c - r))) for c, r in zip(chosen, rejected, strict=True)]
    assert evaluation.log_loss.mean == pytest.approx(sum(losses) / 4)
    assert evaluation.reward_mean == pytest.approx(np.mean(chosen + rejected))
    assert evaluation.reward_std == pytest.approx(np.std(chosen + rejected))


def test_without_shorter_winners_there_is_no_such_accuracy():
    assert evaluate_rewards([1.0], [0.0], np.array([[4, 2]])).accuracy_where_shorter_wins is None


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = bootstrap_mean((rng.random(120) < 0.7).astype(float), seed=trial)
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.90 <= covered / 200 <= 0.99


def test_bad_rewards_are_refused():
    with pytest.raises(NonFiniteRewardError, match=r"1 of 2 preferences .* number 2"):
        evaluate_rewards([1.0, math.nan], [0.0, 0.0], np.ones((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="P > 0"):
        evaluate_rewards([], [], np.ones((0, 2), dtype=np.int64))


def test_subsets_are_judged_by_themselves_the_largest_first():
    chosen, rejected = [1.0, 0.0, 2.0, -1.0, 0.0], [0.0, 1.0, 3.0, -2.0, 0.0]
    lengths = np.array([[5, 3], [2, 9], [1, 9], [4, 6], [7, 7]])
    subsets = np.array(["b", "a", "a", "", "a"])
    found = evaluate_rewards(chosen, rejected, lengths, subsets_P=subsets).subsets
    assert [(one.name, one.preferences) for one in found] == [("a", 3), ("", 1), ("b", 1)]
    assert [one.accuracy.mean for one in found] == pytest.approx([(0 + 0 + 0.5) / 3, 1, 1])
    assert [one.length_baseline.mean for one in found] == pytest.approx([(0 + 0 + 0.5) / 3, 0, 1])
    alone = evaluate_rewards(chosen[1:3], rejected[1:3], lengths[1:3])
    assert alone.subsets == ()
    assert evaluate_rewards(chosen, rejected, lengths, subsets_P=np.array([""] * 5)).subsets == ()


def test_an_evaluation_survives_json():
    rng = np.random.default_rng(0)
    evaluation = evaluate_rewards(
        rng.normal(size=50), rng.normal(size=50), rng.integers(1, 99, (50, 2)), subsets_P=np.array(["a", "b"] * 25)
    )
    assert json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))["subsets"][0]["preferences"] == 25
