"""The frame of all parts: device, deadline, and rows of results that are written as they come."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROWS_NAME = "rows.jsonl"
MAX_ERROR_CHARACTERS = 600


@dataclass
class Context:
    """What every part gets.

    Attributes:
        out: Directory of the results.
        device: Device that computes.
        tiny: Whether to use models and batches that a CPU computes in a moment.
        deadline: Time by the monotonic clock at which the part ends.
        part: Name of the part.
    """

    out: Path
    device: torch.device
    tiny: bool
    deadline: float
    part: str = ""
    failed: int = field(default=0, init=False)

    def left(self) -> float:
        """Returns the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def record(self, case: str, **values: Any) -> None:
        """Writes one row and prints it."""
        row = {"part": self.part, "case": case, **values}
        with (self.out / ROWS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(f"{name}={shown(value)}" for name, value in row.items()), flush=True)

    def case(self, name: str, seconds: float, run: Callable[[], dict[str, Any]]) -> None:
        """Runs one case and records its values, or why there are none.

        Args:
            name: Name of the case.
            seconds: Time that it is expected to take. With less time left it is skipped.
            run: Returns the values. ``ok`` False marks a result outside its tolerance.
        """
        if self.left() < (0 if self.tiny else seconds):
            self.record(name, skipped="no time left")
            return
        started = time.monotonic()
        try:
            values = run()
        except Exception as error:
            text = "".join(traceback.format_exception_only(error)).strip()
            place = traceback.extract_tb(error.__traceback__)[-1]
            values = {"ok": False, "error": text[-MAX_ERROR_CHARACTERS:], "at": f"{place.filename}:{place.lineno}"}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.failed += values.get("ok") is False
        self.record(name, **values, seconds=round(time.monotonic() - started, 2))

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def start_peak(self) -> None:
        """Starts a new peak of the device's memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Returns the peak of the device's memory since `start_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def shown(value: Any) -> str:
    """Formats a value for a line of text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
