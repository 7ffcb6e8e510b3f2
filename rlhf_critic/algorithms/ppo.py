"""Values and rewards of actions in PPO: pure functions of numbers. Know nothing about models, ranks or text.

Advantages are in `rlhf_critic.algorithms.gae`, losses in `rlhf_critic.algorithms.ppo_losses`, and measures of values in
`rlhf_critic.algorithms.value_metrics`.

All functions compute in fp32, whatever the input dtype, and none changes its arguments. Entries where a mask is False
are ignored, even NaN.

Alignment. A rollout is a prompt of p >= 1 tokens and a response of R >= 0 tokens. Action t is response token t,
which is token p + t of the sequence.

- The value of action t is the critic's value at the token before it, p + t - 1: the return expected before the token is
  sampled.
- The reward of action t follows the action.
- The critic's value at the last token, p + R - 1, is the value of the state after the last action. If the rollout was
  truncated, the return is bootstrapped from it. If the rollout terminated (EOS), 0 takes its place.

A mask selects the tokens that are actions. It excludes padding, and may exclude holes: tokens inside a response that
the policy did not sample, such as the output of a tool. A hole is not a time step; the next action follows immediately.

Shape legend: S rollouts, L tokens of the longest response (actions), R tokens of one response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.errors import NonFiniteRewardError

EQUAL_REWARDS = 1e-4  # spread, relative to the mean, below which rewards count as equal


def action_values(
    values_S: Sequence[NDArray[np.float32]], prompt_lengths_S: Sequence[int]
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Selects the values of the actions, and the value after the last action, from the values at every token.

    The module docstring defines the alignment.

    Args:
        values_S: Values at every token of prompt and response, one array ``[p + R]`` per rollout.
        prompt_lengths_S: Length of each prompt in tokens, p.

    Returns:
        Values of the actions, one fp32 array ``[R]`` per rollout; and values after the last action, fp32 ``[S]``.

    Raises:
        ValueError: A prompt is empty or longer than its sequence, or the two arguments differ in length.
    """
    same_shape("values and prompt lengths", (len(values_S),), (len(prompt_lengths_S),))
    values_of_actions_S = []
    for rollout, (values, prompt_length) in enumerate(zip(values_S, prompt_lengths_S, strict=True)):
        if not 1 <= prompt_length <= len(values):
            raise ValueError(
                f"rollout {rollout}: a prompt of {prompt_length} tokens in a sequence of {len(values)}; it must have "
                "at least one token and no more than the sequence"
            )
        values_of_actions_S.append(np.asarray(values[prompt_length - 1 : -1], dtype=np.float32))
    return values_of_actions_S, np.array([values[-1] for values in values_S], dtype=np.float32)


def pad_rows(rows: Sequence[Sequence[float] | NDArray[Any] | Tensor]) -> tuple[Tensor, Tensor]:
    """Pads rows of different lengths on the right to one tensor.

    Args:
        rows: Numbers of at least one rollout, ``[R]`` each. Rows may be empty.

    Returns:
        Numbers, fp32 ``[S, L]``, 0 at padding; and a mask that is True at numbers, bool ``[S, L]``.

    Raises:
        ValueError: There is no row, or one is not a list of numbers.
    """
    if not len(rows):
        raise ValueError("no rows to pad; at least one rollout is needed")
    tensors = [
        # Copies, because torch warns about read-only arrays.
        row.float() if isinstance(row, Tensor) else torch.from_numpy(np.array(row, dtype=np.float32))
        for row in rows
    ]
    for index, tensor in enumerate(tensors):
        if tensor.ndim != 1:
            raise ValueError(f"row {index} has the shape {tuple(tensor.shape)}; it must be a list of numbers")
    padded_SL = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    lengths_S = torch.tensor([len(tensor) for tensor in tensors], device=padded_SL.device)
    return padded_SL, torch.arange(padded_SL.shape[1], device=padded_SL.device) < lengths_S[:, None]


