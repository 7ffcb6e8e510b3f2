"""Metrics of a replica record every micro-batch, also one without hits in the prefix cache."""

from actors.serving.metrics import ScorerMetrics
from rlhf_critic.scoring.request_batcher import BatchRecord


def test_a_micro_batch_without_hits_and_evictions_is_recorded():
    metrics = ScorerMetrics("app", "replica")
    first = BatchRecord(sequences=2, requests=1, tokens=10, computed_tokens=8, queue=3, seconds=0.1)
    second = BatchRecord(
        sequences=1, requests=1, tokens=5, computed_tokens=0, queue=0, seconds=0.1, hit_tokens=5, evicted_tokens=2
    )
    for record in (first, second):
        metrics.on_batch(record)
    load = metrics.load()
    assert (load.tokens, load.computed_tokens, load.queue) == (15, 8, 0)
