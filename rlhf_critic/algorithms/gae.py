"""Advantages of actions: generalised advantage estimates with a critic, and baselines of groups without one.

An action is a response token, as in `rlhf_critic.algorithms.ppo`, or a whole turn of the policy. All functions compute
in fp32, and none changes its arguments. Entries where a mask is False are ignored, even NaN.

Shape legend: S rollouts, L tokens of the longest response, K turns of the rollout with the most,
G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.algorithms.ppo import same_shape

GRPO_EPSILON = 1e-6  # added to the standard deviation of a group


@torch.no_grad()
def gae(
    rewards_SL: Tensor,
    values_SL: Tensor,
    mask_SL: Tensor,
    last_values_S: Tensor,
    truncated_S: Tensor,
    gamma: float,
    gae_lambda: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes generalised advantage estimates and the returns that a critic is trained on.

    ``A_t = sum_l (gamma gae_lambda)^l delta_{t+l}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``, Schulman et al.,
    "High-dimensional continuous control using generalized advantage estimation" (2016), equations 11 to 16. The value
    after the last action is ``last_values_S`` if the rollout was truncated and 0 if it terminated: Pardo et al., "Time
    limits in reinforcement learning" (2018). Both results are targets and carry no gradient.

    Args:
        rewards_SL: Reward after each action, ``[S, L]``.
        values_SL: Value before each action, ``[S, L]``.
        mask_SL: Mask of the actions, bool ``[S, L]``. Other tokens are skipped: their rewards and values are not read,
            and they add no discount.
        last_values_S: Value after the last action, ``[S]``; read only where ``truncated_S`` is True.
        truncated_S: True where the rollout was cut before its end, bool ``[S]``.
        gamma: Discount per step.
        gae_lambda: Weight of later rewards, one number or one of each rollout ``[S]``. 0 uses the next value of the
            critic alone, 1 uses observed rewards alone.

    Returns:
        Advantages, and returns (advantages plus values), both fp32 ``[S, L]``, 0 where the mask is False.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape("rewards and values", rewards_SL.shape, values_SL.shape)
    same_shape("rewards and mask", rewards_SL.shape, mask_SL.shape)
    same_shape("the rewards' rows and last values", rewards_SL.shape[:1], last_values_S.shape)
    same_shape("the rewards' rows and truncations", rewards_SL.shape[:1], truncated_S.shape)
    if isinstance(gae_lambda, Tensor):
        same_shape("the rewards' rows and lambdas", rewards_SL.shape[:1], gae_lambda.shape)
        gae_lambda = gae_lambda.float()
    rewards_SL = rewards_SL.float()
    values_SL = values_SL.float().masked_fill(~mask_SL, 0.0)
    advantages_SL = torch.zeros_like(values_SL)
    next_values_S = last_values_S.float().masked_fill(~truncated_S, 0.0)
    next_advantages_S = torch.zeros_like(next_values_S)
    for t in reversed(range(values_SL.shape[1])):
        delta_S = rewards_SL[:, t] + gamma * next_values_S - values_SL[:, t]
        advantages_S = delta_S + gamma * gae_lambda * next_advantages_S
        next_advantages_S = torch.where(mask_SL[:, t], advantages_S, next_advantages_S)
        next_values_S = torch.where(mask_SL[:, t], values_SL[:, t], next_values_S)
        advantages_SL[:, t] = next_advantages_S
    advantages_SL = advantages_SL.masked_fill(~mask_SL, 0.0)
    return advantages_SL, advantages_SL + values_SL


def decoupled_gae(
    rewards_SL: Tensor,
    values_SL: Tensor,
    mask_SL: Tensor,
    last_values_S: Tensor,
    truncated_S: Tensor,
    gamma: float,
    policy_lambda: float | Tensor,
    critic_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Computes advantages with one lambda, and the critic's returns with another.

    A lambda of 1 gives the critic the observed returns, which do not depend on its own values. A smaller lambda keeps
    the variance of the policy's advantages low. Yuan et al., "What's behind PPO's collapse in long-CoT? Value
    optimization holds the secret" (VC-PPO, 2025).

    Args:
        rewards_SL: Reward after each action, ``[S, L]``; for all but the lambdas see `gae`.
        values_SL: Value before each action, ``[S, L]``.
        mask_SL: Mask of the actions, bool ``[S, L]``.
        last_values_S: Value after the last action, ``[S]``.
        truncated_S: True where the rollout was cut before its end, bool ``[S]``.
        gamma: Discount per step.
        policy_lambda: Lambda of the advantages, one number or one of each rollout ``[S]``.
        critic_lambda: Lambda of the returns.

    Returns:
        Advantages, and returns, both fp32 ``[S, L]``, 0 where the mask is False.

    Raises:
        ValueError: The shapes differ.
    """
    arguments = (rewards_SL, values_SL, mask_SL, last_values_S, truncated_S, gamma)
    advantages_SL, returns_SL = gae(*arguments, policy_lambda)
    if isinstance(policy_lambda, Tensor) or policy_lambda != critic_lambda:
        _, returns_SL = gae(*arguments, critic_lambda)
    return advantages_SL, returns_SL


