"""Failure policy of a training run: another attempt only for lost workers, and one log line for each.

Ray Train's own policy takes every error of a worker for a loss. Knows nothing about what workers compute.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.train import ControllerError, WorkerGroupError
from ray.train.torch import TorchTrainer

from actors.runtime.failures import first_fault
from actors.runtime.ray_internals import DefaultFailurePolicy, FailureDecision
from actors.training.cleaner import with_quiet_cleaner
from rlhf_critic.logs import configure_logging

logger = logging.getLogger(__name__)


class RetryLost(DefaultFailurePolicy):
    """Ray Train's policy, but for errors that another attempt would meet again: those end the run."""

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        """Decides whether Ray Train starts the workers again; runs in Ray Train's controller."""
        if fault_of(training_failed_error) is not None:
            return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            configure_logging()
            logger.warning("workers lost, resuming from the last checkpoint error=%s", last_line(training_failed_error))
        return decision


class LostWorkersTrainer(TorchTrainer):
    """A ``TorchTrainer`` with the policy above and a quiet cleaner, which Ray Train has no options for."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = RetryLost(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})

    def _create_default_callbacks(self) -> list[Any]:
        return with_quiet_cleaner(super()._create_default_callbacks())


def fault_of(error: Exception) -> Exception | None:
    """Returns the error behind a failed training that another attempt would meet again; None if workers were lost."""
    if isinstance(error, WorkerGroupError):
        return first_fault(error.worker_failures.values())
    if isinstance(error, ControllerError):
        return first_fault([error.controller_failure])
    return None


def last_line(error: Exception) -> str:
    """Returns the last line of an error's text, which may be a traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
