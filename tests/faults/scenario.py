"""Faults on a head node without work and three nodes: nodes are lost, drivers die, disks fill, files are damaged.

Every fault hits a run in its middle, and every run has the options of an undisturbed one, so all must end with the same
weights.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster
from safetensors.numpy import load_file

from actors.ppo.critic_group import CriticGroup, CriticOptions
from actors.serving import control
from actors.serving.handle import DEFAULT_APP
from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER
from rlhf_critic.config.model import EncodingConfig, ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.errors import CheckpointError, RankLost
from rlhf_critic.training.metrics_log import read_metrics
from tests.actors.groups import make_rollouts
from tests.actors.scorers import Calls
from tests.helpers import run_command, save_tiny_model, wait_until, write_preferences

NODES, WORKERS = 3, 2
STEPS, CHECKPOINT_EVERY, STRIKE_AFTER = 60, 15, 20
UPDATES, SAVED_AFTER = 12, 4
OBJECT_STORE_BYTES = 100 * 1024**2
TIMEOUT_S = 400.0  # generous: the machine may have other things to do
DISK = "16m"
SLOWNESS, SLICE_S = 10, 0.2
CALLERS, PAUSE_S = 3, 0.05


def observe(directory: Path) -> dict[str, Any]:
    world = World(directory)
    first = world.start("undisturbed")
    seen: dict[str, Any] = {"undisturbed": first.end()}
    for fault in (node_of_worker, driver_killed, slow_rank, full_disk, damaged, node_of_shard, node_of_scorer):
        started = time.monotonic()
        seen[fault.__name__] = fault(world)
        seen[fault.__name__]["seconds"] = round(time.monotonic() - started, 1)
        print(f"{fault.__name__} took {seen[fault.__name__]['seconds']} s", flush=True)
    return seen


class World:
    """The cluster, and the options of its runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = save_tiny_model(directory / "model", tie_word_embeddings=False)
        data = write_preferences(directory / "train.jsonl", 90)
        self.options = {
            "model": {"path": self.model},
            "encoding": {"max_length": 64},
            "data": {"train": data, "cache_dir": str(directory / "cache")},
            "train": {
                "global_batch_size": 6,
                "epochs": STEPS / 15,
                "learning_rate": 1e-3,
                "token_budget": 300,
                "zero_stage": 2,
                "checkpoint_every": CHECKPOINT_EVERY,
            },
            "run": {"num_workers": WORKERS, "keep_checkpoints": 3},
        }
        # A lost node is noticed within seconds instead of most of a minute; a slow node is not taken for a lost one.
        os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
        small = {"object_store_memory": OBJECT_STORE_BYTES, "wait": False}
        # With a dashboard: Ray Train asks it whether a run is alive.
        head = {"num_cpus": 0, "include_dashboard": True, "node_ip_address": "127.0.0.1"}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, **small})
        self._small = small
        self._nodes: dict[str, Any] = {}
        self._added = 0
        self.restore_nodes()
        os.environ["RAY_ADDRESS"] = self._cluster.address  # jobs join it
        ray.init(log_to_driver=False)

    def restore_nodes(self) -> None:
        """Adds nodes until there are as many as at the beginning."""
        while len(self._nodes) < NODES:
            self._added += 1
            address = f"127.0.0.{1 + self._added}"  # one of its own, by which Ray Train tells nodes apart
            self._nodes[address] = self._cluster.add_node(num_cpus=1, node_ip_address=address, **self._small)
        self._cluster.wait_for_nodes(TIMEOUT_S)

    def remove_node_of(self, actor_class: str) -> None:
        """Removes, at once, a node that has an actor of this class."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        actors = ray._private.state.actors().values()
        there = [actor for actor in actors if actor["ActorClassName"] == actor_class and actor["State"] == "ALIVE"]
        address = addresses[there[0]["Address"]["NodeID"]]
        self._cluster.remove_node(self._nodes.pop(address), allow_graceful=False)

    def start(self, name: str, *arguments: str, storage: Path | None = None) -> Job:
        return Job(self, name, storage or self.directory / "runs", arguments)


class Job:
    """``python -m jobs.train`` in the cluster."""

    def __init__(self, world: World, name: str, storage: Path, arguments: tuple[str, ...]) -> None:
        self.world, self.run = world, storage / name
        config = world.directory / "train.yaml"
        config.write_text(json.dumps(world.options))  # JSON is YAML
        options = ["--config", str(config), "--run.name", name, "--run.storage-path", str(storage), *arguments]
        self._said = world.directory / f"said-{time.monotonic_ns()}.txt"
        with self._said.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._said.read_text(errors="replace")

    def steps(self) -> int:
        """Returns the number of steps in its history."""
        history = self.run / "history" / "metrics.jsonl"
        return history.read_text().count("\n") if history.exists() else 0

    def wait_for_steps(self, count: int) -> None:
        wait_until(lambda: self.process.poll() is not None or self.steps() >= count, f"{count} steps", TIMEOUT_S)
        if self.process.poll() is not None:
            raise AssertionError(
                f"{self.run.name} ended with {self.process.returncode} after {self.steps()} steps: " + self.output
            )

    def end(self) -> dict[str, Any]:
        """Waits for its end; returns its output, and the distance of its weights from those of the undisturbed run."""
        code = self.process.wait(TIMEOUT_S)
        print(self.output, f"{self.run.name} ended with {code}", flush=True)
        there = sorted(path.name for path in self.run.glob("step-*"))
        told = {"code": code, "output": self.output, "checkpoints": there, "steps": steps_of(self.run)}
        if code == 0:
            undisturbed = self.world.directory / "runs" / "undisturbed" / f"step-{STEPS:06d}"
            told["difference"] = difference(self.run / there[-1], undisturbed)
        return told


def steps_of(run: Path) -> list[int]:
    """Returns the steps in a run's history; after a full disk its last line may be incomplete."""
    history = run / "history"
    return [record["step"] for record in read_metrics(history)] if history.exists() else []


