"""Comparison of two critics on the same preferences, by a paired bootstrap. Knows only numbers.

Shape legend: P preferences.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.evaluation.bootstrap import BootstrapEstimate, FloatArray, bootstrap_mean, wins


@dataclass(frozen=True)
class Comparison:
    """Differences of two critics, each the first critic's figure minus the second one's.

    Resamples draw preferences, so both critics are measured on the same ones (a paired bootstrap; Efron, 1979).

    Attributes:
        preferences: Number of preferences that both critics scored.
        accuracy: Accuracy of each critic.
        accuracy_difference: Difference of accuracies.
        log_loss_difference: Difference of log-losses, in nats; lower is better.
        agreement: Share of the preferences on which they prefer the same side.
        correlation: Correlation of their margins; None if one of them does not vary.
    """

    preferences: int
    accuracy: tuple[float, float]
    accuracy_difference: BootstrapEstimate
    log_loss_difference: BootstrapEstimate
    agreement: float
    correlation: float | None

    def to_dict(self) -> dict[str, object]:
        """Converts to nested plain values, for JSON."""
        return asdict(self)


def compare_margins(first_P: FloatArray, second_P: FloatArray) -> Comparison:
    """Compares the margins that two critics give the same preferences."""
    losses = [np.logaddexp(0.0, -margin_P) for margin_P in (first_P, second_P)]
    varies = first_P.std() > 0 and second_P.std() > 0
    return Comparison(
        preferences=len(first_P),
        accuracy=(float(wins(first_P).mean()), float(wins(second_P).mean())),
        accuracy_difference=bootstrap_mean(wins(first_P) - wins(second_P)),
        log_loss_difference=bootstrap_mean(losses[0] - losses[1]),
        agreement=float((np.sign(first_P) == np.sign(second_P)).mean()),
        correlation=float(np.corrcoef(first_P, second_P)[0, 1]) if varies else None,
    )


def most_different(first_P: FloatArray, second_P: FloatArray, count: int) -> NDArray[np.int64]:
    """Returns the preferences whose margins differ most. Each critic's margins are divided by their deviation."""
    scaled = [margin_P / (margin_P.std() or 1.0) for margin_P in (first_P, second_P)]
    return np.abs(scaled[0] - scaled[1]).argsort(kind="stable")[::-1][:count]
