"""The loss of a micro-batch of preferences, computed from a critic's outputs.

Applies `rlhf_critic.algorithms.preference_losses` to sequences in batch order: preference by preference, the best
response first. Knows nothing about ranks, optimizers or DeepSpeed.

Shape legend: P preferences, K responses of a ranking, C comparisons of a ranking, S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.algorithms.preference_losses import centering_penalty, per_token_loss, ranking_loss
from rlhf_critic.batching.device_copy import copy_to_device
from rlhf_critic.batching.prefix_tree import TokenIds, shared_length
from rlhf_critic.config.train import TrainConfig


@dataclass(frozen=True, eq=False)
class PreferenceLoss:
    """Losses and rewards of preferences.

    Attributes:
        loss_P: Loss of each preference, fp32, with gradient.
        rewards_PK: Rewards, the best response first, fp32; 0 where a response is absent.
        present_PK: True where a response exists, bool.
    """

    loss_P: Tensor
    rewards_PK: Tensor
    present_PK: Tensor

    @torch.no_grad()
    def sums(self) -> Tensor:
        """Returns two sums over the preferences, float64 ``[2]``.

        The first sums the share of correctly ordered pairs, where a tie counts half. The second sums the best reward
        minus the worst.
        """
        number = self.rewards_PK.shape[1]
        better_C, worse_C = torch.triu_indices(number, number, 1, device=self.rewards_PK.device)
        right_PC = ((self.rewards_PK[:, better_C] - self.rewards_PK[:, worse_C]).sign() + 1) / 2
        counted_PC = self.present_PK[:, worse_C]  # if the worse response is present, so is the better one
        right_P = (right_PC * counted_PC).sum(1) / counted_PC.sum(1)
        worst_P = self.rewards_PK.gather(1, self.present_PK.sum(1, keepdim=True) - 1)[:, 0]
        return torch.stack([right_P.sum(), (self.rewards_PK[:, 0] - worst_P).sum()]).double()


def needs_values(options: TrainConfig) -> bool:
    """Returns whether the loss reads values at every token, ``[S, L]``, instead of rewards, ``[S]``."""
    return options.loss == "per_token"


def preference_loss(
    output: Tensor, preferences: Sequence[Sequence[TokenIds]], margins_P: NDArray[np.float32], options: TrainConfig
) -> PreferenceLoss:
    """Computes the losses of preferences.

    Args:
        output: Rewards ``[S]`` or, if `needs_values`, values ``[S, L]`` of all responses, preference by preference.
        preferences: Token ids of the responses of each preference, the best first.
        margins_P: Margins between best and worst response. NaN means unknown and requires ``margin_scale`` 0.
        options: Loss options.
    """
    sizes_P = np.array([len(responses) for responses in preferences])
    exists_PK = np.arange(sizes_P.max()) < sizes_P[:, None]
    lengths = [len(ids) for responses in preferences for ids in responses]
    shared = [shared_length(np.asarray(pair[0]), np.asarray(pair[1])) for pair in preferences if needs_values(options)]
    # In row-major order, places where a response exists are in the order of the sequences.
    places_S = np.flatnonzero(exists_PK)
    on_host = [torch.from_numpy(exists_PK), *map(torch.tensor, (places_S, lengths, shared, margins_P))]
    present_PK, places, lengths_S, shared_P, margins = copy_to_device(on_host, output.device)
    rewards_S = output.gather(1, lengths_S[:, None] - 1)[:, 0] if needs_values(options) else output
    rewards_PK = torch.zeros(present_PK.numel(), device=output.device).index_copy(0, places, rewards_S)
    rewards_PK = rewards_PK.view(present_PK.shape)
    if needs_values(options):
        loss_P = per_token_loss(
            output[::2], output[1::2], shared_P, lengths_S[::2], lengths_S[1::2], options.label_smoothing
        )
    else:
        scaled_P = margins * options.margin_scale if options.margin_scale else None
        loss_P = ranking_loss(rewards_PK, present_PK, scaled_P, options.label_smoothing)
    if options.centering_coefficient:
        loss_P = loss_P + options.centering_coefficient * centering_penalty(rewards_PK, present_PK)
    return PreferenceLoss(loss_P, rewards_PK, present_PK)
