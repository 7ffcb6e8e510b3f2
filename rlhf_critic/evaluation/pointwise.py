"""How well values agree with ratings, outcomes and step labels, with confidence intervals. Takes only numbers.

A value is a rating, or the log-odds of a label: ``sigmoid(value)`` is the probability that the label is true.

Shape legend: N rows, A targets of all rows of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.errors import NonFiniteRewardError
from rlhf_critic.evaluation.bootstrap import (
    BootstrapEstimate,
    FloatArray,
    bootstrap_mean,
    bootstrap_statistic,
    wins,
)
from rlhf_critic.evaluation.calibration import Calibration, calibrate

NORMAL_QUANTILE = 1.959964  # of 97.5%


@dataclass(frozen=True)
class RatingEvaluation:
    """Agreement of rewards with ratings.

    Attributes:
        rows: Number of rated responses.
        spearman: Spearman's rank correlation; None if all ratings or all rewards are equal.
        pearson: Pearson's correlation; None likewise.
        squared_error: Mean squared error, the loss of training.
    """

    rows: int
    spearman: BootstrapEstimate | None
    pearson: BootstrapEstimate | None
    squared_error: BootstrapEstimate


@dataclass(frozen=True)
class LabelEvaluation:
    """Agreement of rewards with labels.

    Attributes:
        rows: Number of labelled responses.
        positive: Share of true labels.
        accuracy: Share of labels on whose side the reward is; a reward of 0 counts half.
        auc: Area under the ROC curve, with DeLong's interval; None if all labels are equal.
        log_loss: Mean cross-entropy in nats.
        calibration: Calibration of ``sigmoid(reward)``; see `rlhf_critic.evaluation.calibration`.
    """

    rows: int
    positive: float
    accuracy: BootstrapEstimate
    auc: BootstrapEstimate | None
    log_loss: BootstrapEstimate
    calibration: Calibration


@dataclass(frozen=True)
class StepEvaluation:
    """Agreement of step values with step labels.

    The first wrong step is scored as in Zheng et al., "ProcessBench" (2024): a row is right if the first step with a
    value below 0 is the first wrong one, or if there is neither. F1 is the harmonic mean of the shares of right rows
    among rows with a wrong step and among rows without.

    Attributes:
        rows: Number of responses with labelled steps.
        steps: Number of labelled steps.
        first_wrong_f1: ProcessBench's F1; None if all rows have a wrong step, or none has.
        first_wrong_found: Share of right rows among those with a wrong step; None without such rows.
        correct_found: Share of right rows among those without a wrong step; None without such rows.
        accuracy: Share of steps on whose side the value is; a value of 0 counts half.
        auc: Area under the ROC curve of all steps; None if all labels are equal.
        log_loss: Mean over the rows of the mean cross-entropy of their steps, in nats.
        calibration: Calibration of ``sigmoid(value)`` of all steps.
    """

    rows: int
    steps: int
    first_wrong_f1: BootstrapEstimate | None
    first_wrong_found: BootstrapEstimate | None
    correct_found: BootstrapEstimate | None
    accuracy: BootstrapEstimate
    auc: BootstrapEstimate | None
    log_loss: BootstrapEstimate
    calibration: Calibration


@dataclass(frozen=True)
class PointwiseEvaluation:
    """Agreement of values with the targets of pointwise rows.

    Attributes:
        rows: Number of rows.
        log_loss: Mean loss of the rows of all kinds, as in training, without weights.
        score: Figures of rows with a rating; None without such rows.
        label: Figures of rows with an outcome; None without such rows.
        steps: Figures of rows with labelled steps; None without such rows.
        reward_mean: Mean reward of all rows.
        reward_std: Standard deviation of the rewards.
    """

    rows: int
    log_loss: BootstrapEstimate
    score: RatingEvaluation | None
    label: LabelEvaluation | None
    steps: StepEvaluation | None
    reward_mean: float
    reward_std: float

    @property
    def measure(self) -> tuple[str, BootstrapEstimate]:
        """The figure that describes the critic best, with its name."""
        if self.steps:
            f1 = self.steps.first_wrong_f1
            return ("F1 of the first wrong step", f1) if f1 else ("accuracy of steps", self.steps.accuracy)
        if self.label:
            return "accuracy of labels", self.label.accuracy
        assert self.score, "an evaluation has rows of some kind"
        spearman = self.score.spearman
        return ("Spearman correlation", spearman) if spearman else ("squared error", self.score.squared_error)

    def to_dict(self) -> dict[str, object]:
        """Converts to nested plain values, for JSON."""
        return asdict(self)


def evaluate_pointwise(
    kinds: Sequence[str],
    targets: Sequence[NDArray[Any]],
    values: Sequence[NDArray[Any]],
    rewards_N: NDArray[Any],
) -> PointwiseEvaluation:
    """Compares values with targets.

    Args:
        kinds: Kind of each row: ``score``, ``label`` or ``steps``.
        targets: Targets of each row.
        values: Values at the tokens of the targets of each row.
        rewards_N: Reward of each row.

    Raises:
        ValueError: There is no row.
        NonFiniteRewardError: A value is NaN or infinite.
    """
    if not len(kinds):
        raise ValueError("there is no row to evaluate")
    if not np.isfinite(np.concatenate([*values, rewards_N])).all():
        raise NonFiniteRewardError("a value is NaN or infinite; use another critic")
    losses_N = losses_of_rows(kinds, targets, values)

    def rows_of(kind: str) -> list[int]:
        return [row for row, one in enumerate(kinds) if one == kind]

    def flat(arrays: Sequence[NDArray[Any]], rows: list[int]) -> FloatArray:
        return np.concatenate([arrays[row] for row in rows]).astype(np.float64)

    scored, labelled, stepped = map(rows_of, ("score", "label", "steps"))
    return PointwiseEvaluation(
        rows=len(kinds),
        log_loss=bootstrap_mean(losses_N),
        score=_ratings(flat(values, scored), flat(targets, scored)) if scored else None,
        label=_labels(flat(values, labelled), flat(targets, labelled)) if labelled else None,
        steps=_steps([values[row] for row in stepped], [targets[row] for row in stepped]) if stepped else None,
        reward_mean=float(rewards_N.mean()),
        reward_std=float(rewards_N.std()),
    )


def losses_of_rows(kinds: Sequence[str], targets: Sequence[NDArray[Any]], values: Sequence[NDArray[Any]]) -> FloatArray:
    """Computes the mean loss of the targets of each row, float64 ``[N]``; see `evaluate_pointwise`."""
    return np.array(
        [
            np.square(value - target).mean() if kind == "score" else _cross_entropy(value, target).mean()
            for kind, target, value in zip(kinds, targets, values, strict=True)
        ],
        dtype=np.float64,
    )


def correlation(x_A: FloatArray, y_A: FloatArray) -> BootstrapEstimate | None:
    """Computes Pearson's correlation and its percentile-bootstrap interval; None if a side is constant."""
    if np.ptp(x_A) == 0 or np.ptp(y_A) == 0:
        return None

    def pearson(rows: NDArray[np.int64]) -> float:
        x, y = x_A[rows] - x_A[rows].mean(), y_A[rows] - y_A[rows].mean()
        norm = np.sqrt(np.square(x).sum() * np.square(y).sum())
        return float((x * y).sum() / norm) if norm else 0.0

    return bootstrap_statistic(pearson, len(x_A))


