"""Length-controlled accuracy: a critic's accuracy if both sides of every preference were equally long.

Knows only numbers.

Shape legend: P preferences, F features of length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.evaluation.bootstrap import BootstrapEstimate, FloatArray, bootstrap_statistic, wins

MIN_PREFERENCES = 30  # three coefficients are estimated; fewer preferences give noise
# Rewards are fp32. A critic that only counts tokens leaves only rounding errors, which must not decide.
ROUNDING = 1e-5


def length_controlled_accuracy(margin_P: FloatArray, lengths_P2: NDArray[np.int64]) -> BootstrapEstimate | None:
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

    def accuracy(rows: NDArray[np.int64]) -> float:
        centered_PF = length_PF[rows] - length_PF[rows].mean(axis=0)
        # The slopes solve the normal equations. The pseudo-inverse also serves a resample with only one difference.
        slopes_F = np.linalg.pinv(centered_PF.T @ centered_PF, hermitian=True) @ (centered_PF.T @ margin_P[rows])
        controlled = margin_P[rows] - length_PF[rows] @ slopes_F
        return float(wins(np.where(np.abs(controlled) <= smallest, 0.0, controlled)).mean())

    return bootstrap_statistic(accuracy, len(margin_P))
