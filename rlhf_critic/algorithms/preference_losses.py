"""Preference losses: pure functions of rewards or values. Know nothing about models, batches or ranks.

All functions compute in fp32, whatever the input dtype. None reduces over preferences.

Shape legend: P preferences, K responses of a ranking, L tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_rewards_P: Tensor, rejected_rewards_P: Tensor, margins_P: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Computes the negative log-likelihood of each preference under the Bradley-Terry model.

    ``-log sigmoid(r_chosen - r_rejected)``, as in Ouyang et al., "Training language models to follow instructions with
    human feedback" (2022), equation 1, with one pair a prompt.

    Args:
        chosen_rewards_P: Rewards of the chosen responses, ``[P]``.
        rejected_rewards_P: Rewards of the rejected responses, ``[P]``.
        margins_P: Margin by which the chosen reward must exceed the rejected one, ``[P]``:
            ``-log sigmoid(r_chosen - r_rejected - m)``, Touvron et al., "Llama 2" (2023), equation 2.
        label_smoothing: Assumed probability that a preference label is flipped:
            ``-(1 - e) log sigmoid(d) - e log sigmoid(-d)``, Mitchell, "A note on DPO with noisy preferences" (2023).

    Returns:
        Loss of each preference, ``[P]``, fp32.

    Raises:
        ValueError: The shapes differ.
    """
    _same_shape("chosen and rejected rewards", chosen_rewards_P, rejected_rewards_P)
    advantage_P = chosen_rewards_P.float() - rejected_rewards_P.float()
    if margins_P is not None:
        _same_shape("rewards and margins", advantage_P, margins_P)
        advantage_P = advantage_P - margins_P.float()
    return _smoothed_log_loss(advantage_P, label_smoothing)


def per_token_loss(
    chosen_values_PL: Tensor,
    rejected_values_PL: Tensor,
    divergences_P: Tensor,
    chosen_lengths_P: Tensor,
    rejected_lengths_P: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the Bradley-Terry loss at every token after the shared prefix of two sequences, averaged over tokens.

    DeepSpeed-Chat's loss (Yao et al., "DeepSpeed-Chat", 2023; ``reward_model.py``): the mean of
    ``-log sigmoid(v_chosen[t] - v_rejected[t])`` over ``t`` from the divergence to the end of the longer sequence. Past
    the end of a sequence, DeepSpeed-Chat reads the values of padding tokens; this function repeats the last real value.
    The loss of identical sequences is that of a tie: ln 2 without a gradient.

    Args:
        chosen_values_PL: Values of the chosen sequences, ``[P, L]``. Values past the end are ignored.
        rejected_values_PL: Values of the rejected sequences, ``[P, L]``.
        divergences_P: Length of the prefix that the two sequences share, in tokens, int64 ``[P]``.
        chosen_lengths_P: Lengths of the chosen sequences in tokens, int64 ``[P]``.
        rejected_lengths_P: Lengths of the rejected sequences in tokens, int64 ``[P]``.
        label_smoothing: See `bradley_terry_loss`.

    Returns:
        Loss of each preference, ``[P]``, fp32.

    Raises:
        ValueError: The shapes differ.
    """
    _same_shape("chosen and rejected values", chosen_values_PL, rejected_values_PL)
    columns_L = torch.arange(chosen_values_PL.shape[1], device=chosen_values_PL.device)
    held_2PL = [
        values_PL.float().gather(1, torch.minimum(columns_L, lengths_P[:, None] - 1))
        for values_PL, lengths_P in ((chosen_values_PL, chosen_lengths_P), (rejected_values_PL, rejected_lengths_P))
    ]
    ends_P = torch.maximum(chosen_lengths_P, rejected_lengths_P)
    # If one sequence is a prefix of the other, they diverge after its last token, and its last value is repeated there.
    starts_P = torch.minimum(divergences_P, ends_P - 1)
    counted_PL = (columns_L >= starts_P[:, None]) & (columns_L < ends_P[:, None])
    loss_PL = _smoothed_log_loss(held_2PL[0] - held_2PL[1], label_smoothing)
    return (loss_PL * counted_PL).sum(1) / counted_PL.sum(1)


def plackett_luce_loss(rewards_PK: Tensor, present_PK: Tensor) -> Tensor:
    """Computes the negative log-likelihood of rankings under the Plackett-Luce model.

    The best response is chosen among all, the second among the rest, and so on. Each choice has the probability of a
    softmax over rewards: Luce, "Individual Choice Behavior" (1959); Plackett, "The Analysis of Permutations" (1975);
    for reward models Zhu et al., "Principled reinforcement learning with human feedback" (2023). For two responses it
    equals the Bradley-Terry loss.

    Args:
        rewards_PK: Rewards, the best response first, ``[P, K]``; any finite number where a response is absent.
        present_PK: True where a response exists, bool ``[P, K]``; existing responses come first.

    Returns:
        Loss of each ranking, ``[P]``, fp32.

    Raises:
        ValueError: The shapes differ.
    """
    _same_shape("rewards and presence", rewards_PK, present_PK)
    # The lowest finite number replaces minus infinity, whose gradient would be NaN.
    rewards_PK = rewards_PK.float().masked_fill(~present_PK, torch.finfo(torch.float32).min)
    rest_PK = rewards_PK.flip(1).logcumsumexp(1).flip(1)  # over this response and all worse ones
    return (rest_PK - rewards_PK).masked_fill(~present_PK, 0.0).sum(1)


def ranking_loss(
    rewards_PK: Tensor, present_PK: Tensor, margins_P: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Computes `bradley_terry_loss` for preferences of two responses and `plackett_luce_loss` for longer rankings.

    Margins and label smoothing apply to pairs only. For the arguments see there.

    Returns:
        Loss of each preference, ``[P]``, fp32.

    Raises:
        ValueError: The shapes differ.
    """
    pair_loss_P = bradley_terry_loss(rewards_PK[:, 0], rewards_PK[:, 1], margins_P, label_smoothing)
    if rewards_PK.shape[1] == 2:
        return pair_loss_P
    return torch.where(present_PK.sum(1) == 2, pair_loss_P, plackett_luce_loss(rewards_PK, present_PK))


def centering_penalty(rewards_PK: Tensor, present_PK: Tensor) -> Tensor:
    """Computes the squared sum of the rewards of each preference, which a loss of differences leaves free to drift.

    ``(r_chosen + r_rejected)^2``, Eisenstein et al., "Helping or herding?" (2023), section 3; TRL's
    ``center_rewards_coefficient`` multiplies it. For a ranking of K responses it is the square of twice the mean.

    Args:
        rewards_PK: Rewards, ``[P, K]``.
        present_PK: True where a response exists, bool ``[P, K]``.

    Returns:
        Penalty of each preference, ``[P]``, fp32.
    """
    mean_P = rewards_PK.float().masked_fill(~present_PK, 0.0).sum(1) / present_PK.sum(1)
    return (2.0 * mean_P).square()


def _smoothed_log_loss(advantage: Tensor, label_smoothing: float) -> Tensor:
    loss = -F.logsigmoid(advantage)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-advantage)


def _same_shape(what: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"{what} differ in shape: {tuple(one.shape)}, {tuple(other.shape)}")