def length_adaptive_lambda(mask_SL: Tensor, alpha: float) -> Tensor:
    """Computes a lambda for each rollout that grows with its number of actions l: ``1 - 1 / (alpha l)``.

    The weights of later rewards then add up to ``alpha l``, so a reward at the end reaches the start of a long
    response. Yue et al., "VAPO: Efficient and reliable reinforcement learning for advanced reasoning tasks" (2025),
    with alpha 0.05. Short rollouts have 0 instead of a negative lambda.

    Args:
        mask_SL: Mask of the actions, bool ``[S, L]``.
        alpha: Sum of the weights of later rewards per action, positive.

    Returns:
        Lambdas, fp32 ``[S]``, at least 0 and less than 1.

    Raises:
        ValueError: Alpha is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha of the length-adaptive lambda must be positive, not {alpha}")
    return 1.0 - 1.0 / (alpha * mask_SL.sum(1).float()).clamp(min=1.0)


def turn_numbers(mask_SL: Tensor) -> Tensor:
    """Numbers the turns of each rollout: runs of the policy's tokens between which others wrote.

    Args:
        mask_SL: Mask of the tokens that the policy sampled, bool ``[S, L]``.

    Returns:
        Turn of each token, from 0, int64 ``[S, L]``. A token outside the mask has that of the turn before it.
    """
    before_SL = torch.nn.functional.pad(mask_SL, (1, 0))[:, :-1]
    return ((mask_SL & ~before_SL).cumsum(1) - 1).clamp(min=0)


def turn_rewards(rewards: Sequence[Sequence[float] | NDArray[np.floating]], mask_SL: Tensor) -> Tensor:
    """Places the reward of each turn at its last token.

    Args:
        rewards: Rewards of the turns of each rollout, in their order.
        mask_SL: Mask of the tokens that the policy sampled, bool ``[S, L]``; see `turn_numbers`.

    Returns:
        Rewards, fp32 ``[S, L]``, for `rlhf_critic.algorithms.ppo.shaped_rewards`.

    Raises:
        ValueError: A rollout has more or fewer rewards than turns.
    """
    same_shape("rewards of turns and the mask's rows", (len(rewards),), mask_SL.shape[:1])
    after_SL = torch.nn.functional.pad(mask_SL, (0, 1))[:, 1:]
    lasts_SL = mask_SL & ~after_SL
    for rollout, (row, turns) in enumerate(zip(rewards, lasts_SL.sum(1).tolist(), strict=True)):
        if len(row) != turns:
            raise ValueError(f"rollout {rollout}: {len(row)} rewards of turns, but {turns} turns; give one for each")
    rewards_SL = torch.zeros(mask_SL.shape)
    rewards_SL[lasts_SL] = torch.tensor([float(reward) for row in rewards for reward in row])
    return rewards_SL


@dataclass(frozen=True, eq=False)
class Turns:
    """Rollouts in which each turn of the policy is one action, for `gae` over turns.

    The text between two turns is no step in time: the state before a turn includes all tokens before it. The reward of
    a turn is the sum over its tokens, and its value is the one before its first token. Li et al., "Turn-PPO: Turn-level
    advantage estimation with PPO for improved multi-turn RL in agentic LLMs" (2025).

    Attributes:
        rewards_SK: Reward of each turn, fp32.
        values_SK: Value before each turn, fp32.
        mask_SK: True at turns, bool.
        turns_SL: Turn of each token, int64.
        mask_SL: Mask of the tokens that the policy sampled, bool.
    """

    rewards_SK: Tensor
    values_SK: Tensor
    mask_SK: Tensor
    turns_SL: Tensor
    mask_SL: Tensor

    @classmethod
    def of(cls, rewards_SL: Tensor, values_SL: Tensor, mask_SL: Tensor) -> Turns:
        """Joins the tokens of each turn.

        Args:
            rewards_SL: Reward after each token, ``[S, L]``.
            values_SL: Value before each token, ``[S, L]``.
            mask_SL: Mask of the tokens that the policy sampled, bool ``[S, L]``.

        Raises:
            ValueError: The shapes differ.
        """
        same_shape("rewards and mask", rewards_SL.shape, mask_SL.shape)
        same_shape("values and mask", values_SL.shape, mask_SL.shape)
        turns_SL = turn_numbers(mask_SL)
        firsts_SL = mask_SL & ~torch.nn.functional.pad(mask_SL, (1, 0))[:, :-1]
        none_SK = torch.zeros(len(mask_SL), int(firsts_SL.sum(1).max()) if len(mask_SL) else 0)
        if not none_SK.numel():
            return cls(none_SK, none_SK.clone(), none_SK.bool(), turns_SL, mask_SL)

        def summed(x_SL: Tensor, of_SL: Tensor) -> Tensor:
            return none_SK.scatter_add(1, turns_SL, x_SL.float().masked_fill(~of_SL, 0.0))

        mask_SK = summed(firsts_SL, firsts_SL) > 0
        return cls(summed(rewards_SL, mask_SL), summed(values_SL, firsts_SL), mask_SK, turns_SL, mask_SL)

    def of_tokens(self, x_SK: Tensor) -> Tensor:
        """Gives the number of each turn to all its tokens: fp32 ``[S, L]``, 0 where the mask is False."""
        if not x_SK.numel():
            return torch.zeros(self.mask_SL.shape)
        return x_SK.gather(1, self.turns_SL).masked_fill(~self.mask_SL, 0.0)


def group_advantages(scores_S: Tensor, groups_S: NDArray[np.int64], kind: Literal["rloo", "grpo"]) -> Tensor:
    """Computes the advantage of each rollout over the other rollouts of its prompt, without a critic.

    RLOO subtracts the mean score of the other rollouts: Kool et al., "Buy 4 REINFORCE samples, get a baseline for
    free!" (2019); Ahmadian et al., "Back to basics" (2024). GRPO subtracts the mean of all and divides by their sample
    standard deviation plus 1e-6: Shao et al., "DeepSeekMath" (2024), section 4.1.

    Args:
        scores_S: Score of each rollout, ``[S]``: the sum of its rewards.
        groups_S: Group of each rollout, such as its prompt's number, int ``[S]``.
        kind: Name of the baseline.

    Returns:
        Advantages, fp32 ``[S]``; 0 in a group of equal scores.

    Raises:
        ValueError: A group has a single rollout, shapes differ, or the baseline is unknown.
    """
    same_shape("scores and groups", scores_S.shape, groups_S.shape)
    if kind not in ("rloo", "grpo"):
        raise ValueError(f"unknown group baseline {kind!r}; use rloo or grpo")
    _, of_rollout_S, counts_G = np.unique(groups_S, return_inverse=True, return_counts=True)
    if len(counts_G) and counts_G.min() < 2:
        alone = int(np.flatnonzero(counts_G[of_rollout_S] < 2)[0])
        raise ValueError(f"rollout {alone} is the only one of its prompt; a group baseline needs at least two")
    scores_S = scores_S.float().double()
    index_S = torch.from_numpy(of_rollout_S.reshape(-1))
    counts_S = torch.from_numpy(counts_G)[index_S].double()

    def mean_of_group(x_S: Tensor) -> Tensor:
        sums_G = torch.zeros(len(counts_G), dtype=torch.float64).index_add(0, index_S, x_S)
        return sums_G[index_S] / counts_S

    centred_S = scores_S - mean_of_group(scores_S)
    if kind == "rloo":
        return (centred_S * counts_S / (counts_S - 1)).float()
    deviations_S = (mean_of_group(centred_S.square()) * counts_S / (counts_S - 1)).sqrt()
    return (centred_S / (deviations_S + GRPO_EPSILON)).float()
