"""Measures of values equal slow computations from their definitions."""

import math
import random

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms.value_metrics import explained_variance, mean_by_position, value_calibration
from tests.rlhf_critic.algorithms.definitions import (
    SEEDS,
    close,
    masked_numbers,
    random_like,
    random_mask,
    slow_moments,
)


@pytest.mark.parametrize("seed", SEEDS)
def test_explained_variance_equals_its_definition(seed):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    returns = random_like(mask)
    values = returns + random_like(mask, scale=0.5) + 1.0
    _, variance = slow_moments(masked_numbers(returns, mask))
    _, residual = slow_moments(masked_numbers(returns.double() - values.double(), mask))
    close(explained_variance(values, returns, mask), 1 - residual / variance)
    close(explained_variance(returns, returns, mask), 1.0)
    close(explained_variance(torch.zeros(mask.shape), returns, mask), 0.0)


def test_explained_variance_is_nan_where_returns_do_not_vary():
    mask = torch.ones(3, 100, dtype=torch.bool)
    # 0.1 is not a sum of powers of two, so a mean in fp32 would be inexact and the variance not 0
    assert explained_variance(torch.randn(3, 100), torch.full((3, 100), 0.1), mask).isnan()
    assert explained_variance(torch.randn(3, 100), torch.randn(3, 100), ~mask).isnan()
    assert explained_variance(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0).bool()).isnan()


@pytest.mark.parametrize("bins", [1, 3, 500])
@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_equals_a_loop_over_bins(seed, bins):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    values, returns = random_like(mask), random_like(mask)
    pairs = sorted(zip(masked_numbers(values, mask), masked_numbers(returns, mask), strict=True))
    sizes = [len(pairs) // bins + (number < len(pairs) % bins) for number in range(bins)]
    error, first = 0.0, 0
    calibration = value_calibration(values, returns, mask, bins)
    assert calibration.counts_B.tolist() == [size for size in sizes if size]
    for number, size in enumerate(size for size in sizes if size):
        part = pairs[first : first + size]
        first += size
        predicted, realised = (sum(column) / size for column in zip(*part, strict=True))
        assert calibration.predicted_B[number] == pytest.approx(predicted, abs=1e-6)
        assert calibration.realised_B[number] == pytest.approx(realised, abs=1e-6)
        error += size / len(pairs) * abs(predicted - realised)
    assert calibration.error == pytest.approx(error, abs=1e-6)
    assert value_calibration(returns, returns, mask, bins).error == 0.0


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_means_by_position_equal_a_loop_over_actions(seed, parts):
    torch.manual_seed(seed)
    mask = random_mask(random.Random(seed))
    x = random_like(mask)
    of_parts = [[] for _ in range(parts)]
    for s, row in enumerate(mask.tolist()):
        actions = [t for t, is_action in enumerate(row) if is_action]
        for number, t in enumerate(actions):
            of_parts[number * parts // len(actions)].append(x[s, t].item())
    means = mean_by_position(x, mask, parts)
    np.testing.assert_allclose(means, [np.mean(part) if part else math.nan for part in of_parts], rtol=1e-6)


def test_a_part_that_no_response_has_is_nan():
    one = torch.tensor([[True, False]])
    means = mean_by_position(torch.tensor([[2.0, math.nan]]), one, 4)
    assert means[0] == 2.0
    assert all(math.isnan(mean) for mean in means[1:])
