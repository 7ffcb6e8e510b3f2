"""Preference losses. Pure functions of rewards or values; they know nothing of models, batches or ranks.

All compute in fp32 whatever the input's dtype, and none reduces over preferences.

Shape legend: P preferences, K responses of a ranking, L tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_rewards_P: Tensor,
    rejected_rewards_P: Tensor,
    margins_P: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of each preference under the Bradley-Terry model.

    ``-log sigmoid(r_chosen - r_rejected)``, as in Ouyang et al., "Training language models to follow instructions with
    human feedback" (2022), equation 1, with one pair a prompt.

    Args:
        chosen_rewards_P: Rewards of the chosen responses, ``[P]``.
        rejected_rewards_P: Rewards of the rejected responses, ``[P]``.
        margins_P: How much better the chosen response must be: ``-log sigmoid(r_chosen - r_rejected - m)``, Touvron et
            al., "Llama 2" (2023), equation 2. ``[P]``.
        label_smoothing: The share of judgements that are taken to be the wrong way round:
            ``-(1 - e) log sigmoid(d) - e log sigmoid(-d)``, Mitchell, "A note on DPO with noisy preferences" (2023).

    Returns:
        The loss of each preference, ``[P]``, fp32.

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
    """The Bradley-Terry loss of the values at every token from where the two sequences part, averaged over tokens.

    DeepSpeed-Chat's loss (Yao et al., "DeepSpeed-Chat", 2023; ``reward_model.py``): the mean of
    ``-log sigmoid(v_chosen[t] - v_rejected[t])`` over ``t`` from the divergence to the end of the longer sequence. A
    sequence that has ended goes on with the values of its padding there, which are nobody's opinion; here its last
    value stands. Identical sequences have no such token and lose as a tie does: ln 2 without a gradient.

    Args:
        chosen_values_PL: Values of the chosen sequences from their first token on, ``[P, L]``; anything past their end.
        rejected_values_PL: Values of the rejected ones, ``[P, L]``.
        divergences_P: How many tokens the two sequences share at their beginning, int64 ``[P]``.
        chosen_lengths_P: Tokens of the chosen sequence, int64 ``[P]``.
        rejected_lengths_P: Tokens of the rejected sequence, int64 ``[P]``.
        label_smoothing: See `bradley_terry_loss`.

    Returns:
        The loss of each preference, ``[P]``, fp32.

    Raises:
        ValueError: The shapes differ.
    """
    _same_shape("chosen and rejected values", chosen_values_PL, rejected_values_PL)
    columns_L = torch.arange(chosen_values_PL.shape[1], device=chosen_values_PL.device)
    held_2PL = [
        values_PL.float().gather(1, torch.minimum(columns_L, lengths_P[:, None] - 1))
        for values_PL, lengths_P in (
            (chosen_values_PL, chosen_lengths_P),
            (rejected_values_PL, rejected_lengths_P),
        )
    ]
    ends_P = torch.maximum(chosen_lengths_P, rejected_lengths_P)
    # One sequence may be the beginning of the other: then the two part after its last token, where that value stands.
    starts_P = torch.minimum(divergences_P, ends_P - 1)
    counted_PL = (columns_L >= starts_P[:, None]) & (columns_L < ends_P[:, None])
    loss_PL = _smoothed_log_loss(held_2PL[0] - held_2PL[1], label_smoothing)
    return (loss_PL * counted_PL).sum(1) / counted_PL.sum(1)


def plackett_luce_loss(rewards_PK: Tensor, present_PK: Tensor) -> Tensor:
    """Negative log-likelihood of rankings, best first, under the Plackett-Luce model.

    The best is chosen among all, the second among the rest, and so on, each with the probability that a softmax over
    rewards gives it: Luce, "Individual Choice Behavior" (1959); Plackett, "The Analysis of Permutations" (1975); for
    reward models Zhu et al., "Principled reinforcement learning with human feedback" (2023). With two responses it is
    the Bradley-Terry loss.

    Args:
        rewards_PK: Rewards, the best response first, ``[P, K]``; anything finite where there is none.
        present_PK: Whether there is such a response, bool ``[P, K]``; the present ones come first.

    Returns:
        The loss of each ranking, ``[P]``, fp32.

    Raises:
        ValueError: The shapes differ.
    """
    _same_shape("rewards and presence", rewards_PK, present_PK)
    # The least finite number instead of minus infinity, whose gradient would not be a number.
    rewards_PK = rewards_PK.float().masked_fill(~present_PK, torch.finfo(torch.float32).min)
    # log sum exp over this place and all worse ones
    rest_PK = rewards_PK.flip(1).logcumsumexp(1).flip(1)
    return (rest_PK - rewards_PK).masked_fill(~present_PK, 0.0).sum(1)


def ranking_loss(
    rewards_PK: Tensor, present_PK: Tensor, margins_P: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """`bradley_terry_loss` where a preference has two responses, `plackett_luce_loss` where it ranks more.

    Margins and label smoothing are defined for two, and leave longer rankings as they are.

    Args:
        rewards_PK: See `plackett_luce_loss`.
        present_PK: See `plackett_luce_loss`.
        margins_P: See `bradley_terry_loss`.
        label_smoothing: See `bradley_terry_loss`.

    Returns:
        The loss of each preference, ``[P]``, fp32.

    Raises:
        ValueError: The shapes differ.
    """
    pair_loss_P = bradley_terry_loss(rewards_PK[:, 0], rewards_PK[:, 1], margins_P, label_smoothing)
    if rewards_PK.shape[1] == 2:
        return pair_loss_P
    return torch.where(present_PK.sum(1) == 2, pair_loss_P, plackett_luce_loss(rewards_PK, present_PK))


def centering_penalty(rewards_PK: Tensor, present_PK: Tensor) -> Tensor:
    """The squared sum of a preference's rewards, which a loss of differences leaves free to drift.

    ``(r_chosen + r_rejected)^2``, Eisenstein et al., "Helping or herding?" (2023), section 3; TRL's
    ``center_rewards_coefficient`` multiplies it. For rankings of K it is the square of twice the mean.

    Args:
        rewards_PK: Rewards, ``[P, K]``.
        present_PK: Whether there is such a response, bool ``[P, K]``.

    Returns:
        ``[P]``, fp32.
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
