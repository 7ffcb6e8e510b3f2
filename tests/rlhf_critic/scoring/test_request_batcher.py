"""Concurrent callers get their own results, shared prefixes are computed once, and no caller waits forever."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.serving.scorer import LocalCritic
from rlhf_critic.batching.prefix_tree import PrefixTree
from rlhf_critic.checkpoint.critic_directory import open_critic
from rlhf_critic.errors import NonFiniteRewardError, ScorerUnavailable
from rlhf_critic.scoring import request_batcher
from rlhf_critic.scoring.local import score_sequences
from rlhf_critic.scoring.request_batcher import PLANNED_AHEAD, Computed, OutOfDeviceMemory, RequestBatcher
from tests.actors.scorers import make_conversations
from tests.helpers import wait_until

BUDGET = 40
BUSY = [7]


def forward(sequences, rewards_only):
    """Returns values that depend on all tokens before them, as a critic's do."""
    values = [np.cumsum(np.asarray(ids) % 7 + 1).astype(np.float32) for ids in sequences]
    outputs = [value[-1:] for value in values] if rewards_only else values
    return Computed(outputs, len(PrefixTree.build(sequences)))


class Recorder:
    """A `forward` that waits for ``may_go`` and records its batches."""

    def __init__(self, compute=forward):
        self.compute = compute
        self.batches = []
        self.began = threading.Event()
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, sequences, rewards_only):
        self.began.set()
        assert self.may_go.wait(30)
        self.batches.append([list(ids) for ids in sequences])
        return self.compute(sequences, rewards_only)


def busy_batcher(recorder, budget, prefix_tree=True, **options):
    """Returns a batcher that computes `BUSY` until ``recorder.may_go``, so later requests meet in its queue."""
    recorder.may_go.clear()
    batcher = RequestBatcher(recorder, budget, prefix_tree, **options)
    busy = batcher.submit([BUSY], True)
    assert recorder.began.wait(30)
    return batcher, busy


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


@settings(max_examples=40, deadline=None)
@given(requests)
def test_padded_rows_keep_the_budget_too(asked):
    recorder = Recorder()
    batcher, _ = busy_batcher(recorder, BUDGET, prefix_tree=False)
    futures = [batcher.submit(sequences, rewards_only) for sequences, rewards_only in asked]
    recorder.may_go.set()
    for (sequences, rewards_only), future in zip(asked, futures, strict=True):
        check(sequences, rewards_only, future.result(30))
    assert batcher.close(30)
    for batch in recorder.batches:
        assert len(batch) * max(map(len, batch)) <= BUDGET or len(batch) == 1
    assert sorted(ids for batch in recorder.batches for ids in batch) == sorted(
        [BUSY, *(ids for sequences, _ in asked for ids in sequences)]
    )


@settings(max_examples=30, deadline=None)
@given(requests, st.integers(2, 6))
def test_threads_that_ask_at_once_get_their_own(asked, threads):
    batcher = RequestBatcher(forward, BUDGET, prefix_tree=True)
    with ThreadPoolExecutor(threads) as callers:
        answers = list(callers.map(lambda request: batcher.submit(*request).result(30), asked))
    for (sequences, rewards_only), outputs in zip(asked, answers, strict=True):
        check(sequences, rewards_only, outputs)
    assert batcher.close(30)


@pytest.fixture(scope="module")
def critic(critics):
    return LocalCritic(open_critic(critics["first"]), token_budget=256, use_gpu=False)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=2, max_size=6), st.integers(0, 99))
def test_a_critic_gives_everyone_what_it_gives_them_alone(critic, calls, seed):
    items = make_conversations(sum(count for count, _ in calls), seed)
    ids = iter([one.ids for one in critic.encoder.encode_batch(items)])
    asked = [([next(ids) for _ in range(count)], rewards_only) for count, rewards_only in calls]
    records = []
    batcher = RequestBatcher(critic.forward, critic.tokens_at_once, critic.prefix_tree, on_batch=records.append)
    futures = [batcher.submit(sequences, rewards_only) for sequences, rewards_only in asked]
    answers = [future.result(60) for future in futures]
    assert batcher.close(30)  # a critic computes for one thread at a time
    for (sequences, rewards_only), outputs in zip(asked, answers, strict=True):
        for sequence, output in zip(sequences, outputs, strict=True):
            alone = critic.forward([sequence], rewards_only).outputs[0]
            assert output.dtype == np.float32
            np.testing.assert_allclose(output, alone, atol=1e-5)
            reward = score_sequences(critic._critic, [sequence], token_budget=4096)
            np.testing.assert_allclose(output[-1:], reward, atol=1e-5)
    assert all(record.computed_tokens <= critic.tokens_at_once for record in records)
    assert sum(record.tokens for record in records) == sum(len(ids) for sequences, _ in asked for ids in sequences)


