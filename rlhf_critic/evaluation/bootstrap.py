"""Bootstrap confidence intervals of means and other statistics. Knows only numbers.

Shape legend: P samples, K blocks of samples, B bootstrap resamples, C columns of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BOOTSTRAP_RESAMPLES = 2000
BOOTSTRAP_CHUNK = 100  # resamples at a time, so memory is bounded by 100 x `MAX_BLOCKS` numbers
# More samples than this are resampled in blocks, so that the cost of resampling is bounded.
MAX_BLOCKS = 2048
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


def blocks_of(num_samples: int, groups_P: IntArray | None = None) -> IntArray:
    """Returns the block of each sample, from 0, int64 ``[P]``. Blocks are what a bootstrap draws.

    Samples of one group depend on each other, such as the pairs of one ranking, so they are drawn together (the cluster
    bootstrap; Field and Welsh, 2007). Up to `MAX_BLOCKS` groups are blocks of their own. More are joined at random into
    `MAX_BLOCKS` blocks, which differ by at most one group in size. The sums of such blocks are independent and equally
    distributed, so resampling them gives the interval of resampling the groups, at a bounded cost.

    Args:
        num_samples: Number of samples.
        groups_P: Number of the group of each sample. None if each sample is a group.
    """
    group_P = np.arange(num_samples) if groups_P is None else np.unique(groups_P, return_inverse=True)[1]
    groups = int(group_P.max()) + 1
    if groups <= MAX_BLOCKS:
        return group_P
    return (np.random.default_rng(0).permutation(groups) % MAX_BLOCKS)[group_P]


def resample_sums(sums_CK: Sequence[FloatArray], seed: int = 0) -> FloatArray:
    """Draws K of K blocks with replacement and adds up each column, for each resample. Returns float64 ``[C, B]``."""
    rng = np.random.default_rng(seed)
    resamples = []
    for _ in range(BOOTSTRAP_RESAMPLES // BOOTSTRAP_CHUNK):
        drawn = rng.integers(0, len(sums_CK[0]), (BOOTSTRAP_CHUNK, len(sums_CK[0])))
        resamples.append(np.stack([sums_K[drawn].sum(axis=1) for sums_K in sums_CK]))
    return np.concatenate(resamples, axis=1)


def bootstrap_mean(sample_P: FloatArray, seed: int = 0, groups_P: IntArray | None = None) -> BootstrapEstimate:
    """Computes the mean of a sample and its percentile-bootstrap interval. For ``groups_P`` see `blocks_of`."""
    block_P = blocks_of(len(sample_P), groups_P)
    sums_K: FloatArray = np.bincount(block_P, sample_P).astype(np.float64)
    sizes_K = np.bincount(block_P).astype(np.float64)
    if (sizes_K == sizes_K[0]).all():
        (sums_B,) = resample_sums([sums_K], seed)
        return with_interval(float(sample_P.mean()), sums_B / (sizes_K[0] * len(sizes_K)))
    sums_B, sizes_B = resample_sums([sums_K, sizes_K], seed)
    return with_interval(float(sample_P.mean()), sums_B / sizes_B)


def bootstrap_statistic(
    statistic: Callable[[IntArray], float], size: int, groups_P: IntArray | None = None
) -> BootstrapEstimate:
    """Computes a statistic (a function of row indices) of ``size`` rows and its percentile-bootstrap interval.

    The statistic is computed for each resample. ``groups_P`` has the group of each row; groups are drawn whole.
    """
    rng = np.random.default_rng(0)
    if groups_P is None:
        values_B = np.array([statistic(rng.integers(0, size, size)) for _ in range(BOOTSTRAP_RESAMPLES)])
        return with_interval(statistic(np.arange(size)), values_B)
    group_P = np.unique(groups_P, return_inverse=True)[1]
    members = np.split(group_P.argsort(kind="stable"), np.bincount(group_P).cumsum()[:-1])
    draws = (rng.integers(0, len(members), len(members)) for _ in range(BOOTSTRAP_RESAMPLES))
    values_B = np.array([statistic(np.concatenate([members[group] for group in drawn])) for drawn in draws])
    return with_interval(statistic(np.arange(size)), values_B)


def with_interval(value: float, resampled_B: FloatArray) -> BootstrapEstimate:
    """Returns a statistic with the percentiles of its resampled values."""
    low, high = np.quantile(resampled_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return BootstrapEstimate(value, float(low), float(high))
