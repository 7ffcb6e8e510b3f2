"""Trains, serves and publishes together for some minutes, and kills a process every few seconds.

    python -m tests.soak --minutes 10 --json

Callers ask a pool of scorers through Ray and over HTTP while new critics are published to it; `jobs.train` trains a
critic again and again. The seed decides what is killed and in which order; each kill is SIGKILL. Other faults are in
`tests.soak.chaos`. The soak checks:

- no request is lost, and every answer is that of the version it names;
- replicas do not serve several critics for more than a minute;
- a component that hangs is reported, and other calls are answered;
- every training run ends with the weights of an undisturbed run;
- at the end no actor, process, shared memory or open file is left over, and no process has grown all the time.

It prints each violation and then exits with code 1.
"""

from __future__ import annotations

import json
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", RAY_USAGE_STATS_ENABLED="0", DS_ACCELERATOR="cpu")

import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ray
import tyro
from ray import serve
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from actors.serving import control
from tests.soak.chaos import Chaos, Killer, MixedWatch
from tests.soak.growth import (
    Watcher,
    living_actors,
    object_store_bytes,
    reserved_groups,
    shared_memory,
    wait_for_none,
)
from tests.soak.load import Callers, Publisher, Trainer
from tests.soak.world import Tally, World

# The first third is a warm-up. In the other two thirds no process that lives through all of it may grow faster than
# this. Over a few minutes allocators and Ray's bounded tables still fill, and every new worker opens log files, so a
# short soak reports both figures without a limit.
MAX_MIB_A_MINUTE = 3.0
MAX_MORE_FILES = 8
# Files that a raylet holds open for each of its processes (measured), and so for each actor that Ray keeps.
FILES_OF_A_PROCESS = 3
MIN_LIMITED_MINUTES = 5.0