def test_a_critic_computes_what_callers_share_once(critic):
    recorder, records = Recorder(critic.forward), []
    batcher, busy = busy_batcher(recorder, 4096, on_batch=records.append)
    asked = [[one.ids] for one in critic.encoder.encode_batch(make_conversations(40))]
    futures = [batcher.submit(sequences, True) for sequences in asked]
    recorder.may_go.set()
    for future in (busy, *futures):
        future.result(60)
    assert batcher.close(30)
    tree = PrefixTree.build([ids for (ids,) in asked])
    assert [record.requests for record in records] == [1, 40]
    assert records[1].computed_tokens == len(tree) < records[1].tokens == int(tree.lengths_S.sum())


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
    batcher, busy = busy_batcher(recorder, 200, on_batch=records.append)
    prompt = list(range(100, 150))
    futures = [batcher.submit([[*prompt, caller]], True) for caller in range(8)]
    recorder.may_go.set()
    busy.result(30)
    for caller, future in enumerate(futures):
        check([[*prompt, caller]], True, future.result(30))
    assert batcher.close(30)
    assert [record.computed_tokens for record in records] == [1, 50 + 8]
    assert [record.requests for record in records] == [1, 8]
    assert [record.tokens for record in records] == [1, 8 * 51]
    assert [record.queue for record in records] == [8, 0]


def test_the_oldest_does_not_wait_for_the_newer():
    recorder = Recorder()
    batcher, busy = busy_batcher(recorder, 10)
    lonely = batcher.submit([[999] * 8], True)
    futures = [batcher.submit([[5] * 8 + [number]], True) for number in range(50)]
    recorder.may_go.set()
    for future in (busy, lonely, *futures):
        future.result(30)
    assert [999] * 8 in recorder.batches[1]
    assert batcher.close(30)


@pytest.mark.parametrize("rewards_only", [True, False])
def test_newer_calls_without_end_do_not_starve_the_oldest(rewards_only):
    """Every micro-batch adds two calls, one of each kind, that would fill the next micro-batch better."""
    stream = []

    def more(_):
        if not lonely.done() and len(stream) < 400:
            stream.extend(batcher.submit([[5] * 8 + [len(stream)]], kind) for kind in (True, False))

    recorder = Recorder()
    batcher, _ = busy_batcher(recorder, 10, on_batch=more)
    stream += [batcher.submit([[5] * 8 + [number]], number % 2 == 0) for number in range(10)]
    lonely = batcher.submit([[999] * 9, [998] * 9, [997] * 9], rewards_only)
    recorder.may_go.set()
    check([[999] * 9, [998] * 9, [997] * 9], rewards_only, lonely.result(30))
    assert len(stream) < 100
    assert batcher.close(30)
    assert all(future.done() for future in stream)


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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(11, 14), min_size=1, max_size=4), min_size=1, max_size=3), max_size=8))
def test_an_error_reaches_the_callers_of_its_micro_batch_and_no_other(asked):
    def fails_on_thirteen(sequences, rewards_only):
        if any(13 in ids for ids in sequences):
            raise RuntimeError("thirteen")
        return forward(sequences, rewards_only)

    recorder = Recorder(fails_on_thirteen)
    batcher, busy = busy_batcher(recorder, 6)
    asked = [[[caller, *ids] for ids in sequences] for caller, sequences in enumerate(asked)]
    futures = [batcher.submit(sequences, True) for sequences in asked]
    recorder.may_go.set()
    busy.result(30)
    unlucky = set()
    for caller, (sequences, future) in enumerate(zip(asked, futures, strict=True)):
        try:
            check(sequences, True, future.result(30))
        except RuntimeError:
            unlucky.add(caller)
    check([[1, 2, 3]], True, batcher.submit([[1, 2, 3]], True).result(30))
    assert batcher.close(30)
    failed = [batch for batch in recorder.batches if any(13 in ids for ids in batch)]
    assert unlucky == {ids[0] for batch in failed for ids in batch}


def test_nan_for_one_caller_is_an_error_for_that_one_only():
    def nan_after_66(sequences, rewards_only):
        computed = forward(sequences, rewards_only)
        for ids, output in zip(sequences, computed.outputs, strict=True):
            output[ids[0] == 66 :] *= np.nan if ids[0] == 66 else 1
        return computed

    recorder = Recorder(nan_after_66)
    batcher, _ = busy_batcher(recorder, BUDGET)
    good, bad, also_good = [[1, 2]], [[3], [66, 5], [4]], [[66 + 1, 5]]
    futures = [batcher.submit(sequences, False) for sequences in (good, bad, also_good)]
    recorder.may_go.set()
    check(good, False, futures[0].result(30))
    with pytest.raises(NonFiniteRewardError, match="item 1"):
        futures[1].result(30)
    check(also_good, False, futures[2].result(30))
    assert [len(batch) for batch in recorder.batches] == [1, 5], "all three were in one micro-batch"
    assert batcher.close(30)


