"""The pool on Ray Serve: scorer replicas, and the gateway with the HTTP endpoints in front of them.

A Serve config names `app` as ``import_path: actors.serving.deployment:app``. Everything that may differ between pools
is in the config: options and ``user_config`` of the deployments, written by `actors.serving.control`. Serve starts,
scales, restarts and routes; `actors.serving.scorer` scores.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from actors.runtime.ray_internals import get_serve_client
from actors.runtime.session import listen_at_node_address
from actors.serving.handle import SCORER_DEPLOYMENT, HandleTransport
from actors.serving.http_api import HttpSettings, build_app
from actors.serving.metrics import ScorerMetrics, http_refusals
from actors.serving.replica_status import ON_HEAD, ReplicaReport, status_of
from actors.serving.swap import Swap
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.errors import CriticError, ScorerRejected, ScorerUnavailable
from rlhf_critic.logs import configure_logging
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.http_schema import PublishedModel, ReplicaModel
from rlhf_critic.scoring.items import Item, ScorerInfo, Scores

if TYPE_CHECKING:
    from actors.serving.scorer import Scorer

INFO_TIMEOUT_S = 5.0
REPORT_EVERY_S = 2.0
SILENCE_S = 30.0  # a replica without a report for so long does not count as ready
RESTART_AFTER_FAILURES = 4
CONCURRENT_HTTP_CALLS = 1000


def deployment_hash(user_config: dict[str, Any]) -> str:
    """Returns a SHA-256 that names a replica's configuration."""
    return hashlib.sha256(json.dumps(user_config, sort_keys=True).encode()).hexdigest()


