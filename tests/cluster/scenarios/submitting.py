"""A head without work and two nodes, with jobs that are submitted and stopped by the commands of users."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from tests.actors.scorers import make_conversations, rewards_by_engine
from tests.helpers import ray_job, save_tiny_model, submit_job, wait_until, write_preferences

DASHBOARD = "http://127.0.0.1:8265"
NODES, CPUS = 2, 2
OBJECT_STORE_BYTES = 100 * 1024**2
SMALL_CPUS = 0.3
LARGE_CPUS = 1.1  # two do not fit one node; one always fits together with all small actors
TIMEOUT_S = 500.0  # generous, because the machine may be busy
GONE_TIMEOUT_S = 120.0
CONVERSATIONS = 12
ITERATIONS = 2
# Not part of a job: agents of Ray, idle workers, and actors that Ray Serve, Train and Data keep for the next job.
OF_RAY = (
    *("ray::IDLE", "ray::Dash", "ray::Runtime", "ray::ServeController", "ray::Proxy"),
    *("ray::_AutoscalingCoordinator", "ray::_StatsActor", "ray::ActorLocationTracker"),
)


def observe(directory: Path) -> dict[str, Any]:
    start_cluster()
    model = save_tiny_model(directory / "model", tie_word_embeddings=False)
    train = train_config(directory, model)
    checkpoint = str(directory / "runs" / "first" / "step-000004")
    seen: dict[str, Any] = {}
    seen["train"] = submit("jobs.train", "--config", train, "--run.name", "first")
    seen["train"]["files"] = sorted(path.name for path in Path(checkpoint).iterdir())
    seen["train"]["of nodes"] = [sorted(json.loads(path.read_text())) for path in Path(checkpoint).glob("manifest-*")]
    seen["refused"] = submit("jobs.train", "--config", train, "--run.name", "first")
    history = directory / "runs" / "endless" / "history" / "metrics.jsonl"
    endless = ["jobs.train", "--config", train, "--run.name", "endless", "--train.epochs", "100000"]
    seen["stopped train"] = submit_and_stop(endless, history.exists)

    seen["serve"] = submit("jobs.serve", checkpoint, "--cpus-per-shard", str(SMALL_CPUS))
    seen["serve"]["on nodes"] = sorted({actor["ActorClassName"] for actor in actors() if not is_on_head(actor)})
    seen["score"] = submit_scoring(directory, checkpoint)
    ppo = ppo_config(directory, model)
    with placements() as spread:
        seen["ppo"] = submit("jobs.ppo", "--config", ppo, "--run.name", "learning")
    last = directory / "runs" / "learning" / f"iteration-{ITERATIONS:06d}"
    seen["ppo"] |= {"files": sorted(path.name for path in last.glob("*")), "nodes of groups": spread}
    seen["serve --stop"] = {**submit("jobs.serve", "--stop"), "left": left_over()}

    history = directory / "runs" / "endless-ppo" / "history" / "metrics.jsonl"
    endless = ["jobs.ppo", "--config", ppo, "--run.name", "endless-ppo", "--ppo.iterations", "100000"]
    endless += ["--reward.checkpoint", checkpoint, "--reward.cpus-per-replica", str(SMALL_CPUS)]
    seen["stopped ppo"] = submit_and_stop(endless, history.exists)
    return seen


def start_cluster() -> None:
    # A stopped job is killed at once, because it must not depend on time for cleaning up.
    os.environ["RAY_JOB_STOP_WAIT_TIME_S"] = "0"
    node = {"object_store_memory": OBJECT_STORE_BYTES, "wait": False}
    head = {"num_cpus": 0, "include_dashboard": True, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**head, **node})
    for number in range(NODES):  # each with a separate address, by which Ray Train distinguishes nodes
        cluster.add_node(num_cpus=CPUS, node_ip_address=f"127.0.0.{2 + number}", **node)
    cluster.wait_for_nodes(TIMEOUT_S)
    ray.init(address=cluster.address, log_to_driver=False)


def submit(*arguments: str) -> dict[str, Any]:
    """Submits a job; returns what the user sees."""
    started = time.monotonic()
    done = submit_job(DASHBOARD, list(arguments), timeout=TIMEOUT_S)
    seconds = round(time.monotonic() - started, 1)
    print(done.stdout, done.stderr, f"{arguments[0]} ended with {done.returncode} after {seconds} s", flush=True)
    return {"code": done.returncode, "output": done.stdout + done.stderr, "seconds": seconds}


def submit_and_stop(arguments: list[str], works: Callable[[], bool]) -> dict[str, Any]:
    """Submits a job and stops it while it works; returns what the user sees, and what is left of the job."""
    name = f"stopped-{arguments[0]}"
    submitted = submit_job(DASHBOARD, arguments, "--no-wait", "--submission-id", name, timeout=TIMEOUT_S)

    def log() -> str:
        return ray_job(DASHBOARD, "logs", "--address", DASHBOARD, name, timeout=TIMEOUT_S).stdout

    try:
        wait_until(works, f"{name} to work", TIMEOUT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {submitted.stdout}{submitted.stderr}{log()}") from None
    working = left_over(wait=False)
    stopped = ray_job(DASHBOARD, "stop", "--address", DASHBOARD, name, timeout=TIMEOUT_S)
    left = left_over()
    print(stopped.stdout, stopped.stderr, log(), f"{name} leaves {left}", flush=True)
    return {"code": stopped.returncode, "output": stopped.stdout + stopped.stderr, "worked": working, "left": left}


def left_over(wait: bool = True) -> list[str]:
    """Lists actors, placement groups and processes of jobs that remain."""

    def there() -> list[str]:
        found = [f"actor {actor['ActorClassName']}" for actor in actors() if not is_of_ray(actor["ActorClassName"])]
        groups = placement_group_table().values()
        found += [f"placement group {one['name']}" for one in groups if one["state"] != "REMOVED"]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if " -m jobs." in title or (title.startswith("ray::") and not title.startswith(OF_RAY)):
                    found.append(f"process {title[:80]}")
        return found

    deadline = time.monotonic() + GONE_TIMEOUT_S
    while wait and there() and time.monotonic() < deadline:
        time.sleep(0.5)
    return there()


def actors() -> list[dict[str, Any]]:
    return [actor for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]


def is_on_head(actor: dict[str, Any]) -> bool:
    """Returns whether an actor is on the node of this process, which is the head."""
    here: str = ray.get_runtime_context().get_node_id()
    return bool(actor["Address"]["NodeID"] == here)


def is_of_ray(actor_class: str) -> bool:
    return f"ray::{actor_class}".startswith(OF_RAY)


@contextmanager
def placements() -> Iterator[dict[str, int]]:
    """Records the number of nodes of each new placement group, by number of bundles."""
    spread: dict[str, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            for group in placement_group_table().values():
                if group["state"] == "CREATED":
                    nodes = group["bundles_to_node_id"]
                    spread[str(len(nodes))] = max(spread.get(str(len(nodes)), 0), len(set(nodes.values())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield spread
    finally:
        ended.set()
        thread.join()


def train_config(directory: Path, model: str) -> str:
    """Trains with two workers, each as large as a node."""
    data = {"train": write_preferences(directory / "train.jsonl", 24), "cache_dir": str(directory / "cache")}
    return write_config(
        directory / "train.yaml",
        {
            "model": {"path": model},
            "encoding": {"max_length": 64},
            "data": data,
            "train": {"global_batch_size": 6, "epochs": 1, "zero_stage": 2},
            "run": {"num_workers": NODES, "cpus_per_worker": CPUS, "storage_path": str(directory / "runs")},
        },
    )


def ppo_config(directory: Path, model: str) -> str:
    """Serves a critic of two shards, each on a separate node."""
    prompts = directory / "prompts.jsonl"
    rows = [one.prompt for one in make_conversations(CONVERSATIONS)]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return write_config(
        directory / "ppo.yaml",
        {
            "policy": {"model": {"path": model}, "chat_template": "plain", "cpus_per_shard": SMALL_CPUS},
            "critic": {"shards": NODES, "cpus_per_shard": LARGE_CPUS, "optimizer": {"zero_stage": 2}},
            "prompts": {"train": str(prompts), "max_tokens": 24},
            "rollout": {
                "cpus_per_worker": SMALL_CPUS,
                "prompts_per_iteration": 4,
                "samples_per_prompt": 2,
                "max_new_tokens": 6,
            },
            "reward": {"app": "scorers", "deadline_s": TIMEOUT_S},
            "ppo": {"iterations": ITERATIONS},
            "run": {"storage_path": str(directory / "runs")},
        },
    )


def write_config(path: Path, options: dict[str, Any]) -> str:
    path.write_text(json.dumps(options))  # JSON is YAML
    return str(path)


def submit_scoring(directory: Path, checkpoint: str) -> dict[str, Any]:
    """Scores conversations on two workers and compares with the engine."""
    items = make_conversations(CONVERSATIONS)
    data, out = directory / "responses.jsonl", directory / "scored"
    rows = [{"row": row, "prompt": item.prompt, "response": item.response} for row, item in enumerate(items)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--num-workers", "2", "--cpus-per-worker", str(SMALL_CPUS), "--rows-per-part", "4"]
    job = submit("jobs.score", checkpoint, str(data), str(out), *options)
    scored = [json.loads(line) for part in sorted(out.glob("part-*")) for line in part.read_text().splitlines()]
    expected = rewards_by_engine(checkpoint, items)
    errors = [abs(row["reward"] - float(expected[row["row"]])) for row in scored]
    return {**job, "rows": [row["row"] for row in scored], "largest error": max(errors, default=np.inf)}
