"""PPO targets from rollouts, rewards and values, and the rollouts of each minibatch.

Applies the functions of `rlhf_critic.algorithms` with the options of PPO. Knows nothing about models, ranks or Ray.

Shape legend: S rollouts, L longest response, R tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_critic.algorithms import gae, ppo
from rlhf_critic.algorithms.value_metrics import explained_variance, mean_by_position, value_calibration
from rlhf_critic.config.ppo import AlgorithmConfig, RewardConfig
from rlhf_critic.errors import DivergedError

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

CALIBRATION_BINS = 5
POSITIONS = 4  # parts of a response


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Rollouts, with their rewards, log-probabilities and values.

    Attributes:
        prompt_lengths: Tokens of each prompt.
        truncated_S: True where the response was cut at the length limit, bool ``[S]``.
        rewards_S: Raw rewards from the scorers, fp32 ``[S]``.
        log_probs: Log-probabilities of the response tokens under the policy that sampled them, ``[R]`` each.
        ref_log_probs: Log-probabilities of the same tokens under the reference policy, ``[R]`` each.
        values: Values at every token of prompt and response, one array per sequence.
        masks: True at the response tokens that the policy sampled, bool ``[R]`` each; None if it sampled all. The
            numbers of other tokens, such as the output of a tool, are not read.
        token_rewards: Rewards of single response tokens besides ``rewards_S``, ``[R]`` each, such as those of turns at
            the last token of each; None if there are none.
        groups_S: Number of each rollout's prompt, int ``[S]``, for a baseline of groups.
    """

    prompt_lengths: Sequence[int]
    truncated_S: BoolArray
    rewards_S: FloatArray
    log_probs: Sequence[FloatArray]
    ref_log_probs: Sequence[FloatArray]
    values: Sequence[FloatArray]
    masks: Sequence[BoolArray] | None = None
    token_rewards: Sequence[FloatArray] | None = None
    groups_S: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class PPOTargets:
    """Training targets of the policy and the critic.

    Attributes:
        advantages: Advantage of each response token, ``[R]`` each; 0 at tokens that the policy did not sample.
        returns: Target value of each response token, ``[R]`` each; 0 at tokens that the policy did not sample.
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
    batch: RolloutBatch,
    algorithm: AlgorithmConfig,
    reward: RewardConfig,
    moments: ppo.RunningMoments,
    *,
    is_warmup: bool = False,
) -> PPOTargets:
    """Computes advantages and returns of one iteration.

    Args:
        batch: Rollouts of the iteration.
        algorithm: Options of PPO.
        reward: Options of the rewards. Token rewards are scaled as the others are, but not clipped.
        moments: Moments of the rewards of all earlier iterations.
        is_warmup: Whether the iteration trains the critic only, on returns with ``value_warmup_lambda``.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
        DivergedError: A value or a log-probability is NaN or infinite.
        ValueError: A prompt is empty, shapes differ, or a baseline of groups has no groups.
    """
    _require_finite("critic", "value", batch.values, None)
    _require_finite("policy", "log-probability", batch.log_probs, batch.masks)
    _require_finite("reference policy", "log-probability", batch.ref_log_probs, batch.masks)
    old_values, last_values_S = ppo.action_values(batch.values, batch.prompt_lengths)
    values_SL, response_SL = ppo.pad_rows(old_values)
    mask_SL = response_SL if batch.masks is None else ppo.pad_rows(batch.masks)[0] > 0
    log_probs_SL, _ = ppo.pad_rows(batch.log_probs)
    ref_log_probs_SL, _ = ppo.pad_rows(batch.ref_log_probs)
    truncated_S = torch.from_numpy(batch.truncated_S)
    raw_S = torch.from_numpy(batch.rewards_S)
    rewards_S, token_rewards_SL, moments = _scaled_rewards(batch, algorithm, reward, moments)
    kl_SL = ppo.estimate_kl(log_probs_SL, ref_log_probs_SL, algorithm.kl_estimator)
    rewards_SL = ppo.shaped_rewards(rewards_S, kl_SL, mask_SL, algorithm.kl_coefficient, token_rewards_SL)
    ends = (torch.from_numpy(last_values_S), truncated_S & algorithm.bootstrap_truncated, algorithm.gamma)
    advantages_SL, returns_SL = _estimates(rewards_SL, values_SL, mask_SL, ends, algorithm, is_warmup)
    if algorithm.baseline != "critic":
        if batch.groups_S is None:
            raise ValueError(f"the baseline {algorithm.baseline} needs groups_S, the prompt of each rollout")
        of_groups_S = gae.group_advantages(rewards_SL.sum(1), batch.groups_S, algorithm.baseline)
        advantages_SL = of_groups_S[:, None] * mask_SL
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
    explained = explained_variance(values_SL, returns_SL, mask_SL).item()
    if np.isfinite(explained):  # undefined if all returns are equal
        metrics["explained_variance"] = explained
    _, realised_SL = gae.gae(rewards_SL, values_SL, mask_SL, *ends, 1.0)
    metrics |= _value_metrics(values_SL, realised_SL, advantages_SL, mask_SL)
    return PPOTargets(
        ppo.unpad_rows(trained_SL, response_SL), ppo.unpad_rows(returns_SL, response_SL), old_values, metrics, moments
    )


def _scaled_rewards(
    batch: RolloutBatch, algorithm: AlgorithmConfig, reward: RewardConfig, moments: ppo.RunningMoments
) -> tuple[torch.Tensor, torch.Tensor | None, ppo.RunningMoments]:
    """Returns the rewards of rollouts, those of tokens, and the moments of all rewards so far."""
    truncated_S = torch.from_numpy(batch.truncated_S)
    rewards_S = torch.from_numpy(batch.rewards_S) - reward.missing_eos_penalty * truncated_S
    rewards_S = ppo.finite_rewards(rewards_S)
    # Truncated responses that are bootstrapped have no reward.
    moments = moments.updated(rewards_S[~truncated_S] if algorithm.bootstrap_truncated else rewards_S)
    scale = moments.std if reward.scaling == "running" else 1.0
    if reward.scaling == "running":
        rewards_S = rewards_S / scale
    if reward.clip is not None:
        rewards_S = ppo.clip_rewards(rewards_S, reward.clip)
    if algorithm.bootstrap_truncated:
        rewards_S = rewards_S.masked_fill(truncated_S, 0.0)
    if batch.token_rewards is None:
        return rewards_S, None, moments
    token_rewards_SL, _ = ppo.pad_rows(batch.token_rewards)
    ppo.finite_rewards(token_rewards_SL.sum(1))
    return rewards_S, token_rewards_SL / scale, moments


def _estimates(
    rewards_SL: torch.Tensor,
    values_SL: torch.Tensor,
    mask_SL: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor, float],
    algorithm: AlgorithmConfig,
    is_warmup: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes advantages and returns by GAE over tokens or turns, with the lambdas of the policy and the critic."""
    turns = gae.Turns.of(rewards_SL, values_SL, mask_SL) if algorithm.gae_step == "turn" else None
    steps = (rewards_SL, values_SL, mask_SL) if turns is None else (turns.rewards_SK, turns.values_SK, turns.mask_SK)
    alpha, critic_lambda = algorithm.length_adaptive_alpha, algorithm.critic_lambda
    policy_lambda = algorithm.gae_lambda if alpha is None else gae.length_adaptive_lambda(steps[2], alpha)
    if critic_lambda is None:
        critic_lambda = algorithm.gae_lambda if alpha is None else 1.0
    if is_warmup and algorithm.value_warmup_lambda is not None:
        critic_lambda = algorithm.value_warmup_lambda
    estimates = gae.decoupled_gae(*steps, *ends, policy_lambda, critic_lambda)
    return estimates if turns is None else (turns.of_tokens(estimates[0]), turns.of_tokens(estimates[1]))


