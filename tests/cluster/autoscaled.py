"""A head whose autoscaler starts nodes as processes on this machine (Ray's ``fake_multinode`` provider).

The provider is fake, the autoscaler is real. Starts such a cluster and counts its nodes; scenarios run the jobs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

ADDRESS = "127.0.0.1:6379"
IDLE_S = 8.0
OBJECT_STORE_BYTES = 100 * 1024**2
# Generous, because nodes start on a busy machine.
NODES_TIMEOUT_S = 300.0


def start_head(directory: Path, most_nodes: Mapping[str, int], environment: Mapping[str, str] | None = None) -> None:
    """Runs ``ray start --head`` with an autoscaling config, as ``ray up`` does.

    Args:
        directory: Directory of the config.
        most_nodes: Maximum number of nodes per type. Each node has one CPU and a resource with the name of the type.
        environment: Environment of the head's processes.
    """
    path = write_config(directory, most_nodes)
    options = ["--num-cpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}", "--node-ip-address=127.0.0.1"]
    subprocess.run(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", *options, f"--autoscaling-config={path}"],
        env={**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", **(environment or {})},
        check=True,
        timeout=NODES_TIMEOUT_S,
    )


def write_config(directory: Path, most_nodes: Mapping[str, int]) -> Path:
    """Writes the autoscaling config atomically, because a running autoscaler reads it every second."""
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
            # All nodes have one address, and no login is needed.
            **dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True),
        },
        "max_workers": sum(most_nodes.values()),
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 10.0,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                name: {"resources": {**worker, name: 1}, "node_config": {}, "min_workers": 0, "max_workers": most}
                for name, most in most_nodes.items()
            },
        },
        "file_mounts_sync_continuously": False,
        **nothing,
    }
    path = directory / "cluster.json"
    written = path.with_suffix(".new")
    written.write_text(json.dumps(config))  # JSON is YAML
    return written.replace(path)


class Nodes:
    """Counter of nodes without the head, over time."""

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
        """Waits for a number of nodes; returns the number at that time, or at the timeout."""
        return self.after(lambda: self.now == count)

    def after(self, condition: Callable[[], bool]) -> int:
        """Waits until a condition on the number of nodes is met."""
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
