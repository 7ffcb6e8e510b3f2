"""Record of a run: ``metrics.jsonl``, TensorBoard and, if asked for, Weights & Biases, with a copy in remote storage.

One process of a run holds it, and other processes wait for that one in every step. So a failed write is reported when
the history is saved, where all processes can fail together. Knows nothing about what is measured.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from inspect import signature
from typing import Any

from actors.runtime.storage import HistoryDirectory
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.training.metrics_log import MetricsLog

WITHOUT_KEY = ("offline", "disabled", "dryrun")  # modes of W&B


def validate_wandb_package(project: str | None) -> None:
    """Checks that the package for ``run.wandb_project`` is installed.

    Raises:
        ConfigError: The option is given, and the package is missing.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("run.wandb_project needs the wandb package: pip install wandb, or leave the option out")


def validate_wandb(project: str | None) -> None:
    """Checks that Weights & Biases has a key or is offline, in the process that will hold the history.

    Raises:
        ConfigError: The option is given, and the package or the key is missing.
    """
    validate_wandb_package(project)
    if not project or os.environ.get("WANDB_MODE") in WITHOUT_KEY:
        return
    import wandb

    if "prompt" not in signature(wandb.login).parameters:  # an older version, which would ask the user
        return
    if not wandb.login(prompt=False, verify=False):
        raise _wandb_error("no API key")


def _wandb_error(why: str) -> ConfigError:
    return ConfigError(
        f"run.wandb_project: Weights & Biases did not start: {why}. Run wandb login or set WANDB_API_KEY where the job "
        "runs, set WANDB_MODE=offline, or leave the option out"
    )


class RunLogger:
    """History of a run; a context manager that closes it.

    Args:
        directory: Directory of the history.
        resume_step: Step that the run resumes from; see `rlhf_critic.training.metrics_log.MetricsLog`.
        name: Name of the run. W&B shows it, and continues its run of this name.
        wandb_project: W&B project that receives the history too; None for none.
        options: Options of the run, for W&B.
    """

    def __init__(
        self,
        directory: HistoryDirectory,
        resume_step: int,
        name: str,
        wandb_project: str | None,
        options: dict[str, Any],
    ) -> None:
        self._wandb: Any = None
        if wandb_project:
            import wandb  # which reads its key from the environment

            try:
                self._wandb = wandb.init(project=wandb_project, name=name, id=name, resume="allow", config=options)
            except Exception as error:  # of many kinds: no key, no network, no such project
                raise _wandb_error(str(error)) from error
        self._directory = directory
        self._log = MetricsLog(directory.local, resume_step)
        self._failure: OSError | None = None

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            self._log.close()
            self._directory.close()
        except OSError:
            if error is None:
                raise
        finally:
            if self._wandb:
                self._wandb.finish()

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Records numbers measured at a step. A write that fails is reported by the next `save`.

        Args:
            kind: ``train`` or ``validation``.
            step: Optimizer steps or iterations done.
            values: Numbers by name.
        """
        try:
            self._log.write(kind, step, values)
            self._directory.copy_up()
        except OSError as error:
            self._failure = self._failure or error
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def save(self) -> None:
        """Writes everything to storage.

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
                f"the history of the run could not be written: {self._failure}; earlier checkpoints are complete. "
                "Free some space, then continue with --resume"
            ) from self._failure