def _value_metrics(
    values_SL: torch.Tensor, realised_SL: torch.Tensor, advantages_SL: torch.Tensor, mask_SL: torch.Tensor
) -> dict[str, float]:
    """Measures values against realised returns: calibration, and root mean squared error and advantage by position."""
    if not mask_SL.any():
        return {}
    calibration = value_calibration(values_SL, realised_SL, mask_SL, CALIBRATION_BINS)
    metrics = {"value_calibration_error": calibration.error}
    for number, (predicted, realised) in enumerate(
        zip(calibration.predicted_B, calibration.realised_B, strict=True), 1
    ):
        metrics |= {f"value_predicted_{number}": float(predicted), f"value_realised_{number}": float(realised)}
    squares = mean_by_position((values_SL - realised_SL).square(), mask_SL, POSITIONS)
    advantages = mean_by_position(advantages_SL, mask_SL, POSITIONS)
    for number, (square, advantage) in enumerate(zip(squares, advantages, strict=True), 1):
        if np.isfinite(square):  # short responses do not have all parts
            metrics |= {f"value_error_{number}": float(np.sqrt(square)), f"advantage_{number}": advantage}
    return metrics


def minibatch_rows(prompts_S: Sequence[int], minibatches: int, seed: Sequence[int]) -> list[list[int]]:
    """Splits rollouts into at most ``minibatches`` parts, none empty. Rollouts with one prompt number stay together."""
    rows_of_prompt: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts_S):
        rows_of_prompt.setdefault(prompt, []).append(row)
    groups = list(rows_of_prompt.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    parts = np.array_split(order, min(minibatches, len(groups)))
    return [[row for group in part for row in groups[group]] for part in parts]


def _require_finite(who: str, what: str, rows: Sequence[FloatArray], masks: Sequence[BoolArray] | None) -> None:
    read = rows if masks is None else [numbers[mask] for numbers, mask in zip(rows, masks, strict=True)]
    bad = [row for row, numbers in enumerate(read) if not np.isfinite(numbers).all()]
    if bad:
        raise DivergedError(
            f"a {what} of the {who} is NaN or infinite in {len(bad)} of {len(rows)} rollouts. The checkpoints saved "
            "before are intact. Lower --policy.optimizer.learning-rate or --critic.optimizer.learning-rate"
        )
