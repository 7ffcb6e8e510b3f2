"""Losses of values against targets at some tokens: ratings, outcomes and steps. Know nothing about models or batches.

All functions compute in fp32, whatever the input dtype.

Shape legend: A targets of all responses, U responses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pointwise_loss(values_A: Tensor, targets_A: Tensor, is_rating_A: Tensor) -> Tensor:
    """Computes the loss of each value against its target.

    A rating gives the squared error ``(v - y)^2``, as in Wang et al., "HelpSteer2" (2024). A label gives the binary
    cross-entropy ``-y log sigmoid(v) - (1 - y) log sigmoid(-v)``. At the end of a response that is the outcome loss of
    Cobbe et al., "Training verifiers to solve math word problems" (2021). At the ends of steps it is the process loss
    of Lightman et al., "Let's verify step by step" (2023).

    Args:
        values_A: Values at the tokens of the targets, ``[A]``.
        targets_A: Ratings, or labels from 0 to 1, ``[A]``.
        is_rating_A: True for ratings, bool ``[A]``.

    Returns:
        Loss of each target, ``[A]``, fp32.

    Raises:
        ValueError: The shapes differ.
    """
    if not values_A.shape == targets_A.shape == is_rating_A.shape:
        shapes = [tuple(one.shape) for one in (values_A, targets_A, is_rating_A)]
        raise ValueError(f"values, targets and kinds differ in shape: {shapes}")
    values_A, targets_A = values_A.float(), targets_A.float()
    # A rating is no probability, so its cross-entropy is replaced by that of 0, which has no effect here.
    labels_A = targets_A.masked_fill(is_rating_A, 0.0)
    cross_entropy_A = F.binary_cross_entropy_with_logits(values_A, labels_A, reduction="none")
    return torch.where(is_rating_A, (values_A - targets_A).square(), cross_entropy_A)


def mean_of_units(loss_A: Tensor, units_A: Tensor, num_units: int) -> Tensor:
    """Computes the mean loss of the targets of each response, fp32 ``[U]``.

    Args:
        loss_A: Loss of each target.
        units_A: Response of each target, int64. Every response has at least one target.
        num_units: Number of responses, ``U``.
    """
    sums_U = loss_A.new_zeros(num_units).index_add(0, units_A, loss_A)
    counts_U = loss_A.new_zeros(num_units).index_add(0, units_A, torch.ones_like(loss_A))
    return sums_U / counts_U
