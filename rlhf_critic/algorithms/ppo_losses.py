"""Losses of PPO for the critic and the policy: pure functions of numbers.

All functions compute in fp32, whatever the input dtype, and none changes its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rlhf_critic.algorithms.ppo import same_shape

LossMean = Literal["token", "sequence"]


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Computes half the squared error of values, clipped so that moving far from the old value brings no gain.

    ``max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2``, OpenAI baselines, ``ppo2/model.py``; Schulman et al.,
    "Proximal policy optimization algorithms" (2017) do the same to the policy. Keeps gradients.

    Args:
        values: Current values, any shape.
        old_values: Values at the time of the rollouts, same shape.
        returns: Target values, same shape.
        clip: Maximum change of a value, e, positive. None means the plain squared error.

    Returns:
        Loss of each token, fp32; and True where the clipped term, which has no gradient, is the larger, bool. Both have
        the shape of the arguments.

    Raises:
        ValueError: The shapes differ, or the clip is not positive.
    """
    same_shape("values and old values", values.shape, old_values.shape)
    same_shape("values and returns", values.shape, returns.shape)
    values, old_values, returns = values.float(), old_values.float(), returns.float()
    squares = (values - returns).square()
    if clip is None:
        return 0.5 * squares, torch.zeros_like(squares, dtype=torch.bool)
    if not clip > 0:
        raise ValueError(f"the clip of values must be positive or None (no clipping), not {clip}")
    # Not old + clip(V - old), because rounding would count values within the range as clipped.
    near_squares = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    clipped = near_squares > squares
    return 0.5 * torch.where(clipped, near_squares, squares), clipped


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes PPO's clipped surrogate loss of each token.

    ``max(-A r, -A clip(r, 1 - e, 1 + e))`` with ``r = exp(log policy - log old policy)``: Schulman et al., "Proximal
    policy optimization algorithms" (2017), equation 7, negated. With another limit above, ``1 + e_high``: Yu et al.,
    "DAPO: An open-source LLM reinforcement learning system at scale" (2025), section 3.1. With dual clip, the loss of a
    negative advantage is at most ``-c A``: Ye et al., "Mastering complex control in MOBA games with deep reinforcement
    learning" (2020). Keeps gradients.

    Args:
        log_probs: Log-probabilities of the sampled tokens under the policy, any shape.
        old_log_probs: Log-probabilities under the policy that sampled them, same shape.
        advantages: Advantages, same shape; see `rlhf_critic.algorithms.gae.gae`.
        clip: Maximum change of the ratio, e, between 0 and 1.
        clip_high: Maximum rise of the ratio, positive. None means ``clip``.
        dual_clip: Maximum ratio of a token with a negative advantage, c, greater than 1. None does not limit it.

    Returns:
        Loss of each token, fp32; and True where a limit holds, so that there is no gradient, bool. Both have the shape
        of the arguments.

    Raises:
        ValueError: The shapes differ, or a limit is out of its range.
    """
    same_shape("log-probabilities and old log-probabilities", log_probs.shape, old_log_probs.shape)
    same_shape("log-probabilities and advantages", log_probs.shape, advantages.shape)
    if not 0 < clip < 1:
        raise ValueError(f"the clip of the policy's ratio must lie between 0 and 1, not {clip}")
    clip_high = clip if clip_high is None else clip_high
    if not clip_high > 0:
        raise ValueError(f"the upper clip of the policy's ratio must be positive, not {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"the dual clip of the policy's ratio must be greater than 1, not {dual_clip}")
    advantages = advantages.float()
    log_ratio = log_probs.float() - old_log_probs.float()
    lowest, highest = math.log1p(-clip), math.log1p(clip_high)
    most = math.inf if dual_clip is None else math.log(dual_clip)
    # The maximum is -A min(r, 1 + e) if A >= 0, else -A max(r, 1 - e). The log ratio is bounded before the exponential,
    # so that a clipped ratio that would overflow has gradient 0; 0 times infinity would be NaN.
    bounded = torch.where(advantages >= 0, log_ratio.clamp(max=highest), log_ratio.clamp(min=lowest, max=most))
    falls = (log_ratio < lowest) | (log_ratio > most)
    clipped = ((advantages > 0) & (log_ratio > highest)) | ((advantages < 0) & falls)
    return -advantages * bounded.exp(), clipped


def token_weights(counts: Sequence[int], mean: LossMean) -> list[float] | None:
    """Returns the weight of each rollout's tokens in a mean over all tokens, so that it becomes the mean asked for.

    The mean over tokens weighs every token equally: Yu et al., "DAPO" (2025), section 3.3. The mean over sequences
    first averages the tokens of each rollout: Shao et al., "DeepSeekMath" (GRPO, 2024), equation 3.

    Args:
        counts: Number of actions of each rollout, positive.
        mean: ``token`` or ``sequence``.

    Returns:
        A weight for each rollout; None if all are 1.

    Raises:
        ValueError: The mean is unknown.
    """
    if mean == "token":
        return None
    if mean != "sequence":
        raise ValueError(f"unknown mean of losses {mean!r}; use token or sequence")
    total = sum(counts)
    return [total / (len(counts) * count) for count in counts]