def difference(first: Path, second: Path) -> float:
    """Returns the largest difference between two critics' weights."""
    one, other = (load_file(path / "model.safetensors") for path in (first, second))
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def processes_of(title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


# --- training ---


def node_of_worker(world: World) -> dict[str, Any]:
    """Removes the node of a training worker; there is another node."""
    job = world.start("node-of-worker")
    job.wait_for_steps(STRIKE_AFTER)
    world.remove_node_of("RayTrainWorker")
    struck = job.steps()
    ended = job.end()
    world.restore_nodes()
    return {**ended, "struck after": struck}


def driver_killed(world: World) -> dict[str, Any]:
    """Starts two jobs with one run name; kills the one that works; resumes the run."""
    pair = [world.start("driver-killed") for _ in range(2)]
    wait_until(lambda: any(job.process.poll() is not None for job in pair), "one of two to give up", TIMEOUT_S)
    loser, winner = sorted(pair, key=lambda job: job.process.poll() is None)
    winner.wait_for_steps(STRIKE_AFTER)
    workers = processes_of("ray::RayTrainWorker")
    for worker in workers:
        worker.suspend()  # or the run might end meanwhile
    late = world.start("driver-killed", "--resume").end()
    winner.process.send_signal(signal.SIGKILL)
    winner.process.wait()
    struck = winner.steps()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.resume()
    wait_until(lambda: not processes_of("ray::RayTrainWorker"), "workers of the killed job to end", TIMEOUT_S)
    resumed = world.start("driver-killed", "--resume").end()
    return {**resumed, "struck after": struck, "second": loser.end(), "late": late}


def slow_rank(world: World) -> dict[str, Any]:
    """Gives one of two ranks a tenth of its time for half of the steps, across two checkpoints."""
    job = world.start("slow-rank")
    job.wait_for_steps(1)
    started, victim = time.monotonic(), processes_of("ray::RayTrainWorker")[-1]
    with slowed(victim) as slices:
        job.wait_for_steps(STEPS // 2 + 2)
    seconds = round(time.monotonic() - started, 1)
    return {**job.end(), "seconds of slow steps": seconds, "slices": len(slices)}


@contextmanager
def slowed(process: psutil.Process) -> Iterator[list[float]]:
    """Lets a process run for a tenth of the time; yields the times at which it was suspended."""
    enough = threading.Event()
    slices: list[float] = []

    def stutter() -> None:
        with suppress(psutil.NoSuchProcess):
            while not enough.is_set():
                process.suspend()
                slices.append(time.monotonic())
                enough.wait(SLICE_S * (1 - 1 / SLOWNESS))
                process.resume()
                enough.wait(SLICE_S / SLOWNESS)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield slices
    finally:
        enough.set()
        thread.join()


def full_disk(world: World) -> dict[str, Any]:
    """Fills the disk of checkpoints before the second one, then makes room."""
    disk = world.directory / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], check=True)
    job = world.start("full-disk", storage=disk)
    job.wait_for_steps(CHECKPOINT_EVERY + 2)
    workers = processes_of("ray::RayTrainWorker")
    for worker in workers:
        worker.suspend()  # or they might have saved before the disk is full
    filler = fill(disk)
    for worker in workers:
        worker.resume()
    failed = job.end()
    filler.unlink()
    # A disk that fills a second earlier leaves Ray Train's own list of checkpoints empty.
    (job.run / "checkpoint_manager_snapshot.json").write_text("")
    resumed = world.start("full-disk", "--resume", storage=disk).end()
    return {**resumed, "failed": failed}


