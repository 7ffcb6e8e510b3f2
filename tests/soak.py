"""Trains, serves and publishes together for some minutes, and kills a process every few seconds.

    python -m tests.soak --minutes 10 --json

Callers ask a pool of scorers through Ray and over HTTP while new critics are published to it; `jobs.train` trains a
critic again and again. The seed decides what is killed and in which order; each kill is SIGKILL. Other faults are in
`tests.soak_chaos`. The soak checks:

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

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import ray
import torch
import tyro
from numpy.typing import NDArray
from ray import serve
from ray._private.internal_api import node_stats
from ray.util.placement_group import placement_group_table
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tqdm import tqdm

from actors.runtime.session import init_ray
from actors.serving import control
from actors.serving.handle import connect
from jobs.serve import read_token, run_pool
from rlhf_critic.config.serve import ServeJobConfig
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.http_client import connect_http
from rlhf_critic.scoring.items import Conversation
from tests.actors.scorers import make_conversations, rewards_by_engine, save_tiny_critic
from tests.helpers import save_tiny_model, write_preferences
from tests.soak_chaos import COMPONENTS, Chaos, MixedWatch

TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-6
VERSIONS = 3
REPLICAS = 3
ROWS_A_CALL = 8
DEADLINE_S = 120.0
PAUSE_S = 0.05  # a caller waits so long between its calls
PUBLISH_EVERY_S = 6.0
WATCH_EVERY_S = 2.0
TRAIN_TIMEOUT_S = 400.0
GONE_TIMEOUT_S = 90.0
# Detached actors that Ray starts and no job can end. The first lives as long as the cluster once a training job has
# run. Ray 2.60 starts the second for each training driver; where the driver is killed, it does its work and stays.
OF_RAY = {"_AutoscalingCoordinatorActor", "QuietCleaner"}
# The first third is a warm-up. In the other two thirds no process that lives through all of it may grow faster than
# this. Over a few minutes allocators and Ray's bounded tables still fill, and every new worker opens log files, so a
# short soak reports both figures without a limit.
MAX_MIB_A_MINUTE = 3.0
MAX_MORE_FILES = 8
# Files that a raylet holds open for each of its processes (measured), and so for each actor that Ray keeps.
FILES_OF_A_PROCESS = 3
MIN_LIMITED_MINUTES = 5.0
MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")
REPOSITORY = Path(__file__).parents[1]


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


@dataclass
class Tally:
    """Counts and problems, which many threads add."""

    counts: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, number: int = 1) -> None:
        """Counts an event."""
        with self._lock:
            self.counts[what] += number

    def problem(self, what: str, message: str) -> None:
        """Counts a violation, and keeps the first few of its messages."""
        with self._lock:
            self.counts[what] += 1
            if self.counts[what] <= 5:
                self.problems.append(f"{what}: {message}")


class World:
    """A separate Ray with a pool, the items to score and their rewards."""

    def __init__(self, directory: Path, steps: int) -> None:
        self.directory = directory
        self.model = save_tiny_model(directory / "model", tie_word_embeddings=False)
        self.items = make_conversations(60)
        self.critics = {
            f"soak@{seed}": save_tiny_critic(self.model, directory / f"critic-{seed}", seed, f"soak@{seed}")
            for seed in range(VERSIONS)
        }
        self.rewards = {version: rewards_by_engine(path, self.items) for version, path in self.critics.items()}
        options = {
            "model": {"path": self.model},
            "encoding": {"max_length": 64},
            "data": {
                "train": write_preferences(directory / "train.jsonl", 90),
                "cache_dir": str(directory / "cache"),
            },
            "train": {
                "global_batch_size": 6,
                "epochs": 1000,
                "max_steps": steps,
                "learning_rate": 1e-3,
                "token_budget": 300,
                "checkpoint_every": max(1, steps // 10),
            },
            "run": {"num_workers": 2, "storage_path": str(directory / "runs"), "max_failures": 1000},
        }
        self.options = directory / "train.yaml"
        self.options.write_text(json.dumps(options))  # JSON is YAML
        init_ray(address="local", num_cpus=8, logging_level="ERROR", log_to_driver=False)
        self.ray_address = ray.get_runtime_context().gcs_address
        token_file = str(directory / "token")
        components = directory / "components.yaml"
        components.write_text(COMPONENTS)
        config = ServeJobConfig(
            checkpoint=self.critics["soak@0"],
            port=free_port(),
            auth="on",
            token_file=token_file,
            components=str(components),
            min_replicas=REPLICAS,
            max_replicas=REPLICAS,
            cpus_per_shard=0.5,
            start_timeout_s=DEADLINE_S,
        )
        self.url, _, _ = run_pool(config, lambda _: None)
        self.token = read_token(token_file)

    def train(self, name: str, on_start: Callable[[subprocess.Popen[str]], None] = lambda _: None) -> tuple[int, str]:
        """Runs ``jobs.train --resume``; returns its exit code and its output."""
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.train", "--config", str(self.options), "--run.name", name, "--resume"],
            cwd=REPOSITORY,
            env={**os.environ, "RAY_ADDRESS": self.ray_address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        on_start(process)
        output, _ = process.communicate(timeout=TRAIN_TIMEOUT_S)
        return process.returncode, output

    def take_weights(self, name: str) -> dict[str, torch.Tensor]:
        """Returns the weights at the end of a run, and removes the run."""
        run = self.directory / "runs" / name
        weights: dict[str, torch.Tensor] = load_file(max(run.glob("step-*")) / "model.safetensors")
        shutil.rmtree(run)
        return weights


def free_port() -> int:
    """Returns a free port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Callers:
    """Threads that ask for random items until the end, and check each answer."""

    def __init__(self, world: World, tally: Tally, seed: int) -> None:
        self.clients = [
            connect(deadline_s=DEADLINE_S),
            connect(deadline_s=DEADLINE_S),
            connect_http(world.url, world.token, deadline_s=DEADLINE_S),
        ]
        self._world, self._tally = world, tally
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(client, random.Random(seed + number)), daemon=True)
            for number, client in enumerate(self.clients)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Waits for the last answers."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * DEADLINE_S)
        for client in self.clients:
            client.close()

    def _ask_on(self, client: ScorerClient, rng: random.Random) -> None:
        items, tally = self._world.items, self._tally
        while not self._ended.wait(PAUSE_S):
            rows = rng.sample(range(len(items)), ROWS_A_CALL)
            tally.count("requests sent")
            try:
                scores = client.score_items([items[row] for row in rows])
            except Exception as error:  # any failure loses the request
                tally.problem("requests lost", f"{type(error).__name__}: {error}")
                continue
            tally.count("requests answered")
            wanted = self._world.rewards.get(scores.model_version.split("#")[0], np.full(len(items), np.nan))[rows]
            difference = float(np.abs(scores.rewards_S - wanted).max())
            if not difference < TOLERANCE:
                tally.problem("wrong answers", f"{scores.model_version} is off by {difference}")


