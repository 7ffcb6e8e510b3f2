"""How well rewards agree with preferences, with confidence intervals. Knows only numbers: rewards and lengths.

Shape legend: P preferences, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.errors import NonFiniteRewardError

FloatArray = NDArray[np.float64]
BOOTSTRAP_RESAMPLES = 2000
BOOTSTRAP_CHUNK = 100  # resamples drawn at a time, so that memory stays at 100 x P numbers
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% percentile-bootstrap interval (Efron, 1979)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Evaluation:
    """Agreement of rewards with preferences.

    Attributes:
        preferences: How many were judged.
        accuracy: Share in which the chosen side has the higher reward; a tie counts half.
        margin: Mean of chosen minus rejected reward.
        log_loss: Mean Bradley-Terry negative log-likelihood, in nats; ln 2 is a coin.
        length_baseline: Accuracy of "the longer side wins" (in tokens); a tie counts half.
        accuracy_where_shorter_wins: Accuracy over the preferences whose chosen side is the shorter; None without any.
        reward_mean: Mean of all rewards.
        reward_std: Their standard deviation.
    """

    preferences: int
    accuracy: Estimate
    margin: Estimate
    log_loss: Estimate
    length_baseline: Estimate
    accuracy_where_shorter_wins: Estimate | None
    reward_mean: float
    reward_std: float

    def to_dict(self) -> dict[str, object]:
        """As nested plain values, for JSON."""
        return asdict(self)


def evaluate_rewards(
    chosen_rewards: Sequence[float] | FloatArray,
    rejected_rewards: Sequence[float] | FloatArray,
    lengths_P2: NDArray[np.int64],
    seed: int = 0,
) -> Evaluation:
    """Compares the rewards of chosen and rejected sides.

    Args:
        chosen_rewards: ``[P]``.
        rejected_rewards: ``[P]``.
        lengths_P2: Tokens of the chosen and the rejected side.
        seed: Of the bootstrap.

    Raises:
        ValueError: Shapes differ, or there is no preference.
        NonFiniteRewardError: A reward is NaN or infinite.
    """
    rewards_P2 = np.stack([np.asarray(chosen_rewards), np.asarray(rejected_rewards)], axis=1).astype(np.float64)
    if rewards_P2.shape != lengths_P2.shape or not len(rewards_P2):
        raise ValueError(f"rewards {rewards_P2.shape} and lengths {lengths_P2.shape} must both be [P, 2] with P > 0")
    bad_rows = np.flatnonzero(~np.isfinite(rewards_P2).all(axis=1))
    if len(bad_rows):
        raise NonFiniteRewardError(
            f"{len(bad_rows)} of {len(rewards_P2)} preferences have a reward that is not finite, the first is number "
            f"{bad_rows[0] + 1}; this critic cannot be used"
        )
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    longer_P = (lengths_P2[:, 0] - lengths_P2[:, 1]).astype(np.float64)
    right_P = wins(margin_P)
    shorter_wins = longer_P < 0
    return Evaluation(
        preferences=len(margin_P),
        accuracy=bootstrap_mean(right_P, seed),
        margin=bootstrap_mean(margin_P, seed),
        log_loss=bootstrap_mean(np.logaddexp(0.0, -margin_P), seed),
        length_baseline=bootstrap_mean(wins(longer_P), seed),
        accuracy_where_shorter_wins=bootstrap_mean(right_P[shorter_wins], seed) if shorter_wins.any() else None,
        reward_mean=float(rewards_P2.mean()),
        reward_std=float(rewards_P2.std()),
    )


def wins(difference_P: FloatArray) -> FloatArray:
    """1 where positive, 0 where negative, 0.5 at a tie."""
    return (np.sign(difference_P) + 1.0) / 2.0


def bootstrap_mean(sample_P: FloatArray, seed: int = 0) -> Estimate:
    """The mean of a sample and its percentile-bootstrap interval."""
    rng = np.random.default_rng(seed)
    means_B = np.concatenate(
        [
            sample_P[rng.integers(0, len(sample_P), (BOOTSTRAP_CHUNK, len(sample_P)))].mean(axis=1)
            for _ in range(BOOTSTRAP_RESAMPLES // BOOTSTRAP_CHUNK)
        ]
    )
    low, high = np.quantile(means_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(sample_P.mean()), float(low), float(high))
