"""PPO targets from rollouts, rewards and values, and the rollouts of each minibatch.

Applies the functions of `rlhf_critic.algorithms.ppo` with the options of PPO. Knows nothing about models, ranks or Ray.

Shape legend: S rollouts, L longest response, R tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_critic.algorithms import ppo
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.ppo import AlgorithmConfig, RewardConfig
from rlhf_critic.errors import DivergedError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Rollouts, with their rewards, log-probabilities and values.

    Attributes:
        sequences: Token ids of prompt and response.
        prompt_lengths: Tokens of each prompt.
        truncated_S: True where the response was cut at the length limit, bool ``[S]``.
        rewards_S: Raw rewards from the scorers, fp32 ``[S]``.
        log_probs: Log-probabilities of the response tokens under the policy that sampled them, ``[R]`` each.
        ref_log_probs: Log-probabilities of the same tokens under the reference policy, ``[R]`` each.
        values: Values at every token of prompt and response, one array per sequence.
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
    """Training targets of the policy and the critic.

    Attributes:
        advantages: Advantage of each response token, ``[R]`` each.
        returns: Target value of each response token, ``[R]`` each.
        old_values: Value of each response token before the update, ``[R]`` each.
        metrics: Statistics of rewards and values, by name.
        moments: Moments of all rewards so far.
    """

    advantages: list[FloatArray]
    returns: list[FloatArray]
    old_values: list[FloatArray]
    metrics: dict[str, float]
    moments: ppo.RunningMoments


def compute_advantages(
    batch: RolloutBatch, algorithm: AlgorithmConfig, reward: RewardConfig, moments: ppo.RunningMoments
) -> PPOTargets:
    """Computes advantages and returns of one iteration. The moments are those of the rewards of all earlier iterations.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
        DivergedError: A value or a log-probability is NaN or infinite.
        ValueError: A prompt is empty, or shapes differ.
    """
    _require_finite("critic", "value", batch.values)
    _require_finite("policy", "log-probability", batch.log_probs)
    _require_finite("reference policy", "log-probability", batch.ref_log_probs)
    old_values, last_values_S = ppo.action_values(batch.values, batch.prompt_lengths)
    log_probs_SL, mask_SL = ppo.pad_rows(batch.log_probs)
    ref_log_probs_SL, _ = ppo.pad_rows(batch.ref_log_probs)
    values_SL, _ = ppo.pad_rows(old_values)
    truncated_S = torch.from_numpy(batch.truncated_S)
    raw_S = torch.from_numpy(batch.rewards_S)
    rewards_S = ppo.finite_rewards(raw_S - reward.missing_eos_penalty * truncated_S)
    # Truncated responses that are bootstrapped have no reward.
    moments = moments.updated(rewards_S[~truncated_S] if algorithm.bootstrap_truncated else rewards_S)
    if reward.scaling == "running":
        rewards_S = rewards_S / moments.std
    if reward.clip is not None:
        rewards_S = ppo.clip_rewards(rewards_S, reward.clip)
    if algorithm.bootstrap_truncated:
        rewards_S = rewards_S.masked_fill(truncated_S, 0.0)
    kl_SL = ppo.estimate_kl(log_probs_SL, ref_log_probs_SL, algorithm.kl_estimator)
    advantages_SL, returns_SL = ppo.gae(
        ppo.shaped_rewards(rewards_S, kl_SL, mask_SL, algorithm.kl_coefficient),
        values_SL,
        mask_SL,
        torch.from_numpy(last_values_S),
        truncated_S & algorithm.bootstrap_truncated,
        algorithm.gamma,
        algorithm.gae_lambda,
    )
    trained_SL = ppo.whiten(advantages_SL, mask_SL) if algorithm.whiten_advantages else advantages_SL
    log_ratio_SL = ppo.estimate_kl(log_probs_SL, ref_log_probs_SL, "k1").masked_fill(~mask_SL, 0.0)
    metrics = {
        "reward": raw_S.mean().item(),
        "reward_std": raw_S.std(correction=0).item(),
        "kl": log_ratio_SL.sum(1).mean().item(),
        "kl_per_token": ppo.masked_mean(log_ratio_SL, mask_SL).item(),
        "value": ppo.masked_mean(values_SL, mask_SL).item(),
        "return": ppo.masked_mean(returns_SL, mask_SL).item(),
        "response_tokens": mask_SL.sum(1).float().mean().item(),
        "truncated": truncated_S.float().mean().item(),
    }
    explained = ppo.explained_variance(values_SL, returns_SL, mask_SL).item()
    if np.isfinite(explained):  # undefined if all returns are equal
        metrics["explained_variance"] = explained
    return PPOTargets(
        ppo.unpad_rows(trained_SL, mask_SL), ppo.unpad_rows(returns_SL, mask_SL), old_values, metrics, moments
    )


def minibatch_rows(prompts_S: Sequence[int], minibatches: int, seed: Sequence[int]) -> list[list[int]]:
    """Splits rollouts into at most ``minibatches`` parts, none empty. Rollouts with one prompt number stay together."""
    rows_of_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts_S):
        rows_of_prompt.setdefault(prompt, []).append(row)
    groups = list(rows_of_prompt.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    parts = np.array_split(order, min(minibatches, len(groups)))
    return [[row for group in part for row in groups[group]] for part in parts]


def _require_finite(who: str, what: str, rows: Sequence[FloatArray]) -> None:
    bad = [row for row, numbers in enumerate(rows) if not np.isfinite(numbers).all()]
    if bad:
        raise DivergedError(
            f"a {what} of the {who} is NaN or infinite in {len(bad)} of {len(rows)} rollouts. The checkpoints saved "
            "before are intact. Lower --policy.optimizer.learning-rate or --critic.optimizer.learning-rate"
        )
