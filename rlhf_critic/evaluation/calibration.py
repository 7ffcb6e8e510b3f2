"""Calibration of ``sigmoid(margin)`` as the probability that the chosen side wins. Knows only numbers.

A win at ``p`` and a loss at ``1 - p`` are the same preference with its sides swapped. Each preference is therefore
counted once, by its confidence ``max(p, 1 - p)`` in the side that the critic prefers. It is correct if that side was
chosen. This is the expected calibration error of Guo et al., "On Calibration of Modern Neural Networks" (2017), for
two classes. Counting both readings in mirrored bins over ``p`` gives the same sum.

Shape legend: P preferences, K bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.evaluation.bootstrap import MAX_BLOCKS, FloatArray, wins

BINS = 10  # of equal width over confidences from 0.5 to 1


@dataclass(frozen=True)
class ReliabilityBin:
    """Preferences whose confidence is in ``[low, high)``. The last bin includes 1.

    Attributes:
        low: Lower edge.
        high: Upper edge.
        preferences: Number of preferences; at least one.
        confidence: Mean confidence in the preferred side.
        accuracy: Share in which that side was chosen; a tie counts half.
    """

    low: float
    high: float
    preferences: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """Distance between confidences and accuracies.

    Attributes:
        error: Expected calibration error: the mean over preferences of their bin's ``|accuracy - confidence|``.
        error_by_chance: Mean error of a perfectly calibrated critic with these confidences. It is above zero, because
            small bins deviate by chance.
        log_loss: Mean Bradley-Terry negative log-likelihood, in nats.
        bins: Bins that are not empty.
    """

    error: float
    error_by_chance: float
    log_loss: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Calibration:
    """Reliability before and after temperature scaling of the margins.

    Attributes:
        raw: Reliability of ``sigmoid(margin)``.
        temperature: Maximum-likelihood temperature of these preferences (Guo et al., 2017); above 1 the critic is
            overconfident. None if no finite positive one exists: every margin is positive (the optimum is 0), or the
            mean margin is not positive (the optimum is infinite).
        scaled: Reliability of ``sigmoid(margin / temperature)``; None without a temperature.
    """

    raw: Reliability
    temperature: float | None
    scaled: Reliability | None


def calibrate(margin_P: FloatArray) -> Calibration:
    """Measures calibration before and after temperature scaling. Margins are chosen minus rejected rewards."""
    temperature = fit_temperature(margin_P)
    scaled = None if temperature is None else reliability(margin_P / temperature)
    return Calibration(reliability(margin_P), temperature, scaled)


def reliability(margin_P: FloatArray) -> Reliability:
    """Computes the expected calibration error of ``sigmoid(margin)`` and its bins."""
    confidence_P = 1.0 / (1.0 + np.exp(-np.abs(margin_P)))
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    right_P = wins(margin_P)
    count_K = np.bincount(bin_P, minlength=BINS)
    confidence_K = np.bincount(bin_P, confidence_P, BINS)
    right_K = np.bincount(bin_P, right_P, BINS)
    edges = np.linspace(0.5, 1.0, BINS + 1).tolist()
    return Reliability(
        error=float(np.abs(right_K - confidence_K).sum() / len(bin_P)),
        error_by_chance=_error_by_chance(bin_P, confidence_P),
        log_loss=float(np.logaddexp(0.0, -margin_P).mean()),
        bins=tuple(
            ReliabilityBin(
                low=edges[k],
                high=edges[k + 1],
                preferences=int(count_K[k]),
                confidence=float(confidence_K[k] / count_K[k]),
                accuracy=float(right_K[k] / count_K[k]),
            )
            for k in np.flatnonzero(count_K)
        ),
    )


def _error_by_chance(bin_P: NDArray[np.int64], confidence_P: FloatArray) -> float:
    """Returns the mean calibration error if each side wins with its confidence, by simulation up to `MAX_BLOCKS`.

    Above, the sum of a bin is normal with the variance of its wins, ``sum(p * (1 - p))``. The mean distance of a normal
    number from its own mean is ``sqrt(2 * variance / pi)``.
    """
    if len(bin_P) > MAX_BLOCKS:
        variance_K = np.bincount(bin_P, confidence_P * (1.0 - confidence_P), BINS)
        return float(np.sqrt(2.0 * variance_K / np.pi).sum() / len(bin_P))
    rng = np.random.default_rng(0)
    confidence_K = np.bincount(bin_P, confidence_P, BINS)
    errors = [
        np.abs(np.bincount(bin_P, rng.random(len(bin_P)) < confidence_P, BINS) - confidence_K).sum() / len(bin_P)
        for _ in range(1000)
    ]
    return float(np.mean(errors))


def fit_temperature(margin_P: FloatArray) -> float | None:
    """Computes the maximum-likelihood temperature of the preferences under ``sigmoid(margin / temperature)``.

    The log-loss is convex in the inverse temperature, so its slope has one root. Bisection finds it. Returns None if no
    finite positive temperature is optimal.
    """
    if margin_P.mean() <= 0 or margin_P.min() >= 0:
        return None

    def slope(inverse: float) -> float:
        # tanh gives sigmoid(-x) without overflow
        return float(-(margin_P * (1.0 - np.tanh(inverse * margin_P / 2)) / 2).mean())

    low, high = 0.0, 1.0 / float(np.abs(margin_P).max())
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):  # more than the bits of a float64
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)
