"""A run on a cluster of its own whose nodes go and come: ``python -m tests.jobs.elastic_run OPTIONS.json``.

Prints one JSON object about what happened. In a process of its own, because the tests' process is connected to a Ray
of one node already.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import jobs.train
from rlhf_critic.checkpoint import RESUME_FOLDER
from rlhf_critic.config import TrainJobConfig
from rlhf_critic.training import STATE_NAME
from tests.helpers import wait_until

TIMEOUT_S = 240


def main() -> None:
    config = TrainJobConfig.model_validate_json(Path(sys.argv[1]).read_text())
    run = Path(config.run.storage_path.removeprefix("file://")) / config.run.name
    jobs.train.ELASTIC_START_TIMEOUT_S = jobs.train.GROW_EVERY_S = 10.0

    def newest() -> tuple[int, int]:
        """Step and world size of the newest checkpoint."""
        states = [path for path in run.glob(f"step-*/{RESUME_FOLDER}/{STATE_NAME}") if path.stat().st_size]
        state = json.loads(max(states).read_text()) if states else {"step": 0, "world_size": 0}
        return state["step"], state["world_size"]

    # With a dashboard: Ray Train asks it whether a run is alive, and without an answer takes its workers' places away.
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": None}  # any port
    cluster = Cluster(initialize_head=True, head_node_args=head)
    _, goes = (cluster.add_node(num_cpus=1) for _ in range(2))
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    began, seen = time.monotonic(), []

    def saw(what: str) -> None:
        step, workers = newest()
        seen.append({"after_s": round(time.monotonic() - began, 1), "what": what, "step": step, "workers": workers})
        print(seen[-1], file=sys.stderr, flush=True)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(jobs.train.train, config)

        def wait_for(workers: int) -> None:
            """Waits for another checkpoint than there is, saved by so many workers."""
            step, _ = newest()
            wait_until(
                lambda: job.done() or (newest()[0] > step and newest()[1] == workers),
                f"a checkpoint of {workers} workers",
                TIMEOUT_S,
            )
            saw("checkpoint")

        wait_for(2)
        wait_for(2)  # the first may not be known to Ray Train yet, the one before the newest is
        cluster.remove_node(goes)
        saw("node removed")
        wait_for(1)
        cluster.add_node(num_cpus=1)
        saw("node added")
        wait_for(2)
        outcome = job.result(TIMEOUT_S).return_value
    saw("end")
    print(json.dumps({"steps": outcome.steps, "seen": seen}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