def unpad_rows(numbers_SL: Tensor, mask_SL: Tensor) -> list[NDArray[np.float32]]:
    """Removes the padding that `pad_rows` added.

    Args:
        numbers_SL: Padded numbers, ``[S, L]``.
        mask_SL: Mask that is True at numbers, bool ``[S, L]``.

    Returns:
        Numbers of each row, fp32 ``[R]``.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape("numbers and mask", numbers_SL.shape, mask_SL.shape)
    return [row[mask].float().numpy() for row, mask in zip(numbers_SL.detach().cpu(), mask_SL.cpu(), strict=True)]


def estimate_kl(log_probs_SL: Tensor, ref_log_probs_SL: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimates ``KL(policy || reference)`` at every token that the policy sampled.

    With ``d = log reference - log policy`` of the token: k1 is ``-d`` (unbiased, of either sign), k2 is ``d^2 / 2``
    (biased, little variance), k3 is ``exp(d) - 1 - d`` (unbiased, never negative). Schulman, "Approximating KL
    divergence" (2020). Keeps gradients.

    Args:
        log_probs_SL: Log-probabilities of the sampled tokens under the policy, ``[S, L]``.
        ref_log_probs_SL: Log-probabilities of the same tokens under the reference, ``[S, L]``.
        kind: Name of the estimator.

    Returns:
        Estimates in nats, fp32 ``[S, L]``.

    Raises:
        ValueError: The shapes differ, or the estimator is unknown.
    """
    same_shape("log-probabilities and reference log-probabilities", log_probs_SL.shape, ref_log_probs_SL.shape)
    difference_SL = ref_log_probs_SL.float() - log_probs_SL.float()
    if kind == "k1":
        return -difference_SL
    if kind == "k2":
        return 0.5 * difference_SL.square()
    if kind == "k3":
        # expm1, because exp(d) - 1 loses precision near 0, where training begins.
        return torch.expm1(difference_SL) - difference_SL
    raise ValueError(f"unknown KL estimator {kind!r}; use k1, k2 or k3")


def clip_rewards(rewards_S: Tensor, limit: float) -> Tensor:
    """Clips rewards to ``[-limit, limit]``, as DeepSpeed-Chat does (Yao et al., 2023; ``ppo_trainer.py``).

    Args:
        rewards_S: Rewards, ``[S]``.
        limit: Maximum magnitude, positive.

    Returns:
        Clipped rewards, fp32 ``[S]``.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite, which clipping would hide.
        ValueError: The limit is not positive.
    """
    if not limit > 0:
        raise ValueError(f"the limit of rewards must be positive, not {limit}")
    return finite_rewards(rewards_S).clamp(-limit, limit)


def shaped_rewards(
    rewards_S: Tensor,
    kl_SL: Tensor,
    mask_SL: Tensor,
    kl_coefficient: float,
    token_rewards_SL: Tensor | None = None,
) -> Tensor:
    """Computes the reward of every action: minus a KL penalty, plus the reward of the rollout at the last action.

    Stiennon et al., "Learning to summarize from human feedback" (2020), section 3.4; Ouyang et al., "Training language
    models to follow instructions with human feedback" (2022), equation 2, per token.

    Args:
        rewards_S: Reward of each rollout, ``[S]``.
        kl_SL: KL divergence at each action, ``[S, L]``; see `estimate_kl`.
        mask_SL: Mask of the actions, bool ``[S, L]``. A rollout without actions has no rewards.
        kl_coefficient: Penalty per nat.
        token_rewards_SL: Rewards of single actions, ``[S, L]``, in addition; for those of turns see
            `rlhf_critic.algorithms.gae.turn_rewards`.

    Returns:
        Rewards, fp32 ``[S, L]``, 0 where the mask is False.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite; the message names the rollouts.
        ValueError: The shapes differ.
    """
    same_shape("KL divergences and mask", kl_SL.shape, mask_SL.shape)
    same_shape("rewards and the mask's rows", rewards_S.shape, mask_SL.shape[:1])
    rewards_S = finite_rewards(rewards_S)
    actions_left_SL = mask_SL.flip(1).cumsum(1).flip(1)
    rewards_SL = rewards_S[:, None] * (actions_left_SL == 1)
    shaped_SL = (rewards_SL - kl_coefficient * kl_SL.float()).masked_fill(~mask_SL, 0.0)
    if token_rewards_SL is None:
        return shaped_SL
    same_shape("rewards of tokens and mask", token_rewards_SL.shape, mask_SL.shape)
    return shaped_SL + token_rewards_SL.float().masked_fill(~mask_SL, 0.0)