def test_an_observer_that_fails_harms_no_call(caplog):
    def fails(record):
        raise ZeroDivisionError("no tokens")

    batcher = RequestBatcher(forward, BUDGET, prefix_tree=True, on_batch=fails)
    with caplog.at_level(logging.ERROR, logger="rlhf_critic.scoring.request_batcher"):
        for _ in range(2):
            check([[1, 2, 3]], True, batcher.submit([[1, 2, 3]], True).result(30))
        assert batcher.close(30)
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError] * 2


def test_a_forward_pass_that_gives_too_little_is_an_error():
    batcher = RequestBatcher(lambda *_: Computed([np.zeros(1, np.float32)], 1), BUDGET, prefix_tree=True)
    with pytest.raises(ValueError, match="shorter"):
        batcher.submit([[1], [2]], True).result(30)
    assert len(batcher.submit([[1]], True).result(30)) == 1
    assert batcher.close(30)


@pytest.mark.parametrize("nothing", [[], [[]], [[1], []]])
def test_a_call_without_tokens_is_refused_at_once_and_harms_no_other(nothing):
    recorder = Recorder()
    batcher, _ = busy_batcher(recorder, BUDGET)
    other = batcher.submit([[1]], True)
    with pytest.raises(ValueError, match="at least one"):
        batcher.submit(nothing, True)
    recorder.may_go.set()
    check([[1]], True, other.result(30))
    assert batcher.close(30)


def test_what_is_cancelled_is_not_computed():
    recorder = Recorder()
    batcher, first = busy_batcher(recorder, BUDGET)
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
    batcher, busy = busy_batcher(recorder, 4)
    futures = [busy, *(batcher.submit([[number, number, number]], True) for number in range(3))]
    assert not batcher.close(0.2)
    for future in futures:
        with pytest.raises(ScorerUnavailable, match=r"unfinished calls after 0\.2 s"):
            future.result(30)
    with pytest.raises(ScorerUnavailable, match="shutting down"):
        batcher.submit([[1]], True)
    recorder.may_go.set()
    wait_until(lambda: not batcher._thread.is_alive(), "the batcher's thread to end")
    assert recorder.batches == [[BUSY]], "what was failed is not computed"
    assert batcher.close(0.2)


@pytest.fixture
def plans(monkeypatch):
    """The numbers of sequences that were planned together, plan by plan."""
    numbers: list[int] = []
    real = request_batcher.plan_sequences

    def plan(sequences, *options):
        numbers.append(len(sequences))
        return real(sequences, *options)

    monkeypatch.setattr(request_batcher, "plan_sequences", plan)
    return numbers


def test_a_large_call_is_planned_once(plans):
    recorder = Recorder()
    batcher = RequestBatcher(recorder, BUDGET, prefix_tree=True)
    sequences = [[number, *range(9)] for number in range(200)]
    check(sequences, True, batcher.submit(sequences, True).result(30))
    assert len(recorder.batches) >= 40
    assert plans == [200]
    assert batcher.close(30)


def test_a_new_call_joins_the_end_of_a_large_one(plans):
    recorder = Recorder()
    batcher, _ = busy_batcher(recorder, BUDGET)
    large = [[number, *range(9)] for number in range(40)]
    futures = [batcher.submit(large, True), batcher.submit([[39, *range(9), 5]], True)]
    recorder.may_go.set()
    check(large, True, futures[0].result(30))
    check([[39, *range(9), 5]], True, futures[1].result(30))
    assert plans[:2] == [1, 40]
    assert len(plans) <= 2 + PLANNED_AHEAD
    assert recorder.batches[-1][-1] == [39, *range(9), 5], "beside the sequence that it continues"
    assert [39, *range(9)] in recorder.batches[-1]
    assert batcher.close(30)


def test_what_does_not_fit_the_memory_is_computed_in_smaller_micro_batches(plans):
    def small_only(sequences, rewards_only):
        if sum(map(len, sequences)) > 12:
            raise OutOfDeviceMemory("too large")
        return forward(sequences, rewards_only)

    recorder = Recorder(small_only)
    batcher = RequestBatcher(recorder, BUDGET, prefix_tree=True)
    sequences = [[number, 1, 2, 3] for number in range(20)]
    check(sequences, True, batcher.submit(sequences, True).result(30))
    with pytest.raises(OutOfDeviceMemory, match="too large"):
        batcher.submit([[1] * 13], True).result(30)
    check([[1, 2]], True, batcher.submit([[1, 2]], True).result(30))
    assert [len(batch) for batch in recorder.batches[:2]] == [10, 5]
    assert batcher.close(30)


def test_a_plan_that_fails_ends_the_oldest_call_only(monkeypatch):
    real, failures = request_batcher.plan_sequences, iter([RuntimeError("no plan")])

    def plan(*arguments):
        for failure in failures:
            raise failure
        return real(*arguments)

    monkeypatch.setattr(request_batcher, "plan_sequences", plan)
    batcher = RequestBatcher(forward, BUDGET, prefix_tree=True)
    with pytest.raises(RuntimeError, match="no plan"):
        batcher.submit([[1]], True).result(30)
    check([[1, 2]], True, batcher.submit([[1, 2]], True).result(30))
    assert batcher.close(30)
