"""Concurrent callers each get their own results, what they share is computed once, and nobody waits for ever."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_critic.errors import NonFiniteRewardError, ScorerUnavailable
from rlhf_critic.prefix_tree import PrefixTree
from rlhf_critic.request_batcher import Computed, RequestBatcher

BUDGET = 40


def forward(sequences, rewards_only):
    """Values that depend on everything before a token, as a critic's do."""
    values = [np.cumsum(np.asarray(ids) % 7 + 1).astype(np.float32) for ids in sequences]
    outputs = [value[-1:] for value in values] if rewards_only else values
    return Computed(outputs, len(PrefixTree.build(sequences)))


class Recorder:
    """Computes as `forward` does, when it may, and remembers what it was given."""

    def __init__(self):
        self.batches = []
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, sequences, rewards_only):
        assert self.may_go.wait(30)
        self.batches.append([list(ids) for ids in sequences])
        return forward(sequences, rewards_only)


def check(sequences, rewards_only, outputs):
    for wanted, output in zip(forward(sequences, rewards_only).outputs, outputs, strict=True):
        np.testing.assert_array_equal(output, wanted)


requests = st.lists(
    st.tuples(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=60), min_size=1, max_size=5), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(requests)
def test_everyone_gets_their_own(asked):
    recorder = Recorder()
    recorder.may_go.clear()
    batcher = RequestBatcher(recorder, BUDGET, prefix_tree=True)
    futures = [batcher.submit(sequences, rewards_only) for sequences, rewards_only in asked]
    recorder.may_go.set()
    for (sequences, rewards_only), future in zip(asked, futures, strict=True):
        check(sequences, rewards_only, future.result(30))
    for batch in recorder.batches:
        assert len(PrefixTree.build(batch)) <= BUDGET or len({tuple(ids) for ids in batch}) == 1
    assert sum(map(len, recorder.batches)) == sum(len(sequences) for sequences, _ in asked)
    assert batcher.close(30)


def test_callers_on_many_threads():
    batcher = RequestBatcher(forward, BUDGET, prefix_tree=True)
    rng = np.random.default_rng(0)
    asked = [[rng.integers(0, 9, rng.integers(1, 30)) for _ in range(4)] for _ in range(200)]
    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(lambda sequences: batcher.submit(sequences, True).result(30), asked))
    for sequences, outputs in zip(asked, answers, strict=True):
        check(sequences, True, outputs)
    assert batcher.close(30)


def test_what_callers_share_is_computed_once():
    recorder, records = Recorder(), []
    recorder.may_go.clear()
    batcher = RequestBatcher(recorder, 200, prefix_tree=True, on_batch=records.append)
    first = batcher.submit([[9]], True)  # keeps the critic busy while the others come
    prompt = list(range(100, 150))
    futures = [batcher.submit([[*prompt, caller]], True) for caller in range(8)]
    recorder.may_go.set()
    first.result(30)
    for caller, future in enumerate(futures):
        check([[*prompt, caller]], True, future.result(30))
    assert batcher.close(30)
    assert sum(record.computed_tokens for record in records) <= 1 + 50 + 8 + 51, (
        "the prompt once, or twice with the first"
    )
    assert max(record.requests for record in records) >= 7
    assert sum(record.tokens for record in records) == 1 + 8 * 51


def test_the_oldest_does_not_wait_for_the_newer():
    recorder = Recorder()
    recorder.may_go.clear()
    batcher = RequestBatcher(recorder, 10, prefix_tree=True)
    busy = batcher.submit([[1]], True)
    lonely = batcher.submit([[999] * 8], True)
    futures = [batcher.submit([[5] * 8 + [number]], True) for number in range(50)]
    recorder.may_go.set()
    for future in (busy, lonely, *futures):
        future.result(30)
    position = next(index for index, batch in enumerate(recorder.batches) if [999] * 8 in batch)
    assert position <= 2
    assert batcher.close(30)


def test_an_error_reaches_those_it_concerns():
    def fails_on_thirteen(sequences, rewards_only):
        if any(13 in ids for ids in sequences):
            raise RuntimeError("thirteen")
        computed = forward(sequences, rewards_only)
        return Computed(
            [
                output * np.nan if ids[0] == 66 else output
                for ids, output in zip(sequences, computed.outputs, strict=True)
            ],
            1,
        )

    batcher = RequestBatcher(fails_on_thirteen, 4, prefix_tree=False)
    with pytest.raises(RuntimeError, match="thirteen"):
        batcher.submit([[1, 2, 3], [13, 13, 13]], True).result(30)
    with pytest.raises(NonFiniteRewardError, match="item 1"):
        batcher.submit([[1, 2, 3], [66, 1]], True).result(30)
    check([[1, 2, 3]], True, batcher.submit([[1, 2, 3]], True).result(30))
    assert batcher.close(30)


def test_what_is_cancelled_is_not_computed():
    recorder = Recorder()
    recorder.may_go.clear()
    batcher = RequestBatcher(recorder, BUDGET, prefix_tree=True)
    first = batcher.submit([[1]], True)
    time.sleep(0.1)  # the first is being computed
    cancelled = batcher.submit([[77, 77]], True)
    last = batcher.submit([[2]], True)
    assert cancelled.cancel()
    recorder.may_go.set()
    first.result(30)
    last.result(30)
    assert [77, 77] not in [ids for batch in recorder.batches for ids in batch]
    assert batcher.close(30)


def test_closing_finishes_what_there_is_and_takes_no_more():
    recorder = Recorder()
    recorder.may_go.clear()
    batcher = RequestBatcher(recorder, 4, prefix_tree=True)
    futures = [batcher.submit([[number, number]], True) for number in range(10)]
    threading.Timer(0.2, recorder.may_go.set).start()
    assert batcher.close(30)
    assert all(future.done() for future in futures)
    with pytest.raises(ScorerUnavailable, match="shutting down"):
        batcher.submit([[1]], True)


def test_closing_in_vain_fails_what_is_left():
    recorder = Recorder()
    recorder.may_go.clear()
    batcher = RequestBatcher(recorder, 4, prefix_tree=True)
    futures = [batcher.submit([[number, number, number]], True) for number in range(3)]
    assert not batcher.close(0.2)
    for future in futures:
        with pytest.raises(ScorerUnavailable, match=r"0\.2 s were not enough"):
            future.result(30)
    recorder.may_go.set()