def damaged(world: World) -> dict[str, Any]:
    """Truncates one of three checkpoints and changes a byte of another; in a copy of the run it damages all three."""
    runs = world.directory / "runs"
    for name in ("damaged", "hopeless"):
        shutil.copytree(runs / "undisturbed", runs / name)
    oldest, middle, newest = sorted(path.name for path in (runs / "damaged").glob("step-*"))
    for name in ("damaged", "hopeless"):
        cut_short(runs / name / newest / "model.safetensors")
        change_a_byte(next((runs / name / middle / RESUME_FOLDER).rglob("*rank_1*optim_states.pt")))
    change_a_byte(runs / "hopeless" / oldest / "model.safetensors")
    hopeless = world.start("hopeless", "--resume").end()
    resumed = world.start("damaged", "--resume").end()
    export = ["-m", "jobs.export", str(runs / "hopeless" / oldest), str(world.directory / "exported")]
    done = run_command(export, Path.cwd(), timeout=TIMEOUT_S)
    return {**resumed, "hopeless": hopeless, "exported": {"code": done.returncode, "output": done.stdout + done.stderr}}


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


# --- the online critic ---


def node_of_shard(world: World) -> dict[str, Any]:
    """Removes the node of a critic shard during updates; restores the group on other nodes."""
    rollouts = make_rollouts(prompts=6)
    options = CriticOptions(
        ModelConfig(path=world.model),
        TrainConfig(zero_stage=2, learning_rate=3e-3, token_budget=150),
        EncodingConfig(max_length=64),
        UPDATES,
    )
    saved, ends = world.directory / "group", [world.directory / f"group-{name}" for name in ("struck", "undisturbed")]
    with CriticGroup(options, WORKERS, cpus_per_shard=1, start_timeout_s=TIMEOUT_S) as group:
        for _ in range(SAVED_AFTER):
            group.update(*rollouts.arguments)
        group.save(saved)
        for _ in range(UPDATES - SAVED_AFTER):
            group.update(*rollouts.arguments)
        group.save(ends[1])
        group.load(saved)
        lost: list[str] = []
        with ThreadPoolExecutor(1) as thread:
            updating = thread.submit(update_until_lost, group, rollouts.arguments, lost)
            time.sleep(0.5)  # in the middle of updates
            world.remove_node_of("CriticRank")
            removed = time.monotonic()
            updating.result(TIMEOUT_S)
        seconds = time.monotonic() - removed
    full = world.directory / "disk"  # `full_disk` made it
    with CriticGroup.restore(saved, WORKERS, cpus_per_shard=1, start_timeout_s=TIMEOUT_S) as group:
        for _ in range(UPDATES - SAVED_AFTER):
            group.update(*rollouts.arguments)
        group.save(ends[0])
        fill(full)
        try:
            group.save(full / "group")
            refused = ""
        except CheckpointError as error:
            refused = str(error)
    world.restore_nodes()
    return {
        "lost": lost,
        "noticed after": round(seconds, 1),
        "difference": difference(*ends),
        "full disk": refused,
        "left on it": (full / "group").exists(),
    }


def fill(disk: Path) -> Path:
    """Fills a disk; returns the file that fills it."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    return filler


def update_until_lost(group: CriticGroup, arguments: tuple[Any, ...], lost: list[str]) -> None:
    try:
        while True:
            group.update(*arguments)
    except RankLost as error:
        lost.append(str(error))


# --- scorers ---


def node_of_scorer(world: World) -> dict[str, Any]:
    """Removes the node of one of two scorers during calls; then publishes a damaged critic."""
    critic = world.directory / "runs" / "undisturbed" / f"step-{STEPS:06d}"
    replicas = ["--min-replicas", str(WORKERS), "--max-replicas", str(WORKERS)]

    def serve(*arguments: str) -> dict[str, Any]:
        done = run_command(["-m", "jobs.serve", *arguments], Path.cwd(), timeout=TIMEOUT_S)
        print(done.stdout, done.stderr, flush=True)
        return {"code": done.returncode, "output": done.stdout + done.stderr}

    started = serve(str(critic), *replicas)
    calls = Calls(str(critic), TIMEOUT_S)
    with calls.running(CALLERS, PAUSE_S):
        wait_until(lambda: calls.answered > 20, "answers", TIMEOUT_S)
        world.remove_node_of("ServeReplica:scorers:Scorer")
        struck = calls.answered
        wait_until(lambda: calls.answered > struck + 20, "answers of the scorers that are left", TIMEOUT_S)
        wait_until(lambda: len(control._state(DEFAULT_APP)[2]) == WORKERS, "another scorer", TIMEOUT_S)
        refused = serve(str(world.directory / "runs" / "hopeless" / critic.name), "--publish")
        again = calls.answered
        wait_until(lambda: calls.answered > again + 20, "answers of all", TIMEOUT_S)
    stopped = serve("--stop")
    world.restore_nodes()
    return {
        "started": started,
        "stopped": stopped,
        "refused": refused,
        "answered": calls.answered,
        "failures": calls.failures,
        "versions": sorted(calls.versions),
        "largest error": calls.largest_error,
    }
