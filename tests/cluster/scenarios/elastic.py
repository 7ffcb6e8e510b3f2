"""A run on autoscaled nodes: the cloud removes one, has none for a while, then provides one again."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray

import jobs.train
from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.training.engine import ENGINE_STATE_NAME
from tests.cluster.autoscaled import ADDRESS, Nodes, start_head, write_config
from tests.helpers import save_tiny_model, wait_until, write_preferences

TIMEOUT_S = 240
STEPS = 200  # enough slow steps that a node is removed and added during the run
ALL_NODES = {"on-demand": 1, "spot": 1}
NO_SPOT_NODES = {"on-demand": 1, "spot": 0}
UNHEARD_OF_S = "5"  # time after which the autoscaler gives up a silent node; the default is 30


def observe(directory: Path) -> dict[str, Any]:
    """Observes the elastic run, and the history of an undisturbed run."""
    jobs.train.ELASTIC_START_TIMEOUT_S = jobs.train.GROW_EVERY_S = 10.0
    options = {
        "model": {"path": save_tiny_model(directory / "model", tie_word_embeddings=False)},
        "encoding": {"max_length": 64},
        "data": {"train": write_preferences(directory / "train.jsonl", 90), "cache_dir": str(directory / "cache")},
        "train": {
            "global_batch_size": 45,
            "epochs": STEPS / 2,
            "learning_rate": 1e-4,
            "token_budget": 130,  # many micro-batches
            "checkpoint_every": 10,
        },
        "run": {"name": "elastic", "num_workers": 2, "min_workers": 1, "storage_path": f"file://{directory}/runs"},
    }
    start_head(directory, ALL_NODES, {"AUTOSCALER_HEARTBEAT_TIMEOUT_S": UNHEARD_OF_S})
    ray.init(address=ADDRESS, logging_level="ERROR", log_to_driver=False)
    with Nodes() as nodes:
        seen = disturb(TrainJobConfig.model_validate(options), directory, nodes)

    options["run"] |= {"name": "undisturbed", "num_workers": 1, "min_workers": None}
    options["train"]["token_budget"] = 4000  # the same losses, faster
    jobs.train.train(TrainJobConfig.model_validate(options))
    return {**seen, "nodes": nodes.changes, "undisturbed": history(directory / "runs" / "undisturbed")}


def disturb(config: TrainJobConfig, directory: Path, nodes: Nodes) -> dict[str, Any]:
    """Runs a job while a node is removed and added."""
    run = directory / "runs" / config.run.name
    began, seen = time.monotonic(), []

    def newest() -> tuple[int, int]:
        """Returns step and world size of the newest checkpoint."""
        states = [path for path in run.glob(f"step-*/{RESUME_FOLDER}/{ENGINE_STATE_NAME}") if path.stat().st_size]
        state = json.loads(max(states).read_text()) if states else {"step": 0, "world_size": 0}
        return state["step"], state["world_size"]

    def saw(what: str) -> None:
        step, workers = newest()
        after_s = round(time.monotonic() - began, 1)
        seen.append({"after_s": after_s, "what": what, "step": step, "workers": workers, "nodes": nodes.now})
        print(seen[-1], flush=True)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(jobs.train.train, config)

        def wait_for(workers: int) -> None:
            """Waits for a new checkpoint that was saved by a number of workers."""
            step, _ = newest()
            wait_until(
                lambda: job.done() or (newest()[0] > step and newest()[1] == workers),
                f"a checkpoint of {workers} workers",
                TIMEOUT_S,
            )
            saw("checkpoint")

        wait_for(2)
        wait_for(2)  # Ray Train may not know the first yet, but it knows the one before the newest
        kill_node("spot")
        write_config(directory, NO_SPOT_NODES)
        saw("node killed")
        wait_for(1)
        write_config(directory, ALL_NODES)
        saw("nodes to be had")
        wait_for(2)
        outcome = job.result(TIMEOUT_S).return_value
    saw("end")
    return {"steps": outcome.steps, "seen": seen, "elastic": history(run)}


def kill_node(node_type: str) -> None:
    """Kills the raylet of the only node of a type, which ends its workers."""
    (node_id,) = (node["NodeID"] for node in ray.nodes() if node["Alive"] and node_type in node["Resources"])
    raylets = [process for process in psutil.process_iter(["name", "cmdline"]) if process.info["name"] == "raylet"]
    (raylet,) = (process for process in raylets if any(node_id in word for word in process.info["cmdline"]))
    os.kill(raylet.pid, signal.SIGKILL)


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history" / "metrics.jsonl").read_text().splitlines()]