def masked_mean(x_SL: Tensor, mask_SL: Tensor) -> Tensor:
    """Computes the mean over all tokens of the mask, each with the same weight. Keeps gradients.

    Args:
        x_SL: Numbers, ``[S, L]``.
        mask_SL: Mask of the tokens that count, bool ``[S, L]``.

    Returns:
        A scalar, fp32; 0 for an empty mask.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape("numbers and mask", x_SL.shape, mask_SL.shape)
    return x_SL.float().masked_fill(~mask_SL, 0.0).sum() / mask_SL.sum().clamp(min=1)


def whiten(x_SL: Tensor, mask_SL: Tensor) -> Tensor:
    """Normalises the tokens of the mask, over the whole batch, to mean 0 and variance 1.

    ``(x - mean) / sqrt(variance + 1e-8)`` with the population variance (divided by n, not by n - 1), as in the code of
    Ziegler et al., "Fine-tuning language models from human preferences" (2019; ``utils/core.py``). Equal numbers, or a
    single number, become 0.

    Args:
        x_SL: Numbers, ``[S, L]``.
        mask_SL: Mask of the tokens that count, bool ``[S, L]``.

    Returns:
        Normalised numbers, fp32 ``[S, L]``, 0 where the mask is False.

    Raises:
        ValueError: The shapes differ.
    """
    same_shape("numbers and mask", x_SL.shape, mask_SL.shape)
    mean, variance = mean_and_variance(x_SL, mask_SL)
    whitened_SL = (x_SL.float().double() - mean) * torch.rsqrt(variance + 1e-8)
    return whitened_SL.float().masked_fill(~mask_SL, 0.0)


@dataclass(frozen=True)
class RunningMoments:
    """Mean and spread of all rewards so far, for scaling rewards. `dataclasses.asdict` gives JSON values.

    Attributes:
        count: Number of rewards so far.
        mean: Mean of the rewards.
        squares: Sum of squared distances from the mean.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def updated(self, rewards_S: Tensor) -> RunningMoments:
        """Returns the moments after new rewards ``[S]`` (perhaps none), in float64.

        Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

        Raises:
            NonFiniteRewardError: A reward is NaN or infinite, which would make all later moments so.
        """
        rewards_S = finite_rewards(rewards_S).double()
        added = float(rewards_S.numel())
        if not added:
            return self
        mean = rewards_S.sum().item() / added
        squares = (rewards_S - mean).square().sum().item()
        count, distance = self.count + added, mean - self.mean
        squares = self.squares + squares + distance**2 * self.count * added / count
        return RunningMoments(count, self.mean + distance * added / count, squares)

    @property
    def std(self) -> float:
        """Sample standard deviation (divided by n - 1); 1 for fewer than two rewards or equal rewards.

        Rewards count as equal if they differ less than a critic's rounding errors. Dividing by those would make rewards
        of any size.
        """
        std = math.sqrt(self.squares / (self.count - 1.0)) if self.count >= 2 else 0.0
        return std if std > EQUAL_REWARDS * max(1.0, abs(self.mean)) else 1.0


def mean_and_variance(x_SL: Tensor, mask_SL: Tensor) -> tuple[Tensor, Tensor]:
    """Computes mean and population variance over the mask, float64 scalars; 0 for an empty mask.

    In float64 the mean of equal fp32 numbers is exactly that number. So their variance is 0, not a rounding error that
    a division would amplify.
    """
    count = mask_SL.sum().clamp(min=1)
    x_SL = x_SL.float().double()
    mean = x_SL.masked_fill(~mask_SL, 0.0).sum() / count
    return mean, (x_SL - mean).masked_fill(~mask_SL, 0.0).square().sum() / count


def finite_rewards(rewards_S: Tensor) -> Tensor:
    """Returns rewards ``[S]`` in fp32.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
    """
    rewards_S = rewards_S.float()
    bad = (~torch.isfinite(rewards_S)).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 16} more" if len(bad) > 16 else ""
        raise NonFiniteRewardError(
            f"{len(bad)} of {len(rewards_S)} rewards are NaN or infinite, in rollouts "
            f"{', '.join(map(str, bad[:16]))}{more} (counted from 0)"
        )
    return rewards_S


def same_shape(what: str, one: Sequence[int], other: Sequence[int]) -> None:
    """Checks that two shapes are equal.

    Raises:
        ValueError: They differ; the message has both.
    """
    if tuple(one) != tuple(other):
        raise ValueError(f"{what} differ in shape: {tuple(one)}, {tuple(other)}")
