"""Length-controlled accuracy: a critic's accuracy if both sides of every preference were equally long.

Knows only numbers.

Shape legend: P preferences (pairs), F features of length, K blocks of pairs, B bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.evaluation.bootstrap import (
    MAX_BLOCKS,
    BootstrapEstimate,
    FloatArray,
    IntArray,
    blocks_of,
    bootstrap_statistic,
    resample_sums,
    wins,
    with_interval,
)

MIN_PREFERENCES = 30  # three coefficients are estimated; fewer preferences give noise
# Rewards are fp32. A critic that only counts tokens leaves only rounding errors, which must not decide.
ROUNDING = 1e-5


def length_controlled_accuracy(
    margin_P: FloatArray, lengths_P2: NDArray[np.int64], groups_P: IntArray | None = None
) -> BootstrapEstimate | None:
    """Computes accuracy after regressing the effect of length out of the margin.

    Dubois et al., "Length-Controlled AlpacaEval" (2024), regress a judge's verdict on the length difference
    ``tanh(d / std(d))`` and other terms, and predict it at a difference of zero. Here the critic is the judge, and its
    verdict is a number, the margin. So the regression is linear instead of logistic::

        margin = a + b * d / std(d) + c * tanh(d / std(d)) + rest        by least squares, d = chosen - rejected tokens

    The margin at equal lengths is ``a + rest``. The accuracy is the share of these that are positive; a tie counts
    half. The linear term exactly removes a critic that counts tokens. ``a``, the lead of the chosen side that length
    does not explain, keeps its credit even if longer sides are chosen more often. (A logistic regression of the human
    choice on the reward difference would remove the length bias of the humans and leave the critic's.)

    If better answers are longer for good reasons among the chosen or the rejected, that effect is removed too. Compare
    the result with the plain accuracy.

    Args:
        margin_P: Chosen minus rejected rewards.
        lengths_P2: Tokens of the chosen and the rejected side; a shared prompt cancels.
        groups_P: Group of each pair; see `rlhf_critic.evaluation.bootstrap.blocks_of`.

    Returns:
        The accuracy. None if there are fewer than `MIN_PREFERENCES` or all length differences are equal, because then
        the effect of length cannot be identified.
    """
    longer_P = (lengths_P2[:, 0] - lengths_P2[:, 1]).astype(np.float64)
    spread = longer_P.std()
    if len(margin_P) < MIN_PREFERENCES or spread == 0:
        return None
    length_PF = np.stack([longer_P / spread, np.tanh(longer_P / spread)], axis=1)
    smallest = ROUNDING * float(np.abs(margin_P).max())

    def fit(rows: IntArray | slice) -> FloatArray:
        centered_PF = length_PF[rows] - length_PF[rows].mean(axis=0)
        # The slopes solve the normal equations. The pseudo-inverse also serves a resample with only one difference.
        slopes_F: FloatArray = np.linalg.pinv(centered_PF.T @ centered_PF, hermitian=True) @ (
            centered_PF.T @ margin_P[rows]
        )
        return slopes_F

    def right(rows: IntArray | slice, slopes_F: FloatArray) -> FloatArray:
        controlled = margin_P[rows] - length_PF[rows] @ slopes_F
        return wins(np.where(np.abs(controlled) <= smallest, 0.0, controlled))

    if len(margin_P) <= MAX_BLOCKS:
        return bootstrap_statistic(lambda rows: float(right(rows, fit(rows)).mean()), len(margin_P), groups_P)
    every, block_P = slice(None), blocks_of(len(margin_P), groups_P)
    slopes_F = fit(every)
    right_P = right(every, slopes_F)
    right_B, slopes_BF = _resample(right_P, margin_P, length_PF, block_P)
    return with_interval(
        float(right_P.mean()),
        np.clip(
            right_B + _effect_of_slopes(slopes_BF - slopes_F, lambda shift_F: right(every, slopes_F + shift_F).mean()),
            0.0,
            1.0,
        ),
    )


def _resample(
    right_P: FloatArray, margin_P: FloatArray, length_PF: FloatArray, block_P: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Resamples sums over blocks. Returns the mean of ``right_P`` and the slopes of each resample, ``[B]``, ``[B, F]``.

    A least-squares fit depends on its data through sums alone, so that no resample reads all pairs.
    """
    first_P, second_P = length_PF.T
    columns = (
        *(right_P, margin_P, first_P, second_P, first_P * first_P, first_P * second_P, second_P * second_P),
        *(first_P * margin_P, second_P * margin_P),
    )
    sums_CK = [np.bincount(block_P, column_P).astype(np.float64) for column_P in (np.ones_like(right_P), *columns)]
    n, right, y, a, b, aa, ab, bb, ay, by = resample_sums(sums_CK)
    squares_BFF = np.stack([aa - a * a / n, ab - a * b / n, ab - a * b / n, bb - b * b / n], axis=1).reshape(-1, 2, 2)
    products_BF1 = np.stack([ay - a * y / n, by - b * y / n], axis=1)[:, :, None]
    return right / n, (np.linalg.pinv(squares_BFF, hermitian=True) @ products_BF1)[:, :, 0]


def _effect_of_slopes(shifts_BF: FloatArray, accuracy: Callable[[FloatArray], float]) -> FloatArray:
    """Returns the change of the accuracy by the shift of the slopes in each resample, to first order, ``[B]``.

    With many pairs the slopes of a resample are close to those of all pairs, and the accuracy changes linearly between
    them. Its slope is measured one standard deviation to both sides, along the principal axes of the shifts, because
    the two features of length are almost proportional.
    """
    variances_F, axes_FF = np.linalg.eigh(np.cov(shifts_BF, rowvar=False))
    effect_B = np.zeros(len(shifts_BF))
    for variance, axis_F in zip(variances_F, axes_FF.T, strict=True):
        deviation = math.sqrt(max(variance, 0.0))
        if deviation > 0:
            change = (accuracy(deviation * axis_F) - accuracy(-deviation * axis_F)) / 2
            effect_B += change * (shifts_BF @ axis_F) / deviation
    return effect_B
