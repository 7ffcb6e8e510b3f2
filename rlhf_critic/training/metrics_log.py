"""History of a run: ``metrics.jsonl``, one JSON object a line, and the same numbers for TensorBoard.

Knows nothing about the meaning of the numbers or where the directory is finally stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rlhf_critic.files import write_text_atomically

HISTORY_JSONL = "metrics.jsonl"


class MetricsLog:
    """Appends measurements to a run's history.

    Args:
        directory: Directory of ``metrics.jsonl`` and the ``tensorboard`` folder; created if missing.
        resume_step: Step from which the run resumes. Later lines of an interrupted run are removed, because those
            steps are taken again. So each step is in the history once.
    """

    def __init__(self, directory: str | Path, resume_step: int) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / HISTORY_JSONL
        if path.exists():
            write_text_atomically(
                path, "".join(line for line in _complete_lines(path) if json.loads(line)["step"] <= resume_step)
            )
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of a kind, ``train`` or ``validation``, by their names, measured after so many steps."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Writes everything to disk."""
        self._board.flush()  # the file is flushed after each record

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._board.close()


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a history."""
    return [json.loads(line) for line in _complete_lines(Path(directory) / HISTORY_JSONL)]


def _complete_lines(path: Path) -> list[str]:
    """Returns the complete lines; a process that was killed may leave an incomplete one."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
