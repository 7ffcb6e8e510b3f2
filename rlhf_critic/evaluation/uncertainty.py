"""Value of the uncertainty of rewards: calibration with and without it, and how well it finds wrong judgements.

Knows only numbers.

Shape legend: P preferences, S responses.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.evaluation.bootstrap import BootstrapEstimate, FloatArray, bootstrap_mean, wins
from rlhf_critic.evaluation.calibration import reliability

QUANTILES = 5


@dataclass(frozen=True)
class QuantileError:
    """Error rate of the preferences in a range of uncertainty.

    Attributes:
        low: Lowest standard deviation of a margin in the range.
        high: Highest one.
        preferences: Number of preferences.
        error: Share of wrong judgements; a tie counts half.
    """

    low: float
    high: float
    preferences: int
    error: BootstrapEstimate


@dataclass(frozen=True)
class OtherDomain:
    """Uncertainty on texts of another domain.

    Attributes:
        source: The texts.
        responses: Number of responses.
        mean_std: Mean standard deviation of their rewards.
        auroc: Probability that a response of the other domain is more uncertain than one of the evaluated data.
    """

    source: str
    responses: int
    mean_std: float
    auroc: float


@dataclass(frozen=True)
class UncertaintyEvaluation:
    """Figures of the uncertainty of a calibrated critic.

    Attributes:
        temperature: Temperature of the calibration.
        mean_std: Mean standard deviation of rewards.
        log_loss: Log-loss of ``sigmoid(margin)``, in nats.
        log_loss_scaled: That of ``sigmoid(margin / temperature)``.
        log_loss_uncertain: That of the probabilities with uncertainty; see docs/uncertainty.md.
        error: Expected calibration error of ``sigmoid(margin)``.
        error_scaled: That with the temperature.
        error_uncertain: That with uncertainty.
        error_by_quantile: Error rates in ranges of uncertainty with equal numbers of preferences, in ascending order.
        auroc_std: Probability that a wrong judgement has a larger deviation of its margin than a right one; None
            without wrong or without right judgements.
        auroc_margin: The same for the smaller margin.
        auroc_probability: The same for the probability nearer to one half, with uncertainty.
        other_domain: Texts of another domain against the evaluated ones; None if there are none.
    """

    temperature: float
    mean_std: float
    log_loss: float
    log_loss_scaled: float
    log_loss_uncertain: float
    error: float
    error_scaled: float
    error_uncertain: float
    error_by_quantile: tuple[QuantileError, ...]
    auroc_std: float | None
    auroc_margin: float | None
    auroc_probability: float | None
    other_domain: OtherDomain | None = None

    def to_dict(self) -> dict[str, object]:
        """Converts to nested plain values, for JSON."""
        return asdict(self)


def evaluate_uncertainty(
    margin_P: FloatArray, margin_std_P: FloatArray, std_S: FloatArray, temperature: float
) -> UncertaintyEvaluation:
    """Measures what standard deviations tell about labelled preferences.

    Args:
        margin_P: Chosen minus rejected rewards.
        margin_std_P: Standard deviations of the margins.
        std_S: Standard deviations of the rewards.
        temperature: Temperature of the calibration.
    """
    uncertain_P = margin_P / np.sqrt(temperature**2 + math.pi / 8 * margin_std_P**2)
    raw, scaled, uncertain = map(reliability, (margin_P, margin_P / temperature, uncertain_P))
    wrong_P = 1.0 - wins(margin_P)
    order = margin_std_P.argsort(kind="stable")
    parts = [part for part in np.array_split(order, QUANTILES) if len(part)]
    return UncertaintyEvaluation(
        temperature=temperature,
        mean_std=float(std_S.mean()),
        log_loss=raw.log_loss,
        log_loss_scaled=scaled.log_loss,
        log_loss_uncertain=uncertain.log_loss,
        error=raw.error,
        error_scaled=scaled.error,
        error_uncertain=uncertain.error,
        error_by_quantile=tuple(
            QuantileError(
                float(margin_std_P[part[0]]), float(margin_std_P[part[-1]]), len(part), bootstrap_mean(wrong_P[part])
            )
            for part in parts
        ),
        auroc_std=auroc(margin_std_P, wrong_P > 0.5),
        auroc_margin=auroc(-np.abs(margin_P), wrong_P > 0.5),
        auroc_probability=auroc(-np.abs(uncertain_P), wrong_P > 0.5),
    )


def auroc(score_S: FloatArray, is_positive_S: NDArray[np.bool_]) -> float | None:
    """Computes the probability that a positive sample has a higher score than a negative one; a tie counts half.

    It is the area under the receiver operating characteristic. None without positive or without negative samples.
    """
    positives, negatives = int(is_positive_S.sum()), int((~is_positive_S).sum())
    if not positives or not negatives:
        return None
    _, group_S, count_G = np.unique(score_S, return_inverse=True, return_counts=True)
    rank_G = count_G.cumsum() - (count_G - 1) / 2.0  # mean rank of equal scores, from 1
    rank_sum = float(rank_G[group_S[is_positive_S]].sum())
    return (rank_sum - positives * (positives + 1) / 2.0) / (positives * negatives)
