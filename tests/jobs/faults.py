"""Faults that are injected into a training job: errors of many kinds at many places of a worker."""

from __future__ import annotations

import errno
import pkgutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray.train import get_context

from rlhf_critic.errors import DataError


class CannotBePickled(Exception):
    """An error of a library that holds something which does not leave its process."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


@dataclass(frozen=True)
class Fault:
    """An error, the place at which a worker raises it, and what the user then sees.

    Attributes:
        place: The function that raises it, as ``MODULE:NAME``.
        error: Makes the error.
        exit_code: Exit code of the command.
        message: Part of the one message.
    """

    place: str
    error: Callable[[], Exception]
    exit_code: int
    message: str


WORKER = "actors.training.worker"
ENGINE = "rlhf_critic.training.critic_engine:CriticEngine"
FAULTS = {
    "data": Fault(f"{WORKER}:load_data", lambda: KeyError("prompt"), 1, "KeyError at jobs/faults.py"),
    "weights": Fault(
        f"{WORKER}:WeightReader", lambda: OSError(errno.EIO, "Input/output error", "m.safetensors"), 1, "Input/output"
    ),
    "model": Fault(
        f"{ENGINE}.from_pretrained", lambda: ImportError("No module named 'flash'"), 2, "a package is missing"
    ),
    "rows": Fault(f"{ENGINE}.validate_preferences", lambda: DataError("d.jsonl:3: field 'chosen'"), 2, "d.jsonl:3"),
    "wandb": Fault(f"{WORKER}:RunLogger", lambda: CannotBePickled("no such project"), 1, "CannotBePickled"),
    "step": Fault(f"{ENGINE}.take_step", lambda: RuntimeError("shape '[2, 3]' is invalid"), 1, "shape '[2, 3]'"),
    "memory": Fault(f"{ENGINE}.take_step", lambda: torch.OutOfMemoryError("tried to get 2 GiB"), 2, "out of memory"),
    "validation": Fault(f"{ENGINE}.evaluate", lambda: ZeroDivisionError("by zero"), 1, "ZeroDivisionError"),
    "save": Fault(
        f"{ENGINE}.save", lambda: PermissionError(errno.EACCES, "Permission denied", "/mnt/x"), 2, "/mnt/x: Permission"
    ),
    "disk": Fault(f"{WORKER}:write_manifest", lambda: OSError(errno.ENOSPC, "No space left"), 2, "Free some space"),
    "report": Fault("ray.train:report", lambda: TypeError("not a number"), 1, "TypeError"),
}


def faulty_loop(loop_config: dict[str, Any]) -> Any:
    """Runs the train loop with the fault that the run is named after, and counts the attempt."""
    name = loop_config["run"]["name"]
    if get_context().get_world_rank() == 0:
        with attempts_file(loop_config["run"]["storage_path"], name).open("a") as attempts:
            attempts.write("attempt\n")
    fault = FAULTS[name]

    def fail(*_: Any, **__: Any) -> None:
        raise fault.error()

    import actors.training.worker

    module, _, names = fault.place.partition(":")
    *owners, attribute = names.split(".")
    setattr(pkgutil.resolve_name(f"{module}:{'.'.join(owners)}" if owners else module), attribute, fail)
    return actors.training.worker.train_loop(loop_config)


def attempts_file(storage_path: str, name: str) -> Path:
    """Returns the file in which each attempt at a run has a line."""
    return Path(storage_path).parent / f"{name}.attempts"