def ranks(x_A: FloatArray) -> FloatArray:
    """Returns the rank of each number, from 1; equal numbers share their mean rank."""
    _, inverse_A, counts = np.unique(x_A, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse_A]


def area_under_roc(values_A: FloatArray, is_true_A: NDArray[np.bool_]) -> BootstrapEstimate | None:
    """Computes the area under the ROC curve with a 95% interval; None if all labels are equal.

    The area is the probability that a true row has the higher value; a tie counts half. The interval is that of DeLong
    et al., "Comparing the areas under two or more correlated ROC curves" (1988), cut at 0 and 1.
    """
    true_A, false_A = values_A[is_true_A], values_A[~is_true_A]
    if not len(true_A) or not len(false_A):
        return None
    ranks_A = ranks(values_A)
    # Share of the rows of the other label that each row is above of.
    above_false = (ranks_A[is_true_A] - ranks(true_A)) / len(false_A)
    below_true = 1.0 - (ranks_A[~is_true_A] - ranks(false_A)) / len(true_A)
    area = float(above_false.mean())
    variance = sum(part.var(ddof=1) / len(part) for part in (above_false, below_true) if len(part) > 1)
    half = NORMAL_QUANTILE * float(np.sqrt(variance))
    return BootstrapEstimate(area, max(0.0, area - half), min(1.0, area + half))