class Publisher:
    """Thread that publishes one critic after the other, and checks that the pool serves it."""

    def __init__(self, world: World, tally: Tally, client: ScorerClient) -> None:
        self._world, self._tally, self._client = world, tally, client
        self.publishing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._publish_on, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Waits for the last publication."""
        self._ended.set()
        self._thread.join(2 * DEADLINE_S)

    def _publish_on(self) -> None:
        versions = list(self._world.critics)
        probe: list[Conversation] = self._world.items[:1]
        number = 0
        while not self._ended.wait(PUBLISH_EVERY_S):
            number += 1
            version = versions[number % len(versions)]
            try:
                with self.publishing:
                    told = control.publish("scorers", self._world.critics[version], DEADLINE_S, lambda _: None)
                    served = self._client.score_items(probe).model_version
            except Exception as error:  # any failure counts
                self._tally.problem("publishes failed", f"{type(error).__name__}: {error}")
                continue
            self._tally.count("publishes done")
            if told != served or told.split("#")[0] != version:
                self._tally.problem("publishes not served", f"{version}: told {told}, served {served}")


class Trainer:
    """Thread that trains again and again, and resumes a run whose driver was killed."""

    def __init__(self, world: World, tally: Tally) -> None:
        self._world, self._tally = world, tally
        code, output = world.train("undisturbed")
        if code:
            raise RuntimeError(f"jobs.train failed before anything was killed:\n{output[-4000:]}")
        self._undisturbed = world.take_weights("undisturbed")
        self.driver: subprocess.Popen[str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._train_on, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Waits for the current training run."""
        self._ended.set()
        self._thread.join(2 * TRAIN_TIMEOUT_S)
        if self._thread.is_alive():
            self._tally.problem("runs failed", f"the last run did not end within {2 * TRAIN_TIMEOUT_S:g} s")

    def _train_on(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            name = f"run-{number}"
            while True:
                try:
                    code, output = self._world.train(name, self._set_driver)
                except subprocess.TimeoutExpired:
                    self._tally.problem("runs failed", f"{name} did not end within {TRAIN_TIMEOUT_S:g} s")
                    return
                if code != -signal.SIGKILL:
                    break
                self._tally.count("runs resumed")
            self.driver = None
            if code:
                self._tally.problem("runs failed", f"{name}: exit code {code}: {output[-2000:]}")
                continue
            weights = self._world.take_weights(name)
            difference = max(float((weights[key] - self._undisturbed[key]).abs().max()) for key in self._undisturbed)
            self._tally.count("runs finished")
            if weights.keys() != self._undisturbed.keys() or not difference < WEIGHT_TOLERANCE:
                self._tally.problem("runs with other weights", f"{name} is off by {difference}")

    def _set_driver(self, driver: subprocess.Popen[str]) -> None:
        self.driver = driver


class Killer:
    """Kills processes; spares one replica, so that the growth of a long-lived one can be measured."""

    def __init__(self, tally: Tally, trainer: Trainer, seed: int) -> None:
        self._tally, self._trainer = tally, trainer
        self._rng = random.Random(seed)
        self._spared = min(pids_of("ray::ServeReplica:scorers:Scorer"), default=0)
        self._kinds: dict[str, Callable[[], list[int]]] = {
            "replica": lambda: [pid for pid in pids_of("ray::ServeReplica:scorers:Scorer") if pid != self._spared],
            "HTTP gateway": lambda: pids_of("ray::ServeReplica:scorers:Gateway"),
            "HTTP proxy": lambda: pids_of("ray::ProxyActor"),
            "pool board": lambda: pids_of("ray::ReplicaStatus"),
            "training worker": lambda: pids_of("ray::RayTrainWorker"),
            "training driver": self._driver,
        }

    def kill_one(self) -> None:
        """Kills one process, of a kind that exists at the moment."""
        kinds = list(self._kinds)
        self._rng.shuffle(kinds)
        for kind in kinds:
            victims = self._kinds[kind]()
            if victims:
                with suppress(ProcessLookupError):
                    os.kill(self._rng.choice(sorted(victims)), signal.SIGKILL)
                    self._tally.kills[kind] += 1
                return

    def _driver(self) -> list[int]:
        driver = self._trainer.driver
        return [driver.pid] if driver is not None and driver.poll() is None else []


def pids_of(title: str) -> list[int]:
    """Returns the descendants of this process whose title begins with a text."""
    return [process.pid for process in psutil.Process().children(recursive=True) if title_of(process).startswith(title)]


def title_of(process: psutil.Process) -> str:
    """Returns the title of a process, or an empty text where it has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Watcher:
    """Thread that records the memory and the open files of each process."""

    def __init__(self) -> None:
        self.seen: dict[psutil.Process, str] = {}
        self._samples: dict[psutil.Process, list[tuple[float, int, int]]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch_on, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ends the recording."""
        self._ended.set()
        self._thread.join()

    def _watch_on(self) -> None:
        myself = psutil.Process()
        while not self._ended.wait(WATCH_EVERY_S):
            for process in [myself, *myself.children(recursive=True)]:
                with suppress(psutil.Error):
                    memory = process.memory_info()
                    sample = (time.monotonic(), memory.rss - memory.shared, process.num_fds())
                    self._samples.setdefault(process, []).append(sample)
                    title = "this program: callers, publisher" if process == myself else short_title(title_of(process))
                    self.seen[process] = title or self.seen.get(process, "")

    def long_lives(self, start: float, until: float) -> list[dict[str, Any]]:
        """Returns the growth of each process that lived from ``start`` on, in the last two thirds."""
        since = start + (until - start) / 3
        lives = []
        for process, samples in self._samples.items():
            if samples[0][0] > start + 2 * WATCH_EVERY_S or samples[-1][0] < until - 2 * WATCH_EVERY_S:
                continue
            within: NDArray[np.float64] = np.array([sample for sample in samples if since <= sample[0] <= until])
            if len(within) < 4:
                continue
            fifth = max(1, len(within) // 5)
            lives.append(
                {
                    "process": self.seen[process],
                    "mib": float(within[-1, 1] / MIB),
                    "mib_a_minute": float(np.polyfit(within[:, 0] / 60, within[:, 1] / MIB, 1)[0]),
                    "files": int(within[-1, 2]),
                    "more_files": float(np.median(within[-fifth:, 2]) - np.median(within[:fifth, 2])),
                }
            )
        return sorted(lives, key=lambda life: -life["mib_a_minute"])

    def alive(self) -> list[psutil.Process]:
        """Returns the recorded processes that have not ended, without this one."""
        return [one for one in self.seen if one != psutil.Process() and one.is_running() and title_of(one)]


def short_title(title: str) -> str:
    """Returns a title without arguments: ``raylet``, ``ray::ServeReplica:scorers:Scorer``, ``dashboard/agent.py``."""
    words = title.split(" ")
    if words[1:2] == ["-m"]:
        return f"python {words[1]} {words[2]}"
    scripts = [word for word in words[1:] if word.endswith(".py")]
    if scripts and Path(words[0]).name.startswith("python"):  # other programs name scripts that they start
        return "/".join(Path(scripts[0]).parts[-2:])
    return Path(words[0]).name if "/" in words[0] else words[0]


def shared_memory() -> set[str]:
    """Returns the shared-memory segments that no living process has open."""
    there = {str(path) for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            there -= {mapped.path for mapped in process.memory_maps()}
            there -= {opened.path for opened in process.open_files()}
    return there


def wait_for_none(left: Callable[[], Any], seconds: float = GONE_TIMEOUT_S) -> Any:
    """Waits until ``left()`` is empty, or until the time is over; returns its last result."""
    deadline = time.monotonic() + seconds
    while (remaining := left()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return remaining


def living_actors(of_ray: bool = False) -> list[str]:
    """Returns the classes of living actors: either those of this project and Serve, or those that Ray keeps."""
    table = ray._private.state.actors()
    alive = [actor["ActorClassName"] for actor in table.values() if actor["State"] != "DEAD"]
    return [name for name in alive if (name in OF_RAY) == of_ray]


def reserved_groups() -> list[str]:
    """Returns the placement groups that were not removed."""
    return [name for name, entry in placement_group_table().items() if entry["state"] != "REMOVED"]


def object_store_bytes() -> int:
    """Returns the bytes in Ray's object store."""
    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(stats.store_stats.object_store_bytes_used)


def soak(options: Options, directory: Path, tally: Tally) -> dict[str, Any]:
    """Runs the world for its time; returns all figures except the counts."""
    orphans_before = shared_memory()
    world = World(directory, options.steps)
    trainer = Trainer(world, tally)
    watcher, callers = Watcher(), Callers(world, tally, options.seed)
    publisher = Publisher(world, tally, callers.clients[0])
    killer = Killer(tally, trainer, options.seed)
    gateways = partial(pids_of, "ray::ServeReplica:scorers:Gateway")
    chaos = Chaos(world, tally, callers.clients[1], publisher.publishing, gateways)
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
