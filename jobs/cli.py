"""The list of commands and their common parts: logging, errors as one message and an exit code, checks of a run."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_critic.errors import ConfigError, describe_error
from rlhf_critic.logs import LEVEL_VARIABLE, configure_logging, shows_debug

if TYPE_CHECKING:
    from pydantic import BaseModel

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
    "calibrate": Command("jobs.calibrate", "tools:CalibrateJobConfig", "Give a critic's rewards a standard deviation."),
    "inspect": Command("jobs.inspect_data", "tools:InspectJobConfig", "Count and show preferences before training."),
    "export": Command("jobs.export", "tools:ExportJobConfig", "Export a critic, or convert another reward model."),
    "average": Command("jobs.average", "tools:AverageJobConfig", "Average the weights of several critics."),
    "serve": Command("jobs.serve", "serve:ServeJobConfig", "Serve rewards over Ray and HTTP."),
    "score": Command("jobs.score", "serve:ScoreJobConfig", "Score the responses of a data set."),
    "ppo": Command("jobs.ppo", "ppo:PPOJobConfig", "Train a policy with PPO."),
    "plan": Command("jobs.plan", "tools:PlanJobConfig", "Estimate the memory and time of a training run."),
}

EXIT_FAILED = 1
EXIT_REFUSED = 2
DEBUG_OPTION = "--debug"
RAY_PACKAGE_FOLDER = "working_dir_files"  # where Ray unpacks the working directory of a submitted job


def command(name: str) -> str:
    """Returns how the user types a command: by ``rlhf-critic`` or ``python -m``, as this process was started."""
    return f"{SCRIPT} {name}" if sys.argv[0].startswith(SCRIPT) else f"python -m {COMMANDS[name].module}"


def run_job(main: Callable[[], None]) -> None:
    """Runs a command's ``main`` and exits.

    The exit code is 0 after success, 2 after an error that the user can change something about, and 1 after a failure
    of the program or the machine. Either is one message. ``--debug`` adds the traceback, and all log lines.
    """
    # Ray, transformers and datasets report usage by default; a training job should not phone home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal or file in ASCII shows a text all the same
    if DEBUG_OPTION in sys.argv[1:]:
        sys.argv.remove(DEBUG_OPTION)
        os.environ[LEVEL_VARIABLE] = "DEBUG"
    try:
        configure_logging()
        main()
    except Exception as error:
        described = describe_error(error)
        first = "error" if described.exit_code == EXIT_REFUSED else "failed"
        print(f"{first}: {described}", file=sys.stderr)
        if shows_debug():
            print(described.trace, file=sys.stderr)
        elif described.exit_code == EXIT_FAILED:
            print(f"{DEBUG_OPTION} shows the traceback", file=sys.stderr)
        sys.exit(described.exit_code)


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
