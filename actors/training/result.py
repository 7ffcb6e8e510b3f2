"""Result of a training run: what workers report to the driver and to Ray Train about validation and the run's end.

Kept apart from the train loop, so that the driver and Ray Train's controller import no model code, which would cost
each of them seconds before the first worker starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_critic.evaluation.pointwise import PointwiseEvaluation
from rlhf_critic.evaluation.preferences import Evaluation

SCORE = "validation_log_loss"  # the metric by which Ray Train keeps the best checkpoints


@dataclass(frozen=True)
class ValidationProgress:
    """Results of validations so far; the same on all ranks, and kept in checkpoints.

    Attributes:
        best_step: Step with the lowest log-loss; 0 before the first validation.
        best_log_loss: Lowest log-loss, in nats; None before the first validation.
        without_better: Number of validations since the lowest log-loss.
    """

    best_step: int = 0
    best_log_loss: float | None = None
    without_better: int = 0

    def after(self, log_loss: float, step: int) -> ValidationProgress:
        """Returns the progress after one more validation."""
        if self.best_log_loss is None or log_loss < self.best_log_loss:
            return ValidationProgress(step, log_loss, 0)
        return replace(self, without_better=self.without_better + 1)


@dataclass(frozen=True)
class TrainOutcome:
    """Return value of a training run.

    Attributes:
        steps: Optimizer steps done.
        checkpoint: Name of the last checkpoint's directory. Ray Train does not know a checkpoint whose worker was lost
            before it reported it, so its own result may name an earlier one.
        evaluation: Evaluation of the final critic on the validation data, if there is any.
        progress: Results of validations so far.
    """

    steps: int = 0
    checkpoint: str = ""
    evaluation: Evaluation | PointwiseEvaluation | None = None
    progress: ValidationProgress = ValidationProgress()
