"""From rollouts, rewards and values to what critic and policy are fitted to, and which rollouts share a step.

Joins the functions of `rlhf_critic.algorithms.ppo` under the options of PPO. Knows nothing of models, ranks or Ray.

Shape legend: S rollouts, L longest response, R tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_critic.algorithms.ppo import (
    RunningMoments,
    action_values,
    clip_rewards,
    estimate_kl,
    explained_variance,
    gae,
    masked_mean,
    pad_rows,
    shaped_rewards,
    unpad_rows,
    whiten,
)
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.ppo import AlgorithmConfig, RewardConfig
from rlhf_critic.errors import DivergedError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Rollouts and all that was computed for them.

    Attributes:
        sequences: Token ids of prompt and response.
        prompt_lengths: Tokens of each prompt.
        truncated_S: Whether the response was cut, bool ``[S]``.
        rewards_S: As the scorers gave them, fp32 ``[S]``.
        log_probs: With which each token was drawn, ``[R]`` each.
        ref_log_probs: The same under the reference, ``[R]`` each.
        values: At every token of each sequence, as long as it.
    """

    sequences: Sequence[TokenIds]
    prompt_lengths: Sequence[int]
    truncated_S: NDArray[np.bool_]
    rewards_S: FloatArray
    log_probs: Sequence[FloatArray]
    ref_log_probs: Sequence[FloatArray]
    values: Sequence[FloatArray]


@dataclass(frozen=True, eq=False)
class PPOTargets:
    """What a policy and a critic learn from.

    Attributes:
        advantages: Of every action, ``[R]`` each.
        returns: What the value of every action should be, ``[R]`` each.
        old_values: What it was, ``[R]`` each.
        metrics: Of rewards and values, by name.
        moments: Of all rewards so far.
    """

    advantages: list[FloatArray]
    returns: list[FloatArray]
    old_values: list[FloatArray]
    metrics: dict[str, float]
    moments: RunningMoments


def compute_advantages(
    judged: RolloutBatch, algorithm: AlgorithmConfig, reward: RewardConfig, moments: RunningMoments
) -> PPOTargets:
    """Computes advantages and returns.

    Args:
        judged: The rollouts of an iteration.
        algorithm: Options of PPO.
        reward: How rewards are changed before they are used.
        moments: Of the rewards of all iterations before.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
        DivergedError: A value or a log-probability is.
        ValueError: A prompt is empty, or shapes differ.
    """
    _require_finite("critic", "value", judged.values)
    _require_finite("policy", "log-probability", judged.log_probs)
    _require_finite("reference policy", "log-probability", judged.ref_log_probs)
    old_values, last_values_S = action_values(judged.values, judged.prompt_lengths)
    log_probs_SL, mask_SL = pad_rows(judged.log_probs)
    ref_log_probs_SL, _ = pad_rows(judged.ref_log_probs)
    values_SL, _ = pad_rows(old_values)
    truncated_S = torch.from_numpy(judged.truncated_S)
    raw_S = torch.from_numpy(judged.rewards_S)
    rewards_S = raw_S - reward.missing_eos_penalty * truncated_S
    moments = moments.updated(rewards_S)
    if reward.scaling == "running":
        rewards_S = rewards_S / moments.std
    if reward.clip is not None:
        rewards_S = clip_rewards(rewards_S, reward.clip)
    if algorithm.bootstrap_truncated:
        rewards_S = rewards_S.masked_fill(truncated_S, 0.0)
    kl_SL = estimate_kl(log_probs_SL, ref_log_probs_SL, algorithm.kl_estimator)
    advantages_SL, returns_SL = gae(
        shaped_rewards(rewards_S, kl_SL, mask_SL, algorithm.kl_coefficient),
        values_SL,
        mask_SL,
        torch.from_numpy(last_values_S),
        truncated_S & algorithm.bootstrap_truncated,
        algorithm.gamma,
        algorithm.gae_lambda,
    )
    explained = explained_variance(values_SL, returns_SL, mask_SL).item()
    fitted_SL = whiten(advantages_SL, mask_SL) if algorithm.whiten_advantages else advantages_SL
    lengths_S = mask_SL.sum(1)
    log_ratio_SL = estimate_kl(log_probs_SL, ref_log_probs_SL, "k1").masked_fill(~mask_SL, 0.0)
    metrics = {
        "reward": raw_S.mean().item(),
        "reward_std": raw_S.std(correction=0).item(),
        "kl": log_ratio_SL.sum(1).mean().item(),
        "kl_per_token": masked_mean(log_ratio_SL, mask_SL).item(),
        "value": masked_mean(values_SL, mask_SL).item(),
        "return": masked_mean(returns_SL, mask_SL).item(),
        "response_tokens": lengths_S.float().mean().item(),
        "truncated": truncated_S.float().mean().item(),
    }
    if np.isfinite(explained):  # it is not defined where all returns are the same
        metrics["explained_variance"] = explained
    return PPOTargets(unpad_rows(fitted_SL, mask_SL), unpad_rows(returns_SL, mask_SL), old_values, metrics, moments)


def minibatch_rows(prompts_S: Sequence[int], minibatches: int, seed: Sequence[int]) -> list[list[int]]:
    """Deals an iteration's rollouts out into minibatches; those of one prompt stay together and share it.

    Args:
        prompts_S: The prompt of each rollout.
        minibatches: At most this many, none of them empty.
        seed: Of the order.
    """
    of_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts_S):
        of_prompt.setdefault(prompt, []).append(row)
    groups = list(of_prompt.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    parts = np.array_split(order, min(minibatches, len(groups)))
    return [[row for group in part for row in groups[group]] for part in parts]


def _require_finite(who: str, what: str, numbers: Sequence[FloatArray]) -> None:
    bad = [row for row, of_row in enumerate(numbers) if not np.isfinite(of_row).all()]
    if bad:
        raise DivergedError(
            f"a {what} of the {who} is NaN or infinite in {len(bad)} of {len(numbers)} rollouts; the checkpoints saved "
            "before are untouched. Lower --policy.optimizer.learning-rate or --critic.optimizer.learning-rate"
        )