def first_wrong(is_wrong: NDArray[np.bool_]) -> int:
    """Returns the index of the first wrong step, or -1."""
    return int(is_wrong.argmax()) if is_wrong.any() else -1


def _ratings(values_A: FloatArray, targets_A: FloatArray) -> RatingEvaluation:
    return RatingEvaluation(
        rows=len(values_A),
        spearman=correlation(ranks(values_A), ranks(targets_A)),
        pearson=correlation(values_A, targets_A),
        squared_error=bootstrap_mean(np.square(values_A - targets_A)),
    )


def _labels(values_A: FloatArray, targets_A: FloatArray) -> LabelEvaluation:
    is_true_A = targets_A > 0.5
    margin_A = np.where(is_true_A, values_A, -values_A)
    return LabelEvaluation(
        rows=len(values_A),
        positive=float(is_true_A.mean()),
        accuracy=bootstrap_mean(wins(margin_A)),
        auc=area_under_roc(values_A, is_true_A),
        log_loss=bootstrap_mean(_cross_entropy(values_A, targets_A)),
        calibration=calibrate(margin_A),
    )


def _steps(values: Sequence[NDArray[Any]], targets: Sequence[NDArray[Any]]) -> StepEvaluation:
    values_A, targets_A = np.concatenate(values).astype(np.float64), np.concatenate(targets).astype(np.float64)
    flat = _labels(values_A, targets_A)
    wrong_N = np.array([first_wrong(target <= 0.5) for target in targets])
    found_N = np.array([first_wrong(value < 0) for value in values])
    right_N = (wrong_N == found_N).astype(np.float64)
    has_error_N = wrong_N >= 0

    def f1(rows: NDArray[np.int64]) -> float:
        right, has_error = right_N[rows], has_error_N[rows]
        shares = [float(right[which].mean()) if which.any() else 0.0 for which in (has_error, ~has_error)]
        return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0

    of_kind = [bootstrap_mean(right_N[which]) if which.any() else None for which in (has_error_N, ~has_error_N)]
    return StepEvaluation(
        rows=len(values),
        steps=len(values_A),
        first_wrong_f1=bootstrap_statistic(f1, len(values)) if all(of_kind) else None,
        first_wrong_found=of_kind[0],
        correct_found=of_kind[1],
        accuracy=flat.accuracy,
        auc=flat.auc,
        log_loss=bootstrap_mean(
            np.array([_cross_entropy(value, target).mean() for value, target in zip(values, targets, strict=True)])
        ),
        calibration=flat.calibration,
    )


def _cross_entropy(values: NDArray[Any], targets: NDArray[Any]) -> FloatArray:
    values_A, targets_A = values.astype(np.float64), targets.astype(np.float64)
    return targets_A * np.logaddexp(0.0, -values_A) + (1.0 - targets_A) * np.logaddexp(0.0, values_A)
