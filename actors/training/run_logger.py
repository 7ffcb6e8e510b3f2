"""Rank 0's record of a run: the metrics log, its copy in storage, the progress bar and, if asked for, W&B.

Other ranks wait for this one in every step, so that what cannot be written is told where all can be told, when it is
saved. Knows nothing of how a step is taken.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ray.experimental import tqdm_ray

from actors.runtime.storage import HistoryDirectory, resolve_run
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.errors import CheckpointError
from rlhf_critic.evaluation.preferences import Evaluation
from rlhf_critic.training.critic_engine import StepMetrics
from rlhf_critic.training.metrics_log import MetricsLog


class RunLogger:
    """Rank 0's record of a run: the metrics log, its copy in storage and the progress bar."""

    def __init__(self, config: TrainJobConfig, step: int, total: int) -> None:
        self._wandb = _start_wandb(config) if config.run.wandb_project else None
        self._directory = HistoryDirectory(*resolve_run(config.run.storage_path, config.run.name))
        self._log = MetricsLog(self._directory.local, step)
        self._bar = tqdm_ray.tqdm(desc="fitting", total=total, unit="step")
        self._bar.update(step)
        self._failure: OSError | None = None

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._bar.close()
        try:
            self._log.close()
            self._directory.close()
        except OSError:
            if error is None:
                raise
        if self._wandb:
            self._wandb.finish()

    def trained(self, metrics: StepMetrics, seconds: float) -> None:
        """Records an optimizer step."""
        values = {name: value for name, value in asdict(metrics).items() if name != "step"}
        self._write("train", metrics.step, {**values, "tokens_per_second": metrics.tokens / seconds})
        self._bar.set_description(f"fitting: loss {metrics.loss:.3f}, accuracy {metrics.accuracy:.2f}")
        self._bar.update(1)

    def validated(self, step: int, evaluation: Evaluation) -> None:
        """Records a validation."""
        means = {
            name: estimate["mean"]
            for name, estimate in evaluation.to_dict().items()
            if isinstance(estimate, dict) and "mean" in estimate
        }
        self._write("validation", step, means)

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        try:
            self._log.write(kind, step, values)
            self._directory.copy_up()
        except OSError as error:
            self._failure = self._failure or error
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def save(self) -> None:
        """Puts everything in storage.

        Raises:
            CheckpointError: Something could not be written, now or before.
        """
        try:
            self._log.flush()
            self._directory.copy_up(now=True)
        except OSError as error:
            self._failure = self._failure or error
        if self._failure:
            raise CheckpointError(
                f"the history of the run could not be written: {self._failure}; the checkpoints before are whole. "
                "Free some space, and go on with --resume"
            ) from self._failure


def _start_wandb(config: TrainJobConfig) -> Any:
    """A W&B run of the same name, which a resumed run continues; it reads its key from the environment by itself."""
    import wandb

    return wandb.init(
        project=config.run.wandb_project,
        name=config.run.name,
        id=config.run.name,
        resume="allow",
        config=config.model_dump(mode="json"),
    )
