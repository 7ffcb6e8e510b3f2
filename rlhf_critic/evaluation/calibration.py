"""Whether ``sigmoid(margin)`` is the probability that it claims to be. Knows only numbers.

A preference read the other way round is a loss at ``1 - p`` where it was a win at ``p``, so both readings say the same.
Each preference is therefore counted once, by its confidence ``max(p, 1 - p)`` in the side that the critic prefers, and
is right where that side was chosen. That is the expected calibration error of Guo et al., "On Calibration of Modern
Neural Networks" (2017), for two classes; over ``p`` in mirrored bins, both readings together, the sum is the same.

Shape legend: P preferences, K bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_critic.evaluation.bootstrap import FloatArray, wins

BINS = 10  # of equal width over confidences from 0.5 to 1
CHANCE_DRAWS = 1000
BISECTIONS = 60


@dataclass(frozen=True)
class ReliabilityBin:
    """The preferences whose confidence is in ``[low, high)``; the last bin includes 1.

    Attributes:
        low: Its lower edge.
        high: Its upper edge.
        preferences: How many there are; at least one.
        confidence: Mean confidence in the preferred side.
        accuracy: Share in which that side was chosen, a tie half.
    """

    low: float
    high: float
    preferences: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How far confidences are from accuracies.

    Attributes:
        error: Expected calibration error: the mean over preferences of their bin's ``|accuracy - confidence|``.
        error_by_chance: What a perfectly calibrated critic with these confidences would show on average, because a bin
            of few preferences is off by luck alone.
        log_loss: Mean Bradley-Terry negative log-likelihood, in nats.
        bins: Those that are not empty.
    """

    error: float
    error_by_chance: float
    log_loss: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Calibration:
    """Reliability as it is, and with the margins divided by a temperature.

    Attributes:
        raw: Of ``sigmoid(margin)``.
        temperature: The most likely one, fitted to these very preferences (Guo et al., 2017); above 1 the critic is too
            sure of itself. None where there is none: every margin has the right sign (the smaller the better), or the
            mean margin is not positive (the larger the better).
        scaled: Of ``sigmoid(margin / temperature)``; None without a temperature.
    """

    raw: Reliability
    temperature: float | None
    scaled: Reliability | None


def calibrate(margin_P: FloatArray, seed: int = 0) -> Calibration:
    """Measures calibration, fits a temperature and measures again.

    Args:
        margin_P: Chosen minus rejected reward; at least one.
        seed: Of the draws behind ``error_by_chance``.
    """
    temperature = fit_temperature(margin_P)
    return Calibration(
        raw=reliability(margin_P, seed),
        temperature=temperature,
        scaled=None if temperature is None else reliability(margin_P / temperature, seed),
    )


def reliability(margin_P: FloatArray, seed: int = 0) -> Reliability:
    """The expected calibration error of ``sigmoid(margin)``, and what it is made of."""
    confidence_P = 1.0 / (1.0 + np.exp(-np.abs(margin_P)))
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    right_P = wins(margin_P)
    count_K = np.bincount(bin_P, minlength=BINS)
    confidence_K = np.bincount(bin_P, confidence_P, BINS)
    right_K = np.bincount(bin_P, right_P, BINS)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    rng = np.random.default_rng(seed)
    errors_by_chance = [
        np.abs(np.bincount(bin_P, rng.random(len(bin_P)) < confidence_P, BINS) - confidence_K).sum() / len(bin_P)
        for _ in range(CHANCE_DRAWS)
    ]
    return Reliability(
        error=float(np.abs(right_K - confidence_K).sum() / len(bin_P)),
        error_by_chance=float(np.mean(errors_by_chance)),
        log_loss=float(np.logaddexp(0.0, -margin_P).mean()),
        bins=tuple(
            ReliabilityBin(
                low=float(edges[k]),
                high=float(edges[k + 1]),
                preferences=int(count_K[k]),
                confidence=float(confidence_K[k] / count_K[k]),
                accuracy=float(right_K[k] / count_K[k]),
            )
            for k in np.flatnonzero(count_K)
        ),
    )


def fit_temperature(margin_P: FloatArray) -> float | None:
    """The temperature at which the preferences are most likely under ``sigmoid(margin / temperature)``.

    The log-loss is convex in the inverse temperature, so its slope there has one root, which is bisected.

    Returns:
        None where no finite positive temperature is the most likely.
    """
    if margin_P.mean() <= 0 or margin_P.min() >= 0:
        return None

    def slope(inverse: float) -> float:
        # sigmoid(-x) by tanh, which does not overflow
        return float(-(margin_P * (1.0 - np.tanh(inverse * margin_P / 2)) / 2).mean())

    low, high = 0.0, 1.0 / float(np.abs(margin_P).max())
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)
