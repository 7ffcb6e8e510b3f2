"""How often rewards agree with labelled preferences, with confidence intervals. Takes only rewards and lengths.

Shape legend: P preferences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.errors import NonFiniteRewardError
from rlhf_critic.evaluation.bootstrap import BootstrapEstimate, FloatArray, IntArray, bootstrap_mean, wins
from rlhf_critic.evaluation.calibration import Calibration, calibrate
from rlhf_critic.evaluation.length_control import length_controlled_accuracy


@dataclass(frozen=True)
class SubsetAccuracy:
    """Figures of one subset; see `Evaluation`. The name is empty for preferences without a tag."""

    name: str
    preferences: int
    accuracy: BootstrapEstimate
    length_baseline: BootstrapEstimate


@dataclass(frozen=True)
class Evaluation:
    """Agreement of rewards with preferences.

    Attributes:
        preferences: Number of preferences.
        accuracy: Share in which the chosen side has the higher reward; a tie counts half.
        margin: Mean of chosen minus rejected reward.
        log_loss: Mean Bradley-Terry negative log-likelihood, in nats; guessing gives ln 2.
        length_controlled_accuracy: Accuracy if both sides were equally long, or None; see
            `rlhf_critic.evaluation.length_control`.
        length_baseline: Accuracy of "the longer side wins" (in tokens); a tie counts half.
        accuracy_where_shorter_wins: Accuracy over preferences whose chosen side is shorter; None if there are none.
        reward_mean: Mean of all rewards.
        reward_std: Standard deviation of all rewards.
        calibration: Calibration of ``sigmoid(margin)``; see `rlhf_critic.evaluation.calibration`.
        subsets: Figures of each subset, the largest first; empty if no preference has a tag.
    """

    preferences: int
    accuracy: BootstrapEstimate
    margin: BootstrapEstimate
    log_loss: BootstrapEstimate
    length_controlled_accuracy: BootstrapEstimate | None
    length_baseline: BootstrapEstimate
    accuracy_where_shorter_wins: BootstrapEstimate | None
    reward_mean: float
    reward_std: float
    calibration: Calibration
    subsets: tuple[SubsetAccuracy, ...]

    def to_dict(self) -> dict[str, object]:
        """Converts to nested plain values, for JSON."""
        return asdict(self)


def evaluate_rewards(
    chosen_rewards: Sequence[float] | FloatArray,
    rejected_rewards: Sequence[float] | FloatArray,
    lengths_P2: NDArray[np.int64],
    subsets_P: NDArray[np.str_] | None = None,
    rows_P: NDArray[np.int64] | None = None,
) -> Evaluation:
    """Compares the rewards of chosen and rejected sides.

    Args:
        chosen_rewards: Rewards of the chosen sides ``[P]``.
        rejected_rewards: Rewards of the rejected sides ``[P]``.
        lengths_P2: Tokens of the chosen and the rejected side.
        subsets_P: Tag of each preference, or empty; None if no preference has a tag.
        rows_P: Row of the data that each preference is from. The pairs of a ranking depend on each other, so intervals
            resample rows. None if each preference is a row.

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
            f"{len(bad_rows)} of {len(rewards_P2)} preferences have a reward that is NaN or infinite; the first is "
            f"number {bad_rows[0] + 1}; use another critic"
        )
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    is_plain = rows_P is None or len(np.unique(rows_P)) == len(rows_P)

    def mean(sample_P: FloatArray, chosen: IntArray | NDArray[np.bool_] | slice = slice(None)) -> BootstrapEstimate:
        return bootstrap_mean(sample_P[chosen], groups_P=None if is_plain or rows_P is None else rows_P[chosen])

    longer_P = (lengths_P2[:, 0] - lengths_P2[:, 1]).astype(np.float64)
    right_P = wins(margin_P)
    shorter_wins = longer_P < 0
    return Evaluation(
        preferences=len(margin_P),
        accuracy=mean(right_P),
        margin=mean(margin_P),
        log_loss=mean(np.logaddexp(0.0, -margin_P)),
        length_controlled_accuracy=length_controlled_accuracy(margin_P, lengths_P2, None if is_plain else rows_P),
        length_baseline=mean(wins(longer_P)),
        accuracy_where_shorter_wins=mean(right_P, shorter_wins) if shorter_wins.any() else None,
        reward_mean=float(rewards_P2.mean()),
        reward_std=float(rewards_P2.std()),
        calibration=calibrate(margin_P),
        subsets=tuple(
            SubsetAccuracy(name, len(rows), mean(right_P, rows), mean(wins(longer_P), rows))
            for name, rows in ([] if subsets_P is None else rows_of_subsets(subsets_P))
        ),
    )


def rows_of_subsets(subsets_P: NDArray[np.str_]) -> list[tuple[str, NDArray[np.int64]]]:
    """Returns the rows of each subset, the largest first, or an empty list if no row has a tag."""
    names, inverse_P = np.unique(subsets_P, return_inverse=True)
    rows = np.split(inverse_P.argsort(kind="stable"), np.bincount(inverse_P).cumsum()[:-1])
    named = zip(names.tolist(), rows, strict=True)
    return sorted(named, key=lambda one: -len(one[1])) if any(names.tolist()) else []