@dataclass(frozen=True)
class Options:
    """Length of the soak, and how often it kills."""

    minutes: float = 10.0
    """Minutes during which processes are killed; start and end take more."""
    kill_every_s: float = 15.0
    """Seconds between kills."""
    seed: int = 0
    """Seed that decides what is killed."""
    steps: int = 200
    """Optimizer steps of each training run."""
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on the last line of standard output."""


def soak(options: Options, directory: Path, tally: Tally) -> dict[str, Any]:
    """Runs the world for its time; returns all figures except the counts."""
    orphans_before = shared_memory()
    world = World(directory, options.steps)
    trainer = Trainer(world, tally)
    watcher, callers = Watcher(), Callers(world, tally, options.seed)
    publisher = Publisher(world, tally, callers.clients[0])
    killer = Killer(tally, trainer, options.seed)
    chaos = Chaos(world, tally, callers.clients[1], publisher.publishing)
    mixed = MixedWatch(tally)
    object_store_before = object_store_bytes()
    started = time.monotonic()
    ends = started + 60 * options.minutes
    next_kill = started + options.kill_every_s
    with tqdm(total=round(60 * options.minutes), unit="s", desc="soaking", disable=None) as bar:
        while (now := time.monotonic()) < ends:
            if now >= next_kill:
                killer.kill_one()
                next_kill += options.kill_every_s
            answered, wrong = tally.counts["requests answered"], len(tally.problems)
            bar.set_postfix(answered=answered, kills=tally.kills.total(), problems=wrong)
            bar.update(round(now - started) - bar.n)
            time.sleep(0.2)
    ended = time.monotonic()
    lives = watcher.long_lives(started, ended)
    for part in (chaos, publisher, callers, trainer, mixed):
        part.end()
    object_store = wait_for_none(object_store_bytes, 10)
    control.stop("scorers")
    serve.shutdown()
    left: dict[str, Any] = {"actors": wait_for_none(living_actors), "placement groups": wait_for_none(reserved_groups)}
    kept_by_ray = Counter(living_actors(of_ray=True))
    watcher.end()
    ray.shutdown()
    left["processes"] = [watcher.seen[one] for one in wait_for_none(watcher.alive)]
    left["shared-memory segments"] = sorted(shared_memory() - orphans_before)
    for what, remaining in left.items():
        if remaining:
            tally.problem(f"{what} left over", str(remaining))
    limited = options.minutes >= MIN_LIMITED_MINUTES
    for life in lives if limited else []:
        if life["mib_a_minute"] > MAX_MIB_A_MINUTE:
            tally.problem("memory that grows", f"{life['process']}: {life['mib_a_minute']:.2f} MiB a minute")
        of_ray = FILES_OF_A_PROCESS * kept_by_ray["QuietCleaner"] if life["process"] == "raylet" else 0
        if life["more_files"] > MAX_MORE_FILES + of_ray:
            tally.problem("open files that grow", f"{life['process']}: {life['more_files']:g} more")
    return {
        "minutes": (ended - started) / 60,
        "longest_mixed_s": mixed.longest_s,
        "left_over": {what: len(remaining) for what, remaining in left.items()},
        "object_store_bytes": (object_store_before, object_store),
        # A worker that is killed while it saves leaves an unfinished copy in the temporary directory.
        "unfinished_checkpoints_in_tmp": len(list(directory.glob("rlhf-critic-*"))),
        "actors_kept_by_ray": kept_by_ray,
        "long_lives": lives,
        "memory_limited": limited,
    }


WANTED = ("requests sent", "requests answered", "publishes done", "runs finished")
OF_FAULTS = ("swaps that failed once", "seconds to heal", "hanging components reported")


def show(console: Console, tally: Tally, figures: dict[str, Any]) -> None:
    """Prints counts, growth and problems."""
    table = Table(title=f"{figures['minutes']:.1f} minutes", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    wrong = ("requests lost", "wrong answers", "publishes failed", "runs failed", "runs with other weights")
    for what in (*WANTED, "runs resumed", *OF_FAULTS, *wrong):
        table.add_row(what, f"{tally.counts[what]:,}")
    table.add_row("seconds with several critics, at most", f"{figures['longest_mixed_s']:.0f}")
    for kind, number in sorted(tally.kills.items()):
        table.add_row(f"killed: {kind}", str(number))
    for what, number in figures["left_over"].items():
        table.add_row(f"{what} left over", str(number))
    for name, number in figures["actors_kept_by_ray"].items():
        table.add_row(f"actors that Ray keeps: {name}", str(number))
    before, after = figures["object_store_bytes"]
    table.add_row("object store, bytes: at the start, at the end", f"{before:,}, {after:,}")
    table.add_row("unfinished checkpoints in the temporary directory", str(figures["unfinished_checkpoints_in_tmp"]))
    console.print(table)
    lives = Table(title="Processes that lived through the last two thirds", title_justify="left")
    for column in ("process", "MiB", "MiB a minute", "open files", "more files"):
        lives.add_column(column, justify="left" if column == "process" else "right")
    for life in figures["long_lives"]:
        numbers = (f"{life['mib']:.0f}", f"{life['mib_a_minute']:+.2f}", str(life["files"]), f"{life['more_files']:+g}")
        lives.add_row(life["process"], *numbers)
    console.print(lives)
    for problem in tally.problems:
        console.print(f"problem: {problem}", markup=False, highlight=False)
    console.print("no problems" if not tally.problems else f"{len(tally.problems)} problems")


def main() -> None:
    """Runs the soak, prints its result and exits with 1 if there was a problem."""
    options = tyro.cli(Options, prog="python -m tests.soak", description=__doc__)
    directory = Path(tempfile.mkdtemp(prefix="soak-"))  # short, for Ray's sockets are in it
    os.environ.update(TMPDIR=str(directory), RAY_TMPDIR=str(directory))
    os.environ.pop("RAY_ADDRESS", None)
    tempfile.tempdir = None
    tally = Tally()
    try:
        figures = soak(options, directory, tally)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    unanswered = tally.counts["requests sent"] - tally.counts["requests answered"] - tally.counts["requests lost"]
    if unanswered:
        tally.problem("requests lost", f"{unanswered} got neither an answer nor an error")
    for what in WANTED:
        if not tally.counts[what]:
            tally.problem("never happened", what)
    if not tally.kills:
        tally.problem("never happened", "a kill")
    show(Console(stderr=options.json_line), tally, figures)
    if options.json_line:
        told = {"counts": tally.counts, "kills": tally.kills, "problems": tally.problems, **figures}
        print(json.dumps(told))
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
