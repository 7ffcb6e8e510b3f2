"""The list of commands and their common parts: logging, errors as one message and an exit code, checks of a run."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_critic.errors import ConfigError, CriticError
from rlhf_critic.logs import configure_logging

if TYPE_CHECKING:
    from pydantic import BaseModel

logger = logging.getLogger(__name__)

SCRIPT = "rlhf-critic"


@dataclass(frozen=True)
class Command:
    """A job as a command of ``rlhf-critic``."""

    module: str
    config: str  # MODULE:CLASS of its options, below rlhf_critic.config
    summary: str

    def config_class(self) -> type[BaseModel]:
        """Imports the class of its options."""
        module, _, name = self.config.partition(":")
        return getattr(importlib.import_module(f"rlhf_critic.config.{module}"), name)


COMMANDS = {
    "train": Command("jobs.train", "train:TrainJobConfig", "Train a critic on preferences."),
    "evaluate": Command("jobs.evaluate", "tools:EvaluateJobConfig", "Measure how well a critic agrees with data."),
    "inspect": Command("jobs.inspect_data", "tools:InspectJobConfig", "Count and show preferences before training."),
    "export": Command("jobs.export", "tools:ExportJobConfig", "Export a critic, or convert another reward model."),
    "serve": Command("jobs.serve", "serve:ServeJobConfig", "Serve rewards over Ray and HTTP."),
    "score": Command("jobs.score", "serve:ScoreJobConfig", "Score the responses of a data set."),
    "ppo": Command("jobs.ppo", "ppo:PPOJobConfig", "Train a policy with PPO."),
    "plan": Command("jobs.plan", "tools:PlanJobConfig", "Estimate the memory and time of a training run."),
}

EXIT_FAILED = 1
EXIT_REFUSED = 2
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)  # a full disk, or a user's quota
RAY_PACKAGE_FOLDER = "working_dir_files"  # where Ray unpacks the working directory of a submitted job


def command(name: str) -> str:
    """Returns how the user types a command: by ``rlhf-critic`` or ``python -m``, as this process was started."""
    return f"{SCRIPT} {name}" if sys.argv[0].startswith(SCRIPT) else f"python -m {COMMANDS[name].module}"


def run_job(main: Callable[[], None], *also_expected: type[Exception]) -> None:
    """Runs a command's ``main`` and exits.

    The exit code is 0 after success, 2 after an error of this project, whose message says what to change, and 1 after
    an expected failure of the system below (``also_expected``). Anything else is a bug and keeps its traceback.
    """
    # Ray, transformers and datasets report usage by default; a training job should not phone home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        configure_logging()
        main()
    except CriticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except also_expected as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        print(f"failed: {error}. Free some space; --resume continues a run that had started", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def validate_wandb(project: str | None) -> None:
    """Checks that the package for ``run.wandb_project`` is installed.

    Raises:
        ConfigError: The option is given, and the package is missing.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("run.wandb_project needs the wandb package: pip install wandb, or leave the option out")


def validate_resume(storage_path: str, name: str, exists: bool, resume: bool) -> None:
    """Checks that a run which ``exists`` is resumed on purpose, by ``--resume``.

    Raises:
        ConfigError: The run exists and the user did not ask to resume it.
    """
    if exists and not resume:
        raise ConfigError(
            f"there is a run named {name!r} in {storage_path}: continue it with --resume, or choose another --run.name"
        )
    if resume and not exists:
        logger.info("nothing to resume, starting a new run name=%s storage_path=%s", name, storage_path)


def validate_outside_package(option: str, path: str) -> None:
    """Checks that a job does not write into the copy of the working directory that Ray makes for a submitted job.

    Raises:
        ConfigError: The path, absolute or a URI, lies in such a copy, which Ray deletes at any time.
    """
    if "://" not in path and RAY_PACKAGE_FOLDER in Path(path).parts:
        raise ConfigError(
            f"{option}: {path} lies in the copy of the working directory that Ray makes for a submitted job and may "
            "delete; give an absolute path outside it, or a URI"
        )
