"""Runs contenders side by side: a process per run, interleaved, over several rounds, with medians.

The machine may be shared and noisy, so only ratios of interleaved runs are meaningful. Knows nothing about the work of
a contender, which takes a specification as JSON and prints its result as JSON on the last line.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Specification = dict[str, Any]
Result = dict[str, Any]
PROCESS_TIMEOUT_S = 1200
PACKAGES = ("torch", "transformers", "deepspeed", "trl")
console = Console(stderr=False)


def run(module: str, specification: Specification, threads: int) -> Result:
    """Runs ``python -m MODULE SPECIFICATION`` with a number of threads.

    Raises:
        RuntimeError: The process failed. Contains the end of its output.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
    }
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(specification)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {specification} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def contender(work: Callable[[Specification], Result]) -> None:
    """Does the work of the specification on the command line and prints its result; the counterpart of `run`."""
    result = work(json.loads(sys.argv[1]))
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\n" + json.dumps(result))


@dataclass(frozen=True)
class Rounds:
    """Results of contenders over several rounds.

    Attributes:
        results: Results of each contender, one per round.
    """

    results: dict[str, list[Result]]

    def values(self, contender: str, key: str) -> list[float]:
        """Returns one number of every round."""
        return [result[key] for result in self.results[contender]]

    def median(self, contender: str, key: str) -> float:
        """Returns the median of a number over the rounds."""
        return statistics.median(self.values(contender, key))

    def ratios(self, contender: str, other: str, key: str) -> list[float]:
        """Returns the ratio of the numbers of two contenders, per round."""
        return [a / b for a, b in zip(self.values(contender, key), self.values(other, key), strict=True)]


def interleave(module: str, contenders: Mapping[str, Specification], rounds: int, threads: int) -> Rounds:
    """Runs all contenders in turn, for a number of rounds."""
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for number in range(rounds):
        # Every second round is in reverse order, so that no contender always runs on the warmer machine.
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            started = time.perf_counter()
            results[name].append(run(module, contenders[name], threads))
            progress(f"round {number + 1} of {rounds}: {name} ({time.perf_counter() - started:.0f} s)")
    return Rounds(results)


def progress(message: str) -> None:
    """Prints a progress note to standard error."""
    print(message, file=sys.stderr, flush=True)


def matrix_product_rate(threads: int, size: int = 2048, repeats: int = 5) -> float:
    """Measures the floating-point operations per second of one large fp32 matrix product."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the measured packages."""
    return {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column != columns[0] else "left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)
