"""The pool on Ray Serve: scorer replicas, and the gateway with the HTTP endpoints in front of them.

A Serve config names `app` as ``import_path: actors.serving.deployment:app``. Everything that may differ between pools
is in the config: options and ``user_config`` of the deployments, written by `actors.serving.control`. Serve starts,
scales, restarts and routes; `actors.serving.scorer` scores.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from actors.runtime.session import listen_at_node_address
from actors.serving.handle import SCORER_DEPLOYMENT, HandleTransport
from actors.serving.http_api import HttpSettings, build_app
from actors.serving.metrics import ScorerMetrics, http_refusals
from actors.serving.replica_status import ON_HEAD, ReplicaReport, status_of
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.errors import CriticError, ScorerRejected, ScorerUnavailable
from rlhf_critic.logs import configure_logging
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Item, ScorerInfo, Scores

if TYPE_CHECKING:
    from actors.serving.scorer import Scorer

logger = logging.getLogger(__name__)

INFO_TIMEOUT_S = 5.0
REPORT_EVERY_S = 2.0
SILENCE_S = 30.0  # a replica without a report for so long does not count as ready
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
        self._wanted: dict[str, Any] = {}
        self._serving: dict[str, Any] = {}
        self._error = ""
        self._swapping: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes a configuration from Serve. The first one is loaded before any call is answered.

        A later one is loaded in the background while this method returns at once, because Serve sends no calls to a
        replica that is being configured. If it cannot be loaded, the replica keeps the previous one and reports why.
        """
        self._wanted = user_config
        if self._scorer is None:
            self._scorer = await asyncio.to_thread(_make_scorer, user_config, self._metrics)
            self._serving = user_config
            self._report()
        elif self._swapping is None or self._swapping.done():
            self._swapping = asyncio.create_task(self._swap())

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

    def check_health(self) -> None:
        """Called by Serve periodically; Serve replaces a replica that raises."""
        if self._scorer is not None:
            self._scorer.check_healthy()
            self._report()

    async def _swap(self) -> None:
        """Loads the latest configuration, until it is served or fails to load."""
        assert self._scorer is not None
        while self._wanted != self._serving:
            wanted = self._wanted
            try:
                await asyncio.to_thread(self._scorer.publish, ScorerConfig(**wanted["scorer"]))
                self._serving, self._error = wanted, ""
            except Exception as error:
                logger.exception("cannot serve the published critic; keeping the previous one")
                self._error = str(error)
                if self._wanted == wanted:
                    break
            finally:
                self._report()

    def _report(self) -> None:
        assert self._scorer is not None
        report = ReplicaReport(
            replica=self._replica,
            pid=os.getpid(),
            info=self._scorer.info(),
            published=deployment_hash(self._wanted),
            is_current=self._wanted == self._serving,
            error=self._error if self._wanted != self._serving else "",
        )
        self._metrics.on_version(report.info.model_version)
        self._status.report.remote(report)  # not awaited: the next health check reports again


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
        self._max_items = 0
        self._client = ScorerClient(HandleTransport(app), max_in_flight=CONCURRENT_HTTP_CALLS)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes the limits from Serve's configuration."""
        self._max_items = user_config["max_items"]
        self.settings = HttpSettings(**user_config["http"])

    async def score(self, items: list[Item], values: bool, version: str | None) -> Scores:
        """See `actors.serving.http_api.ScoringService`."""
        if len(items) > self._max_items:  # the client below would split the call
            raise ScorerRejected(
                "too_many_items", f"{len(items)} items in one call, the maximum is {self._max_items}: split the call"
            )
        return await self._client.score_items_async(
            items, values=values, version=version, deadline_s=self.settings.deadline_s
        )

    async def info(self) -> ScorerInfo:
        """See `actors.serving.http_api.ScoringService`.

        Reads the replicas' reports, because a call to a replica would wait behind its queue. An idle pool that has
        scaled to zero (``min_replicas: 0``) therefore counts as not ready until the next call.
        """
        try:
            reports = await asyncio.wait_for(self._status.reports.remote(SILENCE_S), INFO_TIMEOUT_S)
        except (asyncio.TimeoutError, RayError):
            reports = []
        # During a swap, the critic that is being published.
        report = next((one for one in reports if one.is_current), reports[0] if reports else None)
        if report is None:
            raise ScorerUnavailable("no scorer is ready: wait, or check the pool with `serve status`")
        return report.info

    def on_refusal(self, kind: str) -> None:
        """See `actors.serving.http_api.ScoringService`."""
        self._refusals.inc(1, {"kind": kind})


app = Gateway.bind(ScorerReplica.bind())  # type: ignore[attr-defined]
