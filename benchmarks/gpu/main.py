"""Runs the parts on this machine, most important first, and stops in time.

Each part is a process of its own, because an error of a GPU ends the process that meets it. Rows are written as they
come, so a run that is cut off keeps what it measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.context import ROWS_NAME, Context, shown

PACKAGES = ("torch", "transformers", "deepspeed", "trl", "triton", "flash_attn", "liger_kernel")
RESERVE_S = 5.0  # for the last table


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        module: Module in this package with a function ``run``.
        seconds: Most of the time that it may take; 0 is all that later parts leave.
    """

    module: str
    seconds: float


PARTS = (Part("parity", 100), Part("engine_steps", 100), Part("speed", 0), Part("profile_step", 45))
QUICK = (Part("parity", 0),)


def main(arguments: list[str] | None = None) -> int:
    """Runs all parts, or one; returns 1 if a result is outside its tolerance."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--quick", action="store_true", help="the first part only, in 90 seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device that computes")
    parser.add_argument("--tiny", action="store_true", help="tiny models and batches, all parts in this process")
    parser.add_argument("--part", choices=[part.module for part in PARTS], help="only this part, in this process")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; check nvidia-smi, or give --device cpu --tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * (1.5 if options.quick else options.minutes)
    if options.part:
        return run_part(options, options.part, deadline)
    (options.out / ROWS_NAME).unlink(missing_ok=True)
    parts = QUICK if options.quick else PARTS
    for index, part in enumerate(parts):
        later = sum(other.seconds for other in parts[index + 1 :])
        left = deadline - time.monotonic() - RESERVE_S
        seconds = min(left, part.seconds) if part.seconds else max(left - later, 0)
        if options.tiny:
            run_part(options, part.module, deadline)
        elif seconds > RESERVE_S:
            run_process(options, part.module, seconds)
        write_results(options)
    rows = read_rows(options.out)
    print(f"\n{options.out / results_name(options.device)}\n{table_of(rows)}")
    return int(any(row.get("ok") is False for row in rows))


def run_part(options: argparse.Namespace, name: str, deadline: float) -> int:
    """Runs one part in this process."""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    context = Context(options.out, device, options.tiny, deadline, name)
    importlib.import_module(f"benchmarks.gpu.{name}").run(context)
    return int(context.failed > 0)


def run_process(options: argparse.Namespace, name: str, seconds: float) -> None:
    """Runs one part in a process of its own, and records its end if that was not its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.main", "--part", name, "--out", str(options.out)]
    command += ["--device", options.device, "--minutes", str(max(seconds - RESERVE_S, 1) / 60)]
    context = Context(options.out, torch.device("cpu"), options.tiny, 0.0, name)
    log = options.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds + RESERVE_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            context.record("end", skipped="cut off at the end of its time")
            return
    if code not in {0, 1}:
        context.record("end", ok=False, error=log.read_text(encoding="utf-8", errors="replace")[-600:])


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Reads the rows written so far."""
    path = out / ROWS_NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def results_name(device: str) -> str:
    """Returns the name of the file of results: date and card."""
    card = torch.cuda.get_device_name().replace(" ", "-") if device == "cuda" else "CPU"
    return f"{time.strftime('%Y-%m-%d')}-{card}.json"


def write_results(options: argparse.Namespace) -> None:
    """Writes everything measured so far, with card and versions."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    on_gpu = options.device == "cuda"
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "card": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "versions": found,
        "command": " ".join(sys.argv[1:]),
        "rows": read_rows(options.out),
    }
    path = options.out / results_name(options.device)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def table_of(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown."""
    lines = ["| part | case | result | values |", "|---|---|---|---|"]
    for row in rows:
        state = (
            "skipped" if "skipped" in row else "measured" if row.get("ok") is None else "ok" if row["ok"] else "FAILED"
        )
        hidden = {"part", "case", "ok", "largest"}
        values = ", ".join(f"{name} {shown(value)}" for name, value in row.items() if name not in hidden)
        lines.append(f"| {row['part']} | {row['case']} | {state} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
