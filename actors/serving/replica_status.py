"""Status actor: replicas report which critic they serve, so ``publish`` can tell when a swap has finished or failed.

Serve would replace a replica that cannot take a new configuration; ours keeps the previous critic and reports the
error here. Replicas repeat their reports every few seconds, so this actor may be lost and restarted.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from rlhf_critic.scoring.http_schema import PublishedModel, ReplicaLoad
from rlhf_critic.scoring.items import ScorerInfo

NAMESPACE = "rlhf-critic"
CALL_TIMEOUT_S = 10.0
FORGET_AFTER_S = 3600.0  # replicas come and go for months
KEPT_PUBLICATIONS = 20
# Places a pool's long-lived actors on the head. An actor, even without CPUs, keeps the autoscaler off its node.
ON_HEAD = {"node:__internal_head__": 0.001}


@dataclass(frozen=True)
class ReplicaReport:
    """The report of one replica.

    Attributes:
        replica: Serve's id of the replica.
        pid: Process id of the replica.
        info: The served version.
        published: Hash of the configuration that the replica was given last.
        is_current: Whether the replica serves that configuration.
        error: Why the replica cannot serve it; empty while it loads and when it serves it.
        load: Load of the replica.
    """

    replica: str
    pid: int
    info: ScorerInfo
    published: str
    is_current: bool
    error: str = ""
    load: ReplicaLoad | None = None


class ReplicaStatus:
    """The actor that holds the latest report of each replica."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, ReplicaReport]] = {}
        self._published: dict[str, PublishedModel] = {}  # by the hash of the configuration, the latest last

    def report(self, report: ReplicaReport) -> None:
        """Replaces a replica's previous report, and forgets replicas that are long gone."""
        now = time.monotonic()
        if report.is_current and report.published not in self._published:
            self._published[report.published] = PublishedModel(model_version=report.info.model_version, at=time.time())
            self._published = dict(list(self._published.items())[-KEPT_PUBLICATIONS:])
        self._reports[report.replica] = now, report
        self._reports = {name: entry for name, entry in self._reports.items() if now - entry[0] < FORGET_AFTER_S}

    def published(self) -> list[PublishedModel]:
        """Returns the last versions that a replica began to serve, the latest first."""
        return list(self._published.values())[::-1]

    def reports(self, within_s: float = math.inf) -> list[ReplicaReport]:
        """Returns each replica's last report within ``within_s``, the latest first, those of lost replicas included."""
        earliest = time.monotonic() - within_s
        latest_first = sorted(self._reports.values(), key=lambda entry: entry[0], reverse=True)
        return [report for at, report in latest_first if at >= earliest]


_Actor: Any = ray.remote(ReplicaStatus)


def status_of(app: str) -> Any:
    """Returns the status actor of a pool, and starts it if there is none."""
    return _Actor.options(
        name=f"pool-board-{app}",  # the name that running pools of earlier versions have
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        resources=ON_HEAD,
    ).remote()


def read_status(app: str) -> list[ReplicaReport]:
    """Returns the last reports of a pool's replicas; none while the status actor restarts."""
    try:
        return ray.get(status_of(app).reports.remote(), timeout=CALL_TIMEOUT_S)
    except RayError:
        return []
