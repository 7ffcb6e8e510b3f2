"""What a soak leaves behind: growth of processes, and actors, shared memory and placement groups at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from ray._private.internal_api import node_stats
from ray.util.placement_group import placement_group_table

WATCH_EVERY_S = 2.0
GONE_TIMEOUT_S = 90.0
# Detached actors that Ray starts and no job can end. The first lives as long as the cluster once a training job has
# run. Ray 2.60 starts the second for each training driver; where the driver is killed, it does its work and stays.
OF_RAY = {"_AutoscalingCoordinatorActor", "QuietCleaner"}
MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")


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
