"""One optimizer step on the response tokens of rollouts, for the critic and the policy of PPO.

Knows nothing about the loss: the caller computes it for each response token.

Shape legend: R response tokens of one rollout, A response tokens of a micro-batch, U rollouts of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.algorithms.ppo_losses import LossMean, token_weights
from rlhf_critic.algorithms.response_tokens import (
    Masks,
    ResponseTokens,
    action_counts,
    nonempty_responses,
    validate_rollouts,
)
from rlhf_critic.batching.device_copy import copy_to_device
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.model.backbone import Batch
from rlhf_critic.training.engine import MicroBatchLoss, StepResult, TrainingEngine


class TokensOnDevice(NamedTuple):
    """`rlhf_critic.algorithms.response_tokens.ResponseTokens` on a device."""

    rows_A: Tensor
    columns_A: Tensor
    drawn_A: Tensor


def copy_tokens(
    tokens: ResponseTokens, device: torch.device, numbers: Sequence[NDArray[np.floating]] = ()
) -> tuple[TokensOnDevice, list[Tensor]]:
    """Copies response tokens and numbers of each, as fp32, to a device together."""
    places = [torch.from_numpy(array) for array in (tokens.rows_A, tokens.columns_A, tokens.drawn_A)]
    numbers_A = [torch.from_numpy(array).float() for array in numbers]
    rows_A, columns_A, drawn_A, *copied = copy_to_device([*places, *numbers_A], device)
    return TokensOnDevice(rows_A, columns_A, drawn_A), copied


def take_rollout_step(
    training: TrainingEngine,
    sequences: Sequence[TokenIds],
    prompt_lengths: Sequence[int],
    numbers: Mapping[str, Sequence[NDArray[np.floating]]],
    loss_of: Callable[[Batch, TokensOnDevice, Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]],
    seed: int,
    masks: Masks | None = None,
    mean: LossMean = "token",
) -> tuple[StepResult, list[float]]:
    """Takes one optimizer step on the mean loss of all response tokens.

    The last response token of a rollout, and what follows it, is not computed, because no loss reads an output there.
    Rollouts with an empty response add nothing.

    Args:
        training: The engine that takes the step.
        sequences: Token ids of prompt and response, the same on every rank.
        prompt_lengths: Tokens of each prompt, at least 1.
        numbers: By name, one number for each response token of each rollout, ``[R]``.
        loss_of: Computes, for a batch and its response tokens, their losses ``[A]`` and further tensors ``[A]`` to
            average. It gets ``numbers`` of the batch as fp32 tensors ``[A]``, in their order.
        seed: Random seed of dropout.
        masks: True at the response tokens that the policy sampled, bool ``[R]`` each; None if it sampled all. The other
            tokens are read as context, and have no loss.
        mean: Mean of the losses and of the further tensors; see `rlhf_critic.algorithms.ppo_losses.token_weights`.

    Returns:
        The result, and the mean of each further tensor over all response tokens.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, or no rollout has a response token.
        NonFiniteLossError: The loss is NaN or infinite (the step was not taken), or the gradient is.
    """
    validate_rollouts(sequences, prompt_lengths, masks, **numbers)
    trained = nonempty_responses(sequences, prompt_lengths, masks)
    if not trained:
        raise ValueError("no rollout has a response token: there is nothing to train on")
    counts = action_counts(sequences, prompt_lengths, masks)
    weights = token_weights([counts[row] for row in trained], mean)

    def loss_of_units(batch: Batch, units: Sequence[int]) -> MicroBatchLoss:
        rows = [trained[unit] for unit in units]
        of_rows = None if masks is None else [masks[row] for row in rows]
        on_host = ResponseTokens.of([sequences[row] for row in rows], [prompt_lengths[row] for row in rows], of_rows)
        of_tokens = [np.concatenate([array[row] for row in rows]) for array in numbers.values()]
        if of_rows is not None:
            mask_A = np.concatenate(of_rows)
            of_tokens = [array[mask_A] for array in of_tokens]
        if weights is not None:
            of_tokens.append(np.repeat([weights[unit] for unit in units], [counts[row] for row in rows]))
        tokens, numbers_A = copy_tokens(on_host, training.device, of_tokens)
        loss_A, averaged = loss_of(batch, tokens, numbers_A[: len(numbers)])
        if weights is not None:
            loss_A, averaged = loss_A * numbers_A[-1], [tensor * numbers_A[-1] for tensor in averaged]
        loss_U = loss_A.new_zeros(len(rows)).index_add(0, tokens.rows_A, loss_A)
        return MicroBatchLoss(loss_U, torch.stack([tensor.detach().double().sum() for tensor in averaged]))

    def read(row: int) -> TokenIds:
        last = len(sequences[row]) - 1
        if masks is not None:
            last = prompt_lengths[row] + int(np.flatnonzero(masks[row])[-1])
        return sequences[row][:last]

    count = sum(counts)
    result, sums = training.take_step(
        training.prepare([[read(row)] for row in trained]),
        loss_of_units,
        denominator=count,
        tokens=sum(len(ids) for ids in sequences),
        seed=seed,
        name_of=lambda unit: f"rollout {trained[unit]}",
    )
    return result, [number / count for number in sums]
