"""``make critic-demo``: PPO with a critic against the baseline of a group, where one early word decides the reward.

Each run is a process of its own, and finished runs are kept, so the command can be interrupted.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jobs.cli import run_job
from jobs.critic_demo_task import ITERATIONS, PROMPTS, SAMPLES, Baseline, join_alone, save_model, train
from rlhf_critic.evaluation.plots import save_comparison
from rlhf_critic.files import write_text_atomically

logger = logging.getLogger(__name__)

DIRECTORY = Path("runs/critic-demo")
PLOT_NAME = "curves.png"
SEEDS = (0, 1, 2)
LABELS: dict[Baseline, str] = {"critic": "critic", "rloo": "RLOO (group of 8)"}
VARIED = (0.1, 0.9)  # mean rewards between which returns vary enough to be explained
Records = list[dict[str, Any]]


def main() -> None:
    """Makes all runs, draws their curves and prints the result."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    model = DIRECTORY / "model"
    if not model.exists():
        save_model(model)
    wanted = [(baseline, seed) for seed in SEEDS for baseline in LABELS]
    # Processes that are spawned, because each joins a process group of its own.
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(wanted), os.cpu_count() or 1))
    with ProcessPoolExecutor(workers, context, initializer=_start) as pool:
        done = list(pool.map(_run, *zip(*wanted, strict=True)))
    runs: dict[Baseline, list[Records]] = {baseline: [] for baseline in LABELS}
    for (baseline, _), records in zip(wanted, done, strict=True):
        runs[baseline].append(records)
    save_comparison({LABELS[name]: records for name, records in runs.items()}, DIRECTORY / PLOT_NAME)
    show(Console(), runs)


def _start() -> None:
    import torch

    torch.set_num_threads(1)
    join_alone()


def _run(baseline: Baseline, seed: int) -> Records:
    path = DIRECTORY / f"{baseline}-{seed}.json"
    if not path.exists():
        write_text_atomically(path, json.dumps(train(str(DIRECTORY / "model"), baseline, seed)))
        logger.info("finished run baseline=%s seed=%d", baseline, seed)
    records: Records = json.loads(path.read_text(encoding="utf-8"))
    return records


def explained(records: Records) -> float:
    """Returns the mean explained variance of a run over the iterations whose rewards vary; NaN if none does."""
    low, high = VARIED
    shares = [one["explained_variance"] for one in records if low <= one["reward"] <= high]
    return float(np.mean(shares)) if shares else float("nan")


def show(console: Console, runs: Mapping[Baseline, Sequence[Records]]) -> None:
    """Prints the rewards of all runs, and what the critic explains."""
    table = Table(title=f"Mean reward of three seeds, {PROMPTS * SAMPLES} rollouts an iteration", title_justify="left")
    for column in ("baseline", "all iterations", f"last 10 of {ITERATIONS}", "iterations to 0.8", "explained variance"):
        table.add_column(column, justify="left" if column == "baseline" else "right")
    for name, of_seeds in runs.items():
        rewards = np.array([[one["reward"] for one in records] for records in of_seeds])
        reached = [int(np.argmax(row >= 0.8)) + 1 if (row >= 0.8).any() else None for row in rewards]
        shares = f"{np.mean([explained(records) for records in of_seeds]):.2f}" if name == "critic" else "-"
        cells = [f"{part.mean():.3f} ± {part.mean(1).std(ddof=1):.3f}" for part in (rewards, rewards[:, -10:])]
        table.add_row(LABELS[name], *cells, ", ".join(map(str, reached)), shares)
    console.print(table)
    console.print(f"curves: {DIRECTORY / PLOT_NAME}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_job(main)
