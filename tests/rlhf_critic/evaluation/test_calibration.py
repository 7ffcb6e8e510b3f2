"""Calibration equals slow sums from its definition and is correct for critics with known probabilities."""

import math
from itertools import pairwise

import numpy as np
import pytest

from rlhf_critic.evaluation.calibration import BINS, calibrate, fit_temperature, reliability

MARGINS = np.array([2.0, 0.3, -0.1, -1.2, 0.0, 0.05, 4.0, -0.35, 30.0])


def drawn_margins(scale: float, size: int = 4000) -> np.ndarray:
    """Samples margins that are calibrated after division by ``scale``."""
    rng = np.random.default_rng(0)
    sizes = np.abs(rng.normal(0, 1.5, size))
    right = rng.random(size) < 1 / (1 + np.exp(-sizes))
    return scale * np.where(right, sizes, -sizes)


def test_the_error_equals_a_slow_sum_over_both_readings():
    # Counts every preference in both readings, in mirrored bins of the probability.
    readings = []
    for margin in MARGINS:
        p = 1 / (1 + math.exp(-margin))
        won = 1.0
        readings += [(p, won), (1 - p, 1 - won)]
    edges = [k / (2 * BINS) for k in range(2 * BINS + 1)]
    total = 0.0
    for k, (low, high) in enumerate(pairwise(edges)):
        # The mirror image of a bin closed below is closed above. A probability of one half counts half in each.
        if k >= BINS:
            inside = [(p, y, 0.5 if p == 0.5 else 1.0) for p, y in readings if low <= p < high or (p == high == 1.0)]
        else:
            inside = [(p, y, 0.5 if p == 0.5 else 1.0) for p, y in readings if low < p <= high]
        if inside:
            total += abs(sum(w * (y - p) for p, y, w in inside))
    assert reliability(MARGINS).error == pytest.approx(total / len(readings))


def test_bins_hold_every_preference_once():
    bins = reliability(MARGINS).bins
    assert sum(one.preferences for one in bins) == len(MARGINS)
    for one in bins:
        inside = [
            m for m in MARGINS if one.low <= 1 / (1 + math.exp(-abs(m))) < one.high or (one.high == 1.0 and m == 30)
        ]
        assert one.preferences == len(inside)
        assert one.confidence == pytest.approx(np.mean([1 / (1 + math.exp(-abs(m))) for m in inside]))
        assert one.accuracy == pytest.approx(np.mean([1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in inside]))


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_the_temperature_of_a_known_critic_is_found_and_mends_it(scale):
    calibration = calibrate(drawn_margins(scale))
    assert calibration.temperature == pytest.approx(scale, rel=0.08)
    assert calibration.scaled.error < 2 * calibration.scaled.error_by_chance
    assert calibration.scaled.log_loss <= calibration.raw.log_loss
    assert (calibration.raw.error > 3 * calibration.raw.error_by_chance) == (scale != 1.0)


def test_the_temperature_is_the_most_likely_of_a_fine_grid():
    grid = np.exp(np.linspace(-3, 4, 7001))
    losses = [np.logaddexp(0, -MARGINS / temperature).mean() for temperature in grid]
    assert fit_temperature(MARGINS) == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)


def test_luck_alone_is_what_calibrated_critics_show_on_average():
    errors, expected = [], []
    for seed in range(30):
        sizes = np.abs(np.random.default_rng(seed).normal(0, 1.5, 150))
        right = np.random.default_rng(seed + 100).random(150) < 1 / (1 + np.exp(-sizes))
        found = reliability(np.where(right, sizes, -sizes))
        errors.append(found.error)
        expected.append(found.error_by_chance)
    assert np.mean(errors) == pytest.approx(np.mean(expected), rel=0.1)


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, 0.5], [0.0, 0.0], [-1.0, 1.0]])
def test_without_a_most_likely_temperature_there_is_none(margins):
    calibration = calibrate(np.array(margins))
    assert calibration.temperature is None
    assert calibration.scaled is None
