"""A cluster without workers, whose autoscaler adds nodes for what is asked of it and takes them away when they idle.

With Ray's ``fake_multinode`` provider: nodes are processes of this machine, the autoscaler is the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from actors import pool
from actors.scorer_handle import DEFAULT_APP
from tests.actors.scorers import Calls, save_tiny_critic
from tests.helpers import run_command, save_tiny_model, write_preferences

ADDRESS = "127.0.0.1:6379"
MOST_NODES = 3
IDLE_S = 8.0
OBJECT_STORE_BYTES = 100 * 1024**2
# Generous: nodes are started on a machine that has other things to do.
JOB_TIMEOUT_S = NODES_TIMEOUT_S = 300.0
CALLERS = 8
UNDER_FULL_LOAD_S = 4.0
PAUSE_OF_THE_LAST_S = 0.2


def observe(directory: Path) -> dict[str, Any]:
    model = save_tiny_model(directory / "model", tie_word_embeddings=False)
    critic = save_tiny_critic(model, directory / "critic")
    start_head(directory)
    ray.init(address=ADDRESS, log_to_driver=False)
    with Nodes() as nodes:
        training = observe_training(nodes, directory, model)
        scoring = observe_scoring(nodes, critic)
    return {"training": training, "scoring": scoring, "nodes": nodes.changes}


def start_head(directory: Path) -> None:
    """``ray start --head`` with an autoscaling config, which is how ``ray up`` starts a head."""
    nothing: dict[str, Any] = {name: {} for name in ("auth", "docker", "file_mounts")}
    no_commands = "initialization setup head_setup worker_setup head_start_ray worker_start_ray".split()
    nothing |= {f"{name}_commands": [] for name in no_commands}
    nothing |= {name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")}
    worker = {"CPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
    config = {
        "cluster_name": "fake",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": ADDRESS,
            # All nodes have one address, and there is nothing to log in to.
            **dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True),
        },
        "max_workers": MOST_NODES,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 10.0,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": MOST_NODES},
        },
        "file_mounts_sync_continuously": False,
        **nothing,
    }
    path = directory / "cluster.json"
    path.write_text(json.dumps(config))  # JSON is YAML
    options = ["--num-cpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}", "--node-ip-address=127.0.0.1"]
    subprocess.run(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", *options, f"--autoscaling-config={path}"],
        env={
            **os.environ,
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "5",  # instead of half a minute on a node that is not needed
        },
        check=True,
        timeout=JOB_TIMEOUT_S,
    )


class Nodes:
    """How many nodes beside the head there are, as it changes."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, int]] = []
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Nodes:
        self._note()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def now(self) -> int:
        return self.changes[-1][1]

    def most_since(self, change: int) -> int:
        return max(count for _, count in self.changes[change:])

    def when(self, count: int) -> int:
        """Waits until there are so many; returns how many there are then, or when it took too long."""
        return self.after(lambda: self.now == count)

    def after(self, condition: Callable[[], bool]) -> int:
        """Likewise, until a condition is met."""
        deadline = time.monotonic() + NODES_TIMEOUT_S
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.now

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self._note()

    def _note(self) -> None:
        count = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        if not self.changes or self.now != count:
            self.changes.append((round(time.monotonic() - self._started, 1), count))
            print(f"{self.changes[-1][0]:6.1f} s: {count} nodes", flush=True)


def run_job(*arguments: str) -> dict[str, Any]:
    """``python -m ARGUMENTS`` in the cluster."""
    done = run_command(["-m", *arguments], Path.cwd(), {"RAY_ADDRESS": ADDRESS}, timeout=JOB_TIMEOUT_S)
    print(done.stdout, done.stderr, f"{arguments[0]} ended with {done.returncode}", sep="\n", flush=True)
    return {"code": done.returncode, "output": done.stdout + done.stderr}


def observe_training(nodes: Nodes, directory: Path, model: str) -> dict[str, Any]:
    """A run on two nodes, of which none is there when it starts."""
    before, change = nodes.now, len(nodes.changes) - 1
    data = write_preferences(directory / "train.jsonl", 24)
    options = {
        "model.path": model,
        "encoding.max-length": "64",
        "data.train": data,
        "data.cache-dir": str(directory / "cache"),
        "train.global-batch-size": "6",
        "run.name": "first",
        "run.num-workers": "2",
        "run.storage-path": str(directory / "runs"),
    }
    job = run_job("jobs.train", *(part for name, value in options.items() for part in (f"--{name}", value)))
    return {
        **job,
        "nodes": {"before": before, "at most": nodes.most_since(change), "when idle": nodes.when(0)},
        "checkpoints": sorted(path.name for path in (directory / "runs" / "first").glob("step-*")),
    }


def observe_scoring(nodes: Nodes, critic: str) -> dict[str, Any]:
    """A pool that may vanish: load, then one caller, then none, then one again."""
    counts = {"before": nodes.now}
    scaling = {
        "min-replicas": "0",
        "max-replicas": str(MOST_NODES),
        "target-ongoing-requests": "2",
        "upscale-delay-s": "1",
        "downscale-delay-s": "5",
    }
    started = run_job("jobs.serve", critic, *(part for name, value in scaling.items() for part in (f"--{name}", value)))
    counts["started"] = nodes.now
    calls = Calls(critic, deadline_s=NODES_TIMEOUT_S)
    with calls.running(1, PAUSE_OF_THE_LAST_S):
        with calls.running(CALLERS):
            counts["under load"] = nodes.after(lambda: replicas() == MOST_NODES)
            most_replicas = replicas()
            time.sleep(UNDER_FULL_LOAD_S)
        under_load = calls.answered
        counts["with one caller"] = nodes.when(1)
        with_one_caller = calls.answered - under_load
    counts["without a caller"] = nodes.when(0)
    before_return = calls.answered
    with calls.running(1, PAUSE_OF_THE_LAST_S):
        counts["called again"] = nodes.after(lambda: calls.answered > before_return)
    stopped = run_job("jobs.serve", "--stop")
    counts["stopped"] = nodes.when(0)
    return {
        "started": started,
        "stopped": stopped,
        "nodes": counts,
        "replicas under load": most_replicas,
        "answered": {
            "under load": under_load,
            "with one caller": with_one_caller,
            "called again": calls.answered - before_return,
        },
        "failures": calls.failures,
        "largest error": calls.largest_error,
    }


def replicas() -> int:
    """Scorers that run."""
    return len(pool._state(DEFAULT_APP)[2])
