"""Where the replicas of a pool say what they serve, so that whoever publishes a critic knows how it went.

Serve itself would replace a replica that cannot take a new configuration; ours keeps what it serves, and says so here.
The board holds nothing that is not said again every few seconds, so its process may be lost and started again.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from rlhf_critic.scoring.items import ScorerInfo

NAMESPACE = "rlhf-critic"
CALL_TIMEOUT_S = 10.0
# For what a pool keeps as long as it runs: an actor, even one without CPUs, keeps an autoscaler from taking its node.
ON_HEAD = {"node:__internal_head__": 0.001}


@dataclass(frozen=True)
class ReplicaReport:
    """What one replica says.

    Attributes:
        replica: Its id, as Serve has it.
        pid: Of its process.
        info: What it serves.
        published: The digest of the configuration it was told to serve last.
        is_current: Whether that is what it serves.
        error: Why it does not serve it; empty while it loads, and when it does.
    """

    replica: str
    pid: int
    info: ScorerInfo
    published: str
    is_current: bool
    error: str = ""


class ReplicaStatus:
    """The actor."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, ReplicaReport]] = {}

    def report(self, report: ReplicaReport) -> None:
        """Takes what a replica says, in place of what it said before."""
        self._reports[report.replica] = time.monotonic(), report

    def reports(self, within_s: float = math.inf) -> list[ReplicaReport]:
        """What every replica said last, the latest first; those that are gone included, unless they must be recent."""
        earliest = time.monotonic() - within_s
        latest_first = sorted(self._reports.values(), key=lambda told: told[0], reverse=True)
        return [report for at, report in latest_first if at >= earliest]


_Board: Any = ray.remote(ReplicaStatus)


def board_of(app: str) -> Any:
    """The board of a pool, which is made where there is none."""
    return _Board.options(
        name=f"pool-board-{app}",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        resources=ON_HEAD,
    ).remote()


def read_board(app: str) -> list[ReplicaReport]:
    """What the replicas of a pool said last; nothing where the board is being made anew."""
    try:
        reports: list[ReplicaReport] = ray.get(board_of(app).reports.remote(), timeout=CALL_TIMEOUT_S)
    except RayError:
        return []
    return reports


def remove_board(app: str) -> None:
    """Ends a pool's board."""
    ray.kill(board_of(app))
