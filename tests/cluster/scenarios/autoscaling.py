"""A cluster without workers, whose autoscaler adds nodes on demand and removes idle ones.

Runs training that waits for nodes, and a pool of scorers that scales up and down.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray

from actors.serving import control
from actors.serving.handle import DEFAULT_APP
from tests.actors.scorers import Calls, save_tiny_critic
from tests.cluster.autoscaled import ADDRESS, NODES_TIMEOUT_S, Nodes, start_head
from tests.helpers import run_command, save_tiny_model, write_preferences

MOST_NODES = 3
JOB_TIMEOUT_S = 300.0
CALLERS = 8
UNDER_FULL_LOAD_S = 4.0
PAUSE_OF_THE_LAST_S = 0.2


def observe(directory: Path) -> dict[str, Any]:
    model = save_tiny_model(directory / "model", tie_word_embeddings=False)
    critic = save_tiny_critic(model, directory / "critic")
    draining = {"RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "5"}  # instead of 30 s on an idle node
    start_head(directory, {"worker": MOST_NODES}, draining)
    ray.init(address=ADDRESS, log_to_driver=False)
    with Nodes() as nodes:
        training = observe_training(nodes, directory, model)
        scoring = observe_scoring(nodes, critic)
    return {"training": training, "scoring": scoring, "nodes": nodes.changes}


def run_job(*arguments: str) -> dict[str, Any]:
    """Runs ``python -m ARGUMENTS`` in the cluster."""
    done = run_command(["-m", *arguments], Path.cwd(), {"RAY_ADDRESS": ADDRESS}, timeout=JOB_TIMEOUT_S)
    print(done.stdout, done.stderr, f"{arguments[0]} ended with {done.returncode}", sep="\n", flush=True)
    return {"code": done.returncode, "output": done.stdout + done.stderr}


def observe_training(nodes: Nodes, directory: Path, model: str) -> dict[str, Any]:
    """Trains on two nodes, none of which exists at the start."""
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
    """Serves a pool that can scale to zero: load, then one caller, then none, then one again."""
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
    """Counts the running scorers."""
    return len(control._state(DEFAULT_APP)[2])