@serve.deployment(
    name=SCORER_DEPLOYMENT,
    health_check_period_s=REPORT_EVERY_S,
    health_check_timeout_s=SILENCE_S,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=60,
)
class ScorerReplica:
    """One replica: a `Scorer` that Serve configures."""

    def __init__(self) -> None:
        configure_logging(quiet_libraries=False)
        listen_at_node_address()
        context = serve.get_replica_context()
        self._app, self._replica = context.app_name, context.replica_id.unique_id
        self._metrics = ScorerMetrics(self._app, self._replica)
        self._status = status_of(self._app)
        self._scorer: Scorer | None = None
        self._swap: Swap | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes a configuration from Serve. The first one is loaded before any call is answered.

        A later one is loaded in the background while this method returns at once, because Serve sends no calls to a
        replica that is being configured. If it cannot be loaded, the replica keeps the previous one, reports why and
        tries again: see `actors.serving.swap`.
        """
        if self._swap is None:
            scorer = self._scorer = await asyncio.to_thread(_make_scorer, user_config, self._metrics)
            self._swap = Swap(
                user_config, lambda config: scorer.publish(ScorerConfig(**config["scorer"])), self._report
            )
            self._report()
        else:
            self._swap.want(user_config)

    async def score(self, items: list[Item], values: bool, version: str | None) -> Scores | CriticError:
        """See `Scorer.score`. Errors are returned, because Serve would log a raised one as a failure of the replica."""
        assert self._scorer is not None
        started = time.perf_counter()
        try:
            scores = await self._scorer.score_async(items, values=values, version=version)
        except CriticError as error:
            self._metrics.on_refusal(error.kind if isinstance(error, ScorerRejected) else type(error).__name__)
            return error
        self._metrics.on_scores(scores, time.perf_counter() - started)
        return scores

    async def check_health(self) -> None:
        """Called by Serve periodically; Serve replaces a replica that raises.

        Raises:
            ScorerUnavailable: A part of the scorer is lost, or this replica cannot swap although others could.
        """
        if self._scorer is None or self._swap is None:
            return
        self._scorer.check_healthy()
        self._swap.proceed()
        self._report()
        # A new process needs memory for one critic only. A critic that no replica can serve must not end them all.
        if self._swap.failures >= RESTART_AFTER_FAILURES and await self._others_are_current():
            raise ScorerUnavailable(f"this replica alone cannot serve the published critic: {self._swap.error}")

    async def _others_are_current(self) -> bool:
        assert self._swap is not None
        published = deployment_hash(self._swap.wanted)
        reports = await _recent_reports(self._status)
        return any(one.is_current and one.published == published for one in reports if one.replica != self._replica)

    def _report(self) -> None:
        assert self._scorer is not None
        assert self._swap is not None
        report = ReplicaReport(
            replica=self._replica,
            pid=os.getpid(),
            info=self._scorer.info(),
            published=deployment_hash(self._swap.wanted),
            is_current=self._swap.is_current,
            error="" if self._swap.is_current else self._swap.error,
            load=self._metrics.load(),
        )
        self._metrics.on_version(report.info.model_version, report.is_current)
        self._status.report.remote(report)  # not awaited: the next health check reports again


async def _recent_reports(status: Any) -> list[ReplicaReport]:
    """Returns the reports of replicas that are not silent, the latest first; none while the status actor restarts."""
    try:
        return await asyncio.wait_for(status.reports.remote(SILENCE_S), INFO_TIMEOUT_S)
    except (asyncio.TimeoutError, RayError):
        return []


def _make_scorer(user_config: dict[str, Any], metrics: ScorerMetrics) -> Scorer:
    from actors.serving.scorer import Scorer  # imports torch and transformers, which only replicas need

    hardware = {name: user_config[name] for name in ("shards", "cpus_per_shard", "use_gpu")}
    return Scorer(ScorerConfig(**user_config["scorer"]), **hardware, on_batch=metrics.on_batch)


def _http_app() -> Any:
    return build_app(lambda: serve.get_replica_context().servable_object)


@serve.deployment(
    name="Gateway",
    ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},
    max_ongoing_requests=CONCURRENT_HTTP_CALLS,
    max_queued_requests=CONCURRENT_HTTP_CALLS,
    health_check_period_s=2,
    graceful_shutdown_wait_loop_s=0.5,
)
@serve.ingress(_http_app)
class Gateway:
    """The HTTP endpoints; an `actors.serving.http_api.ScoringService`."""

    def __init__(self, _: DeploymentHandle) -> None:  # tells Serve to start the replicas first
        configure_logging(quiet_libraries=False)
        listen_at_node_address()
        app = serve.get_replica_context().app_name
        self._status = status_of(app)
        self._refusals = http_refusals(app)
        self.settings = HttpSettings()
        self._client = ScorerClient(HandleTransport(app), max_in_flight=CONCURRENT_HTTP_CALLS)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes the limits from Serve's configuration.

        Raises:
            ConfigError: Other machines could use the pool without a token. The gateway then does not start.
        """
        client = await asyncio.to_thread(get_serve_client)
        host = client.http_config.host
        self.settings = HttpSettings(**user_config["http"], max_items=user_config["max_items"], host=host)

    async def score(self, items: list[Item], values: bool, version: str | None) -> Scores:
        """See `actors.serving.http_api.ScoringService`."""
        return await self._client.score_items_async(
            items, values=values, version=version, deadline_s=self.settings.deadline_s
        )

    async def info(self) -> ScorerInfo:
        """See `actors.serving.http_api.ScoringService`.

        Reads the replicas' reports, because a call to a replica would wait behind its queue. An idle pool that has
        scaled to zero (``min_replicas: 0``) therefore counts as not ready until the next call.
        """
        reports = await _recent_reports(self._status)
        # During a swap, the critic that is being published.
        report = next((one for one in reports if one.is_current), reports[0] if reports else None)
        if report is None:
            raise ScorerUnavailable("no scorer is ready: wait, or check the pool with `serve status`")
        return report.info

    async def replicas(self) -> list[ReplicaModel]:
        """See `actors.serving.http_api.ScoringService`."""
        return [
            ReplicaModel(
                replica=one.replica, model_version=one.info.model_version, is_current=one.is_current, load=one.load
            )
            for one in sorted(await _recent_reports(self._status), key=lambda one: one.replica)
        ]

    async def published(self) -> list[PublishedModel]:
        """See `actors.serving.http_api.ScoringService`."""
        try:
            return await asyncio.wait_for(self._status.published.remote(), INFO_TIMEOUT_S)
        except (asyncio.TimeoutError, RayError):  # while the status actor restarts
            return []

    def on_refusal(self, kind: str) -> None:
        """See `actors.serving.http_api.ScoringService`."""
        self._refusals.inc(1, {"kind": kind})


app = Gateway.bind(ScorerReplica.bind())  # type: ignore[attr-defined]
