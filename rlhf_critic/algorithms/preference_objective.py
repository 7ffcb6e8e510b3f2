"""The loss of a micro-batch of preferences and pointwise rows, computed from a critic's outputs.

Applies `rlhf_critic.algorithms.preference_losses` to sequences in batch order: preference by preference, the best
response first. `blended_loss` adds rows with targets (`rlhf_critic.algorithms.pointwise_losses`). Knows nothing about
ranks, optimizers or DeepSpeed.

Shape legend: P preferences, K responses of a ranking, C comparisons of a ranking, S sequences, L longest sequence, U
rows of both kinds, A targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.algorithms.pointwise_losses import mean_of_units, pointwise_loss
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


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of the single response of a pointwise row.

    Attributes:
        kind: ``score``, ``label`` or ``steps``.
        targets_A: Targets, fp32; at least one.
        tokens_A: Index of the token of each target, int32.
    """

    kind: str
    targets_A: NDArray[np.float32]
    tokens_A: NDArray[np.int32]


def reads_values(options: TrainConfig, targets: Sequence[Targets | None]) -> bool:
    """Returns whether the loss of these rows reads values at every token instead of rewards; see `needs_values`."""
    return needs_values(options) or any(one is not None and one.kind == "steps" for one in targets)


def blended_loss(
    output: Tensor,
    rows: Sequence[Sequence[TokenIds]],
    targets: Sequence[Targets | None],
    margins_U: NDArray[np.float32],
    options: TrainConfig,
) -> tuple[Tensor, Tensor]:
    """Computes the losses of preferences and pointwise rows.

    A pointwise row has the mean loss of its targets, times the weight of its kind.

    Args:
        output: Rewards ``[S]`` or, if `reads_values`, values ``[S, L]`` of all responses, row by row.
        rows: Token ids of the responses of each row, the best first.
        targets: Targets of each row; None for a preference.
        margins_U: See `preference_loss`.
        options: Loss options.

    Returns:
        The loss of each row ``[U]``, fp32, and four sums over the rows, float64 ``[4]``: those of
        `PreferenceLoss.sums`, the share of labels on whose side the value is (a value of 0 counts half), and the
        number of rows with labels.
    """
    firsts_U = np.cumsum([0, *(len(responses) for responses in rows)])[:-1]
    pairs = [index for index, one in enumerate(targets) if one is None]
    loss_U, sums = output.new_zeros(len(rows), dtype=torch.float32), output.new_zeros(4, dtype=torch.float64)
    if pairs:
        whose = np.concatenate([firsts_U[index] + np.arange(len(rows[index])) for index in pairs])
        places_S, pairs_P = copy_to_device([torch.from_numpy(whose), torch.tensor(pairs)], output.device)
        part = output[places_S]
        if part.dim() == 2 and not needs_values(options):
            ends = torch.tensor([len(ids) - 1 for index in pairs for ids in rows[index]])
            (ends_S,) = copy_to_device([ends], output.device)
            part = part.gather(1, ends_S[:, None])[:, 0]
        result = preference_loss(part, [rows[index] for index in pairs], margins_U[pairs], options)
        loss_U = loss_U.index_copy(0, pairs_P, result.loss_P)
        sums[:2] = result.sums()
    pointwise = [(index, one) for index, one in enumerate(targets) if one is not None]
    if pointwise:
        counts = [len(one.targets_A) for _, one in pointwise]
        weights = {"score": options.score_weight, "label": options.label_weight, "steps": options.steps_weight}
        on_host = [
            torch.from_numpy(np.repeat(firsts_U[[index for index, _ in pointwise]], counts)),
            torch.from_numpy(np.concatenate([one.tokens_A for _, one in pointwise]).astype(np.int64)),
            torch.from_numpy(np.concatenate([one.targets_A for _, one in pointwise])),
            torch.from_numpy(np.repeat([one.kind == "score" for _, one in pointwise], counts)),
            torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            torch.tensor([index for index, _ in pointwise]),
            torch.tensor([weights[one.kind] for _, one in pointwise]),
            torch.tensor([one.kind != "score" for _, one in pointwise]),
        ]
        of_row_A, tokens_A, targets_A, is_rating_A, units_A, places, weights_U, is_label_U = copy_to_device(
            on_host, output.device
        )
        values_A = output[of_row_A, tokens_A] if output.dim() == 2 else output[of_row_A]
        loss_A = pointwise_loss(values_A, targets_A, is_rating_A)
        loss_U = loss_U.index_copy(0, places, mean_of_units(loss_A, units_A, len(counts)) * weights_U)
        with torch.no_grad():
            right_A = ((values_A.float() * (targets_A - 0.5)).sign() + 1) / 2
            right_U = mean_of_units(right_A, units_A, len(counts))
            sums[2:] = torch.stack([(right_U * is_label_U).sum(), is_label_U.sum()]).double()
    return loss_U, sums
