"""Metrics of a scorer replica for Ray's exporter: Prometheus, and the dashboard in cluster/grafana.

Prometheus prefixes every name below with ``ray_``.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from ray.util.metrics import Counter, Gauge, Histogram

from rlhf_critic.scoring.http_schema import ReplicaLoad
from rlhf_critic.scoring.items import Scores

if TYPE_CHECKING:
    from rlhf_critic.scoring.request_batcher import BatchRecord

LATENCY_BOUNDS_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
PERCENTILES = (50, 90, 99)
LATEST_CALLS = 1024  # of which the page shows percentiles
TOKEN_BOUNDS = [64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]


class ScorerMetrics:
    """The metrics of one replica of the pool ``app``."""

    def __init__(self, app: str, replica: str) -> None:
        tags = {"app": app, "replica": replica}

        def counter(name: str, description: str, *more: str) -> Counter:
            return Counter(f"rlhf_critic_{name}", description, (*tags, *more)).set_default_tags(tags)

        def gauge(name: str, description: str, *more: str) -> Gauge:
            return Gauge(f"rlhf_critic_{name}", description, (*tags, *more)).set_default_tags(tags)

        def histogram(name: str, description: str, bounds: list[float]) -> Histogram:
            return Histogram(f"rlhf_critic_{name}", description, bounds, tuple(tags)).set_default_tags(tags)

        self._latency = histogram("score_seconds", "Seconds from a call's arrival to its answer.", LATENCY_BOUNDS_S)
        self._batch_tokens = histogram("batch_tokens", "Tokens computed for a micro-batch.", list(TOKEN_BOUNDS))
        self._batch_seconds = histogram("batch_seconds", "Seconds to compute a micro-batch.", LATENCY_BOUNDS_S)
        self._tokens = counter("tokens_total", "Tokens of scored sequences, each counted separately.")
        self._computed_tokens = counter("computed_tokens_total", "Tokens computed, shared prefixes counted once.")
        self._shared = gauge("shared_token_ratio", "Fraction of a micro-batch's tokens saved by shared prefixes.")
        self._hit_tokens = counter("cache_hit_tokens_total", "Tokens of scored sequences that the prefix cache had.")
        self._evicted_tokens = counter("cache_evicted_tokens_total", "Tokens that the prefix cache evicted.")
        self._cache_bytes = gauge("cache_bytes", "Bytes that the prefix cache uses.")
        self._queue = gauge("queue_depth", "Calls waiting when a micro-batch was done.")
        self._items = counter("items_total", "Scored items.", "model_version")
        self._truncated = counter("truncated_items_total", "Items truncated to the length limit.")
        self._refusals = counter("refusals_total", "Rejected or failed calls, by kind.", "kind")
        self._mean = gauge("reward_mean", "Mean reward in the last call.", "model_version")
        self._std = gauge("reward_std", "Standard deviation of rewards in the last call.", "model_version")
        self._version = gauge("version", "1 for the served version, 0 for a previous one.", "model_version")
        self._is_current = gauge("is_current", "1 if a replica serves the critic that was published last, else 0.")
        self._served = ""
        self._items_seen, self._tokens_seen, self._computed_seen, self._queue_seen = 0, 0, 0, 0
        self._latest_s: deque[float] = deque(maxlen=LATEST_CALLS)

    def load(self) -> ReplicaLoad:
        """Returns the load of this replica since it started."""
        latest_s = np.array(self._latest_s)
        percentiles = np.percentile(latest_s, PERCENTILES) if len(latest_s) else ()
        return ReplicaLoad(
            items=self._items_seen,
            tokens=self._tokens_seen,
            computed_tokens=self._computed_seen,
            queue=self._queue_seen,
            latency_s={f"p{name}": float(value_s) for name, value_s in zip(PERCENTILES, percentiles, strict=False)},
        )

    def on_batch(self, batch: BatchRecord) -> None:
        """Records a micro-batch."""
        self._batch_tokens.observe(batch.computed_tokens)
        self._batch_seconds.observe(batch.seconds)
        _add(self._tokens, batch.tokens)
        _add(self._computed_tokens, batch.computed_tokens)
        self._shared.set(max(0.0, 1 - batch.computed_tokens / batch.tokens))
        self._queue.set(batch.queue)
        _add(self._hit_tokens, batch.hit_tokens)
        _add(self._evicted_tokens, batch.evicted_tokens)
        self._cache_bytes.set(batch.cache_bytes)
        self._tokens_seen += batch.tokens
        self._computed_seen += batch.computed_tokens
        self._queue_seen = batch.queue

    def on_scores(self, scores: Scores, seconds: float) -> None:
        """Records an answer."""
        tags = {"model_version": scores.model_version}
        self._latency.observe(seconds)
        self._latest_s.append(seconds)
        self._items_seen += len(scores.rewards_S)
        self._items.inc(len(scores.rewards_S), tags)
        _add(self._truncated, int(scores.truncated_S.sum()))
        self._mean.set(float(scores.rewards_S.mean()), tags)
        self._std.set(float(np.std(scores.rewards_S)), tags)

    def on_refusal(self, kind: str) -> None:
        """Records a rejected or failed call."""
        self._refusals.inc(1, {"kind": kind})

    def on_version(self, model_version: str, is_current: bool) -> None:
        """Records the version that is served, and whether it is the one that was published last.

        Ray exports a gauge for 20 s after it was set, so repeat the call.
        """
        self._is_current.set(float(is_current))
        if self._served not in ("", model_version):
            self._version.set(0, {"model_version": self._served})
        self._version.set(1, {"model_version": model_version})
        self._served = model_version


def _add(counter: Counter, count: int) -> None:
    """Adds to a counter, which accepts no zero."""
    if count:
        counter.inc(count)


def http_refusals(app: str) -> Counter:
    """Returns a pool's counter of HTTP requests without scores, by kind of error, including errors of replicas."""
    counter = Counter("rlhf_critic_http_refusals_total", "Rejected or failed HTTP requests, by kind.", ("app", "kind"))
    return counter.set_default_tags({"app": app})
