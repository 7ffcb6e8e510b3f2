"""What a critic's accuracy would be if both sides of every preference had the same length. Knows only numbers.

Shape legend: P preferences, F features of length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.evaluation.bootstrap import BootstrapEstimate, FloatArray, bootstrap_statistic, wins

FEWEST_PREFERENCES = 30  # three coefficients are fitted; below this they would be noise
# Rewards are fp32. Of a critic that only counts tokens nothing but rounding is left, and that must not decide.
ROUNDING = 1e-5


def length_controlled_accuracy(
    margin_P: FloatArray, lengths_P2: NDArray[np.int64], seed: int = 0
) -> BootstrapEstimate | None:
    """Accuracy after the effect of length on the margin is regressed out.

    Dubois et al., "Length-Controlled AlpacaEval" (2024), regress a judge's verdict on the length difference
    ``tanh(d / std(d))`` beside what is to be measured, and predict it at a difference of zero. Here the judge is the
    critic, and its verdict is a number, the margin; so the regression is linear instead of logistic::

        margin = a + b * d / std(d) + c * tanh(d / std(d)) + rest        by least squares, d = chosen - rejected tokens

    and the margin at equal lengths is ``a + rest``; the accuracy is the share of these that are positive, a tie half.
    The linear term removes a critic that counts tokens exactly. ``a``, the lead of the chosen side that length does not
    explain, keeps its credit though longer sides are chosen more often. (To put the reward difference into a logistic
    regression of who was chosen would remove the length bias of those who chose and leave the critic's.)

    Where better answers are longer for good reasons within the chosen or the rejected, that is removed as well: read it
    beside the plain accuracy.

    Args:
        margin_P: Chosen minus rejected reward.
        lengths_P2: Tokens of the chosen and the rejected side; a shared prompt cancels.
        seed: Of the bootstrap, which fits again in every resample.

    Returns:
        None where there are fewer than `FEWEST_PREFERENCES` or all length differences are equal, so that the effect of
        length cannot be told from the rest.
    """
    longer_P = (lengths_P2[:, 0] - lengths_P2[:, 1]).astype(np.float64)
    spread = longer_P.std()
    if len(margin_P) < FEWEST_PREFERENCES or spread == 0:
        return None
    length_PF = np.stack([longer_P / spread, np.tanh(longer_P / spread)], axis=1)
    smallest = ROUNDING * float(np.abs(margin_P).max())

    def accuracy(rows: NDArray[np.int64]) -> float:
        controlled = control(margin_P[rows], length_PF[rows])
        return float(wins(np.where(np.abs(controlled) <= smallest, 0.0, controlled)).mean())

    return bootstrap_statistic(accuracy, len(margin_P), seed)


def control(margin_P: FloatArray, length_PF: FloatArray) -> FloatArray:
    """The margins less what length explains of them: the residuals of least squares, plus its intercept."""
    centered_PF = length_PF - length_PF.mean(axis=0)
    # The slopes solve the normal equations; a resample may hold one length difference only, hence the pseudo-inverse.
    slopes_F = np.linalg.pinv(centered_PF.T @ centered_PF, hermitian=True) @ (centered_PF.T @ margin_P)
    return margin_P - length_PF @ slopes_F
