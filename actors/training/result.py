"""What a training run tells its driver and Ray Train: how validation went, and how the run ended.

Apart from the workers' loop, so that the driver and Ray Train's controller need no model code: that costs each of them
seconds before the first worker starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_critic.errors import CriticError
from rlhf_critic.evaluation.preferences import Evaluation

SCORE = "validation_log_loss"  # the metric by which Ray Train keeps the best checkpoints


@dataclass(frozen=True)
class ValidationProgress:
    """What validations have shown so far; the same on all ranks, and kept in checkpoints.

    Attributes:
        best_step: The step with the lowest log-loss; 0 before the first validation.
        best_log_loss: That log-loss, in nats; None before the first validation.
        without_better: Validations since.
    """

    best_step: int = 0
    best_log_loss: float | None = None
    without_better: int = 0

    def after(self, log_loss: float, step: int) -> ValidationProgress:
        """The progress with one validation more."""
        if self.best_log_loss is None or log_loss < self.best_log_loss:
            return ValidationProgress(step, log_loss, 0)
        return replace(self, without_better=self.without_better + 1)


@dataclass(frozen=True)
class TrainOutcome:
    """What a training run returns to its driver.

    Attributes:
        error: Why the run ended early: an error that another try would meet again. Ray Train would retry an exception,
            so such errors are returned instead of raised.
        steps: Optimizer steps done.
        checkpoint: The name of the last one's directory. (Ray Train tells none that it did not see made: one whose
            worker was lost before it was told, where that one was the last.)
        evaluation: Of the final critic on the validation data, where there is any.
        progress: How validation went.
    """

    error: CriticError | None = None
    steps: int = 0
    checkpoint: str = ""
    evaluation: Evaluation | None = None
    progress: ValidationProgress = ValidationProgress()
