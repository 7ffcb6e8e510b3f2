"""Figures of uncertainty equal their definitions, and are right for critics whose uncertainty is known."""

import numpy as np
import pytest

from rlhf_critic.evaluation.uncertainty import auroc, evaluate_uncertainty


def test_the_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    pairs = [
        1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0
        for i in np.flatnonzero(positive)
        for j in np.flatnonzero(~positive)
    ]
    assert auroc(score, positive) == pytest.approx(np.mean(pairs))
    assert auroc(score, np.ones(40, bool)) is None


def test_known_uncertainty_finds_wrong_judgements_and_repairs_probabilities():
    rng = np.random.default_rng(1)
    truth = rng.normal(0, 2, 4000)
    std = rng.uniform(0.1, 5, 4000)
    measured = truth + std * rng.normal(size=4000)
    chosen_first = rng.random(4000) < 1 / (1 + np.exp(-truth))
    margin = np.where(chosen_first, measured, -measured)
    found = evaluate_uncertainty(margin, std, std, 1.0)
    assert found.log_loss_uncertain < found.log_loss_scaled == found.log_loss
    assert found.error_uncertain < found.error
    errors = [one.error.mean for one in found.error_by_quantile]
    assert errors[0] < min(errors[1:]) < max(errors[1:-1]) < errors[-1]
    assert [one.preferences for one in found.error_by_quantile] == [800] * 5
    assert found.auroc_std > 0.55
    assert found.auroc_probability > found.auroc_margin > 0.5
    noise = evaluate_uncertainty(margin, rng.permutation(std), std, 1.0)
    assert noise.auroc_std == pytest.approx(0.5, abs=0.03)
