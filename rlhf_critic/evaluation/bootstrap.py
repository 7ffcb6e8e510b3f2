"""Bootstrap confidence intervals of means and other statistics. Knows only numbers.

Shape legend: P samples, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BOOTSTRAP_RESAMPLES = 2000
BOOTSTRAP_CHUNK = 100  # resamples at a time, so memory is bounded by 100 x P numbers
CONFIDENCE = 0.95


@dataclass(frozen=True)
class BootstrapEstimate:
    """A mean and its 95% percentile-bootstrap interval (Efron, 1979)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wins(difference_P: FloatArray) -> FloatArray:
    """Returns 1 for positive, 0 for negative and 0.5 for zero differences."""
    return (np.sign(difference_P) + 1.0) / 2.0


def bootstrap_mean(sample_P: FloatArray, seed: int = 0) -> BootstrapEstimate:
    """Computes the mean of a sample and its percentile-bootstrap interval."""
    rng = np.random.default_rng(seed)
    means_B = np.concatenate(
        [
            sample_P[rng.integers(0, len(sample_P), (BOOTSTRAP_CHUNK, len(sample_P)))].mean(axis=1)
            for _ in range(BOOTSTRAP_RESAMPLES // BOOTSTRAP_CHUNK)
        ]
    )
    return _with_interval(float(sample_P.mean()), means_B)


def bootstrap_statistic(statistic: Callable[[NDArray[np.int64]], float], size: int) -> BootstrapEstimate:
    """Computes a statistic (a function of row indices) of ``size`` rows and its percentile-bootstrap interval."""
    rng = np.random.default_rng(0)
    values_B = np.array([statistic(rng.integers(0, size, size)) for _ in range(BOOTSTRAP_RESAMPLES)])
    return _with_interval(statistic(np.arange(size)), values_B)


def _with_interval(value: float, resampled_B: FloatArray) -> BootstrapEstimate:
    low, high = np.quantile(resampled_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return BootstrapEstimate(value, float(low), float(high))
