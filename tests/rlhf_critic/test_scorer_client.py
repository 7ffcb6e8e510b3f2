"""The client splits, retries and waits as it says, keeps versions apart, and turns no failure into a number."""

import asyncio
import pickle
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rlhf_critic.errors import ScorerFailed, ScorerRejected, ScorerUnavailable, VersionMismatch
from rlhf_critic.http_schema import ScoreRequest, ScoreResponse
from rlhf_critic.scorer_client import ScorerClient
from rlhf_critic.scoring import Conversation, Scores, Text


class Lengths:
    """A way to a scorer whose reward is the length of a text; it fails as it is told to.

    Attributes:
        failures: What the next calls raise.
        versions: What the next calls are answered by; the last for ever.
    """

    def __init__(self, failures=(), versions=("v1",), seconds=0.0):
        self.failures, self.versions, self.seconds = list(failures), list(versions), seconds
        self.calls, self.in_flight, self.most_in_flight = [], 0, 0

    async def ask(self, items, values, version, timeout_s):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.calls.append(len(items))
            await asyncio.sleep(self.seconds)
            if self.failures:
                raise self.failures.pop(0)
            served = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
            if version not in {None, served}:
                raise VersionMismatch(f"{version} was asked for, {served} is served")
            rewards_S = np.array([len(item.response) for item in items], dtype=np.float32)
            flags_S = np.zeros(len(items), dtype=np.bool_)
            told = tuple(np.arange(len(item.response), dtype=np.float32) for item in items) if values else None
            return Scores(rewards_S, served, flags_S, rewards_S.astype(np.int64), {"half": rewards_S / 2}, told)
        finally:
            self.in_flight -= 1

    async def close(self):
        self.closed = True


def conversations_of(count):
    return [Conversation("p", "x" * number) for number in range(count)]


def test_a_large_call_is_split_and_joined_in_order():
    transport = Lengths(seconds=0.01)
    with ScorerClient(transport, max_items_per_call=7, max_in_flight=3) as client:
        scores = client.score_items(conversations_of(100), values=True)
    assert scores.rewards_S.tolist() == list(range(100))
    assert scores.components["half"].tolist() == [number / 2 for number in range(100)]
    assert [len(values) for values in scores.values] == list(range(100))
    assert sorted(transport.calls) == [2, *[7] * 14]
    assert transport.most_in_flight == 3


def test_what_may_be_retried_is_and_nothing_else():
    with ScorerClient(Lengths([ScorerUnavailable("gone")] * 3)) as client:
        assert client.score(["a"], ["bcd"]).tolist() == [3.0]
    for error in (ScorerRejected("empty_text", "item 0 is empty"), ScorerFailed("broken")):
        transport = Lengths([error])
        with ScorerClient(transport) as client:
            with pytest.raises(type(error), match=str(error)):
                client.score(["a"], ["bcd"])
            assert len(transport.calls) == 1
            assert client.score(["a"], ["bcd"]).tolist() == [3.0]


def test_the_deadline_is_kept_and_says_why():
    with ScorerClient(Lengths([ScorerUnavailable("all are asleep")] * 10_000)) as client:
        started = time.monotonic()
        with pytest.raises(ScorerUnavailable, match=r"no scorer answered 1 items within 0\.5 s \(all are asleep\)"):
            client.score(["a"], ["b"], deadline_s=0.5)
        assert time.monotonic() - started < 10
    with (
        ScorerClient(Lengths(seconds=60), max_in_flight=1) as client,
        pytest.raises(ScorerUnavailable, match="all busy"),
    ):
        client.score(["a"], ["b"], deadline_s=0.3)


def test_one_version_answers_a_whole_call():
    # Parts that the old version answered are asked again.
    transport = Lengths(versions=["v1", "v1", "v2"], seconds=0.01)
    with ScorerClient(transport, max_items_per_call=2, max_in_flight=1) as client:
        scores = client.score_items(conversations_of(8))
    assert scores.model_version == "v2"
    assert scores.rewards_S.tolist() == list(range(8))
    assert len(transport.calls) == 6


def test_versions_that_never_agree_are_told_apart():
    transport = Lengths(versions=["v1", "v2"] * 10_000)
    with ScorerClient(transport, max_items_per_call=1) as client, pytest.raises(VersionMismatch, match="'v1', 'v2'"):
        client.score_items(conversations_of(2), deadline_s=0.5)
    with ScorerClient(Lengths()) as client, pytest.raises(VersionMismatch, match="v7 was asked for"):
        client.score_items(conversations_of(2), version="v7")


def test_many_threads_and_an_event_loop():
    async def ask(client):
        both = [client.score_async(["a"], ["x" * number]) for number in range(20)]
        return [rewards.tolist() for rewards in await asyncio.gather(*both)]

    with ScorerClient(Lengths(seconds=0.01)) as client:
        assert asyncio.run(ask(client)) == [[float(number)] for number in range(20)]
        results = {}
        threads = [
            threading.Thread(target=lambda n=n: results.update({n: client.score(["a"], ["x" * n]).tolist()}))
            for n in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: [float(number)] for number in range(20)}


def test_a_call_can_be_taken_back_and_closing_ends_the_rest():
    before = threading.active_count()
    transport = Lengths(seconds=60)
    client = ScorerClient(transport)
    taken_back, left = client.submit(conversations_of(2)), client.submit(conversations_of(2))
    time.sleep(0.1)
    assert taken_back.cancel()
    client.close()
    with pytest.raises((CancelledError, asyncio.CancelledError)):
        left.result(10)
    assert transport.closed
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before
    client.close()


def test_a_client_travels():
    client = ScorerClient(Lengths(), max_items_per_call=2, deadline_s=7)
    client.score(["a"], ["b"])
    there = pickle.loads(pickle.dumps(ScorerClient(Lengths(versions=["v3"]), max_items_per_call=2)))
    assert there.score_items(conversations_of(5)).model_version == "v3"
    there.close()
    client.close()


def test_nothing_to_score_and_senseless_options():
    with ScorerClient(Lengths()) as client, pytest.raises(ScorerRejected, match="nothing to score"):
        client.score([], [])
    for options in ({"max_items_per_call": 0}, {"max_in_flight": 0}, {"deadline_s": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            ScorerClient(Lengths(), **options)


fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 8), elements=fp32))
def test_the_wire_keeps_every_bit(rewards_S):
    flags_S = rewards_S > 0
    scores = Scores(rewards_S, "v", flags_S, flags_S.astype(np.int64), {"a": rewards_S}, (rewards_S,))
    back = ScoreResponse.model_validate_json(ScoreResponse.of(scores).model_dump_json()).to_scores()
    for one, other in (
        (back.rewards_S, rewards_S),
        (back.components["a"], rewards_S),
        (back.values[0], rewards_S),
        (back.truncated_S, flags_S),
    ):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


def test_items_cross_the_wire():
    turns = [{"role": "user", "content": "a"}]
    items = [Conversation("a", ""), Conversation(turns, "b"), Text("c"), Text("d e", "e", True), [1, 2]]
    request = ScoreRequest.model_validate(ScoreRequest.of(items, True, "v1"))
    assert (request.values, request.version) == (True, "v1")
    back = [item.to_item() for item in request.items]
    assert back[:4] == items[:4]
    assert back[4].tolist() == [1, 2]
