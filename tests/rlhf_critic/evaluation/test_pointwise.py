"""Figures of values against targets are those of their definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlhf_critic.algorithms.pointwise_losses import mean_of_units, pointwise_loss
from rlhf_critic.errors import NonFiniteRewardError
from rlhf_critic.evaluation.pointwise import area_under_roc, evaluate_pointwise, ranks

RNG = np.random.default_rng(5)


def test_losses_are_those_of_torch_and_units_have_equal_weight():
    values, targets = torch.randn(6, requires_grad=True), torch.tensor([2.5, 1.0, 0.0, 0.3, 4.0, 1.0])
    is_rating = torch.tensor([True, False, False, False, True, False])
    loss = pointwise_loss(values, targets, is_rating)
    for index in range(6):
        expected = F.mse_loss if is_rating[index] else F.binary_cross_entropy_with_logits
        assert loss[index].item() == pytest.approx(expected(values[index], targets[index]).item())
    units = torch.tensor([0, 1, 1, 1, 2, 1])
    means = mean_of_units(loss, units, 3)
    torch.testing.assert_close(means, torch.stack([loss[0], loss[[1, 2, 3, 5]].mean(), loss[4]]))
    means.sum().backward()
    assert torch.isfinite(values.grad).all()
    with pytest.raises(ValueError, match="differ in shape"):
        pointwise_loss(values, targets[:3], is_rating)


def test_area_is_the_share_of_pairs_in_order():
    values = RNG.integers(0, 6, 40).astype(float)  # with ties
    labels = RNG.random(40) < 0.4
    pairs = [float(a > b) + 0.5 * float(a == b) for a in values[labels] for b in values[~labels]]
    area = area_under_roc(values, labels)
    assert area.mean == pytest.approx(np.mean(pairs))
    assert 0 <= area.low < area.mean < area.high <= 1
    assert area_under_roc(values, np.ones(40, dtype=bool)) is None


def test_the_interval_of_an_area_holds_the_truth_as_often_as_it_says():
    # The area of two normal distributions, one standard deviation apart, is Phi(1 / sqrt(2)).
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = np.arange(120) % 2 == 0
        area = area_under_roc(rng.normal(size=120) + labels, labels)
        hits += area.low <= 0.7602 <= area.high
    assert 0.90 <= hits / 200 <= 0.99


def test_ranks_share_ties():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_ratings_are_compared_by_both_correlations():
    targets = RNG.normal(size=50)
    values = np.exp(targets)  # the same order, another scale
    found = evaluate_pointwise(["score"] * 50, targets[:, None], values[:, None], values)
    assert found.score.spearman.mean == pytest.approx(1.0)
    assert found.score.pearson.mean == pytest.approx(np.corrcoef(values, targets)[0, 1])
    assert found.score.squared_error.mean == pytest.approx(np.mean((values - targets) ** 2)) == found.log_loss.mean
    assert found.measure[0] == "Spearman correlation"
    constant = evaluate_pointwise(["score"] * 2, np.ones((2, 1)), np.array([[1.0], [2.0]]), np.ones(2))
    assert constant.score.spearman is None


def test_the_first_wrong_step_is_scored_as_processbench_does():
    targets = [[1, 1, 0], [1, 0], [1, 1], [1, 1], [0]]
    values = [[2, 1, -1], [-1, -1], [1, 2], [1, -2], [-3]]
    arrays = [[np.array(row, dtype=float) for row in rows] for rows in (targets, values)]
    found = evaluate_pointwise(["steps"] * 5, *arrays, np.zeros(5)).steps
    assert found.first_wrong_found.mean == pytest.approx(2 / 3)  # the second row's error is found too early
    assert found.correct_found.mean == pytest.approx(1 / 2)
    assert found.first_wrong_f1.mean == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    flat = np.concatenate(arrays[1]), np.concatenate(arrays[0])
    assert found.accuracy.mean == pytest.approx(np.mean((flat[0] > 0) == (flat[1] > 0.5)))
    losses = [
        F.binary_cross_entropy_with_logits(torch.tensor(value), torch.tensor(target)).item()
        for target, value in zip(*arrays, strict=True)
    ]
    assert found.log_loss.mean == pytest.approx(np.mean(losses))


def test_kinds_are_reported_apart_and_a_value_that_is_not_finite_is_refused():
    targets, values = [np.array([1.0]), np.array([0.0]), np.array([3.0])], [np.array([0.5])] * 3
    found = evaluate_pointwise(["label", "label", "score"], targets, values, np.array([0.5, 0.5, 0.5]))
    assert (found.label.rows, found.score.rows, found.steps) == (2, 1, None)
    assert found.label.accuracy.mean == 0.5
    with pytest.raises(NonFiniteRewardError):
        evaluate_pointwise(["score"], [np.ones(1)], [np.array([np.nan])], np.ones(1))
