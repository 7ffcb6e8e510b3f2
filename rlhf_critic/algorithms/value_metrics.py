"""Measures of a critic's values against the returns that followed: pure functions of numbers.

All functions compute in fp32 or better, and none changes its arguments. Entries where a mask is False are ignored, even
NaN.

Shape legend: S rollouts, L tokens of the longest response, A actions of all rollouts, B bins, P parts of a response.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.algorithms.ppo import mean_and_variance, same_shape


def explained_variance(values_SL: Tensor, returns_SL: Tensor, mask_SL: Tensor) -> Tensor:
    """Computes the share of the variance of returns that values explain: ``1 - Var(returns - values) / Var(returns)``.

    A perfect critic has 1, a constant 0; a negative number is worse than a constant. OpenAI baselines,
    ``common/math_util.py``.

    Args:
        values_SL: Values, ``[S, L]``.
        returns_SL: Returns, ``[S, L]``.
        mask_SL: Mask of the tokens that count, bool ``[S, L]``.

    Returns:
        A scalar, fp32; NaN if the returns do not vary or the mask is empty.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape("values and returns", values_SL.shape, returns_SL.shape)
    same_shape("values and mask", values_SL.shape, mask_SL.shape)
    _, variance = mean_and_variance(returns_SL, mask_SL)
    _, residual_variance = mean_and_variance(returns_SL.float() - values_SL.float(), mask_SL)
    return torch.where(variance > 0, 1.0 - residual_variance / variance, math.nan).float()


class Calibration(NamedTuple):
    """Predicted against realised returns, in bins of predictions with equal numbers of actions.

    Attributes:
        predicted_B: Mean value of each bin, float64, rising.
        realised_B: Mean return of each bin, float64.
        counts_B: Actions of each bin, int64; empty bins are left out.
    """

    predicted_B: NDArray[np.float64]
    realised_B: NDArray[np.float64]
    counts_B: NDArray[np.int64]

    @property
    def error(self) -> float:
        """Mean distance of predicted and realised returns over the bins, weighted by their actions.

        Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning" (2015), for returns.
        """
        return float(np.average(np.abs(self.predicted_B - self.realised_B), weights=self.counts_B))


def value_calibration(values_SL: Tensor, returns_SL: Tensor, mask_SL: Tensor, bins: int) -> Calibration:
    """Compares values with the returns that followed, over all actions.

    Args:
        values_SL: Values before the actions, ``[S, L]``.
        returns_SL: Realised returns: discounted sums of the rewards that followed, ``[S, L]``.
        mask_SL: Mask of the actions, bool ``[S, L]``.
        bins: Maximum number of bins. Equal values may fall into two of them.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape("values and returns", values_SL.shape, returns_SL.shape)
    same_shape("values and mask", values_SL.shape, mask_SL.shape)
    values_A, returns_A = (tensor.float()[mask_SL].double().numpy() for tensor in (values_SL, returns_SL))
    order_A = values_A.argsort(kind="stable")
    parts = [part for part in np.array_split(order_A, bins) if len(part)]
    predicted, realised = ([float(x_A[part].mean()) for part in parts] for x_A in (values_A, returns_A))
    counts = [len(part) for part in parts]
    return Calibration(np.array(predicted), np.array(realised), np.array(counts, dtype=np.int64))


def mean_by_position(x_SL: Tensor, mask_SL: Tensor, parts: int) -> list[float]:
    """Computes the mean over the actions in each part of their response, such as its quarters.

    Args:
        x_SL: Numbers, ``[S, L]``.
        mask_SL: Mask of the actions, bool ``[S, L]``.
        parts: Number of equal parts. Action i of n, counted from 0, is in part ``floor(i * parts / n)``.

    Returns:
        Mean of each part; NaN for a part without actions.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape("numbers and mask", x_SL.shape, mask_SL.shape)
    index_SL = mask_SL.cumsum(1) - 1
    parts_A = torch.div(index_SL * parts, mask_SL.sum(1, keepdim=True).clamp(min=1), rounding_mode="floor")[mask_SL]
    sums_P = torch.zeros(parts, dtype=torch.float64).index_add(0, parts_A, x_SL.float()[mask_SL].double())
    means_P = sums_P / torch.bincount(parts_A, minlength=parts)
    return [float(mean) for mean in means_P]
