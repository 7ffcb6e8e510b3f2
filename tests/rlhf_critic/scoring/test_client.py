"""The client splits, retries and keeps deadlines, and never turns a failure into a number."""

import asyncio
import os
import pickle
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from actors.serving.scorer import Scorer
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.errors import ScorerFailed, ScorerLost, ScorerRejected, ScorerUnavailable, VersionMismatch
from rlhf_critic.scoring import client as client_module
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Conversation, Scores, Text
from tests.actors.scorers import make_conversations, rewards_by_engine
from tests.helpers import run_command, wait_until


class Lengths:
    """A transport whose reward is the length of the response and whose failures are scripted.

    Attributes:
        failures: Errors that the next calls raise.
        versions: Versions that answer the next calls; the last one answers all later calls.
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


class Direct:
    """A transport to a scorer in this process."""

    def __init__(self, scorer):
        self.scorer = scorer

    async def ask(self, items, values, version, timeout_s):
        return await self.scorer.score_async(items, values=values, version=version)

    async def close(self):
        pass


def client_threads():
    return [thread for thread in threading.enumerate() if thread.name == "scorer-client"]


@pytest.fixture(scope="module")
def scorer(critics):
    made = Scorer(ScorerConfig(checkpoint=critics["first"], token_budget=512))
    yield made
    made.close()


@pytest.fixture(scope="module")
def items():
    return make_conversations(30)


@pytest.fixture(scope="module")
def wanted_S(critics, items):
    return rewards_by_engine(critics["first"], items)


@pytest.mark.parametrize("max_items", [1, 7, 30, 64])
def test_however_a_call_is_split_a_scorer_gives_the_rewards_of_training(scorer, items, wanted_S, max_items):
    with ScorerClient(Direct(scorer), max_items_per_call=max_items) as client:
        scores = client.score_items(items, values=True)
        rewards_S = client.score([item.prompt for item in items], [item.response for item in items])
    np.testing.assert_allclose(scores.rewards_S, wanted_S, atol=1e-5)
    np.testing.assert_allclose(rewards_S, wanted_S, atol=1e-5)
    encoded = scorer._version.encoder.encode_batch(items)
    assert scores.tokens_S.tolist() == [len(one.ids) for one in encoded] == [len(one) for one in scores.values]
    assert scores.truncated_S.tolist() == [one.truncated for one in encoded]
    np.testing.assert_allclose([values[-1] for values in scores.values], wanted_S, atol=1e-5)
    assert scores.model_version == scorer.info().model_version


def test_a_scorer_is_asked_from_threads_and_loops_at_once(scorer, items, wanted_S):
    async def ask_some(client):
        both = [client.score_items_async(items[start : start + 5]) for start in range(0, 30, 5)]
        return np.concatenate([scores.rewards_S for scores in await asyncio.gather(*both)])

    with ScorerClient(Direct(scorer), max_items_per_call=4) as client, ThreadPoolExecutor(6) as threads:
        loops = [threads.submit(asyncio.run, ask_some(client)) for _ in range(2)]
        calls = [threads.submit(client.score_items, items[start:]) for start in range(20)]
        ahead = [client.submit(items[:end]) for end in range(1, 10)]
        for loop in loops:
            np.testing.assert_allclose(loop.result(60), wanted_S, atol=1e-5)
        for start, call in enumerate(calls):
            np.testing.assert_allclose(call.result(60).rewards_S, wanted_S[start:], atol=1e-5)
        for end, future in enumerate(ahead, 1):
            np.testing.assert_allclose(future.result(60).rewards_S, wanted_S[:end], atol=1e-5)


@pytest.mark.parametrize("index", [0, 3, 4, 9, 29])
def test_an_item_is_named_by_its_place_in_the_whole_call(scorer, items, index):
    asked = [*items[:index], Text(""), *items[index + 1 :]]
    with (
        ScorerClient(Direct(scorer), max_items_per_call=4) as client,
        pytest.raises(ScorerRejected, match=f"item {index} is empty") as refused,
    ):
        client.score_items(asked)
    assert (refused.value.kind, refused.value.item) == ("empty_text", index)


def test_the_version_that_is_asked_for_answers_or_nobody(scorer, items):
    served = scorer.info().model_version
    with ScorerClient(Direct(scorer)) as client:
        assert client.score_items(items[:2], version=served).model_version == served
        with pytest.raises(VersionMismatch, match=f"version old was requested, this scorer serves {served}"):
            client.score_items(items[:2], version="old")


def test_a_call_during_a_swap_is_answered_whole_by_one_version(critics):
    configs = [ScorerConfig(checkpoint=critics[name]) for name in ("first", "second")]
    asked = make_conversations(12, seed=3)
    by_version = {}
    swapping = Scorer(configs[0])
    with ScorerClient(Direct(swapping), max_items_per_call=3, max_in_flight=2) as client:
        for config in configs:
            swapping.publish(config)
            by_version[swapping.info().model_version] = rewards_by_engine(config.checkpoint, asked)
        swaps = threading.Thread(target=lambda: [swapping.publish(configs[number % 2]) for number in range(6)])
        swaps.start()
        answers = []
        while swaps.is_alive() or not answers:
            answers.append(client.score_items(asked))
        swaps.join()
    swapping.close()
    for scores in answers:
        np.testing.assert_allclose(scores.rewards_S, by_version[scores.model_version], atol=1e-5)
    assert len(by_version) == 2


def test_all_calls_together_keep_the_bound_in_flight():
    transport = Lengths(seconds=0.005)
    with ScorerClient(transport, max_items_per_call=2, max_in_flight=4) as client:
        futures = [client.submit(conversations_of(count)) for count in range(1, 12)]
        for count, future in enumerate(futures, 1):
            assert future.result(30).rewards_S.tolist() == list(range(count))
    assert transport.most_in_flight == 4
    assert transport.in_flight == 0


def test_what_is_taken_back_makes_room_for_others():
    transport = Lengths(seconds=600)
    with ScorerClient(transport, max_in_flight=1) as client:
        slow = client.submit(conversations_of(2))
        wait_until(lambda: transport.in_flight == 1, "the slow call to begin", 30)
        transport.seconds = 0
        next_one = client.submit(conversations_of(3))
        assert slow.cancel()
        assert next_one.result(30).rewards_S.tolist() == [0.0, 1.0, 2.0]
        wait_until(lambda: transport.in_flight == 0, "the slow call to be taken back", 30)


def test_a_part_that_is_refused_takes_the_others_back():
    class RefusesTheShortest(Lengths):
        async def ask(self, items, values, version, timeout_s):
            if not items[0].response:
                raise ScorerRejected("empty_text", "item 0 is empty", 0)
            return await super().ask(items, values, version, timeout_s)

    transport = RefusesTheShortest(seconds=600)
    with ScorerClient(transport, max_items_per_call=1) as client:
        with pytest.raises(ScorerRejected, match="item 3 is empty"):
            client.score_items([*conversations_of(4)[::-1]])
        wait_until(lambda: transport.in_flight == 0, "the other parts to be taken back", 30)


@pytest.mark.parametrize("deadline_s", [0, 0.001, -1])
def test_a_deadline_that_is_over_is_one(deadline_s):
    with ScorerClient(Lengths([ScorerUnavailable("gone")] * 10_000, seconds=0.05)) as client:
        for ask in (client.score_items, lambda *_, **options: client.submit(*_, **options).result(30)):
            with pytest.raises(ScorerUnavailable, match=rf"no scorer answered 2 items within {deadline_s:g} s"):
                ask(conversations_of(2), deadline_s=deadline_s)


def test_each_attempt_is_told_what_is_left_of_the_deadline():
    told = []

    class Clock(Lengths):
        async def ask(self, items, values, version, timeout_s):
            told.append(timeout_s)
            return await super().ask(items, values, version, timeout_s)

    with ScorerClient(Clock([ScorerUnavailable("gone")] * 3), deadline_s=50) as client:
        client.score(["a"], ["b"])
    assert len(told) == 4
    assert told == sorted(told, reverse=True)
    assert 0 < told[-1] < told[0] <= 50


def test_closing_leaves_no_thread_even_where_the_transport_fails():
    class Sticks(Lengths):
        async def close(self):
            raise OSError("cannot be closed")

    before = client_threads()
    for _ in range(20):
        with ScorerClient(Lengths()) as client:
            client.score(["a"], ["b"])
            assert len(client_threads()) == len(before) + 1
        assert client_threads() == before
    client = ScorerClient(Sticks())
    client.score(["a"], ["b"])
    with pytest.raises(OSError, match="cannot be closed"):
        client.close()
    assert client_threads() == before
    assert client.score(["a"], ["bc"]).tolist() == [2.0], "a closed client opens again"
    with pytest.raises(OSError, match="cannot be closed"):
        client.close()


def test_whoever_asks_while_it_is_closed_gets_an_answer_or_is_cancelled():
    client = ScorerClient(Lengths(seconds=0.001))
    asked = []

    def ask():
        for _ in range(50):
            asked.append(client.submit(conversations_of(2)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        client.close()
    client.close()
    assert len(asked) == 200
    for future in asked:
        assert future.done()
        assert future.cancelled() or future.result().rewards_S.tolist() == [0.0, 1.0]


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


class Poisoned(Lengths):
    """A scorer that dies of a response of a given length, with all calls that it is working on, and starts again."""

    def __init__(self, length, **options):
        super().__init__(seconds=0.02, **options)
        self.length, self.died_of, self.lives, self.starts_at = length, [], 0, 0.0

    async def ask(self, items, values, version, timeout_s):
        while time.monotonic() < self.starts_at:  # calls wait for it, and then come all at once
            await asyncio.sleep(0.01)
        life = self.lives
        if any(len(item.response) == self.length for item in items):
            await asyncio.sleep(0.01)
            self.lives += 1
            self.starts_at = time.monotonic() + 0.3
            await asyncio.sleep(0.05)  # others hear of it first
            self.died_of.append(len(items))
        else:
            scores = await super().ask(items, values, version, timeout_s)
        if self.lives > life:
            raise ScorerLost("a replica died during the call")
        return scores


@pytest.mark.parametrize("index", [0, 3, 6, 9])
def test_an_item_that_kills_scorers_is_named_and_asked_for_no_more(index, monkeypatch):
    monkeypatch.setattr(client_module, "MAX_WAIT_S", 0.1)
    transport = Poisoned(index)
    with ScorerClient(transport, max_items_per_call=4, deadline_s=60) as client:
        with pytest.raises(ScorerRejected, match=f"item {index}: 2 scorers died while they scored it alone") as refused:
            client.score_items(conversations_of(10))
        assert (refused.value.kind, refused.value.item) == ("kills_scorers", index)
        part = 2 if index == 9 else 4
        assert transport.died_of == [part, part, 1, 1], "four scorers in all"
        with pytest.raises(ScorerRejected, match="item 0: 2 scorers died"):
            client.score(["p"], ["x" * index])
        assert transport.died_of[4:] == [1, 1, 1]
        wait_until(lambda: transport.in_flight == 0, "the other items to be taken back", 30)


@pytest.mark.parametrize("losses", [1, 4])
def test_items_that_were_there_when_a_scorer_died_are_scored(losses):
    transport = Lengths([ScorerLost("a node was taken away")] * losses, versions=["v1"] * 3 + ["v2"])
    with ScorerClient(transport, max_items_per_call=4, deadline_s=60) as client:
        scores = client.score_items(conversations_of(14), values=True)
    assert scores.rewards_S.tolist() == list(range(14))
    assert [len(values) for values in scores.values] == list(range(14))
    assert scores.model_version == "v2"
    transport = Lengths([ScorerLost("gone")])
    with ScorerClient(transport) as client:
        assert client.score(["a"] * 20, ["bcd"] * 20).tolist() == [3.0] * 20
    assert transport.calls == [20, 20], "after one loss the items are scored together again"
    with (
        ScorerClient(Lengths([ScorerUnavailable("busy")] * 3 + [ScorerLost("gone")] * 3)) as client,
        pytest.raises(ScorerRejected, match="gone"),
    ):
        client.score(["a"], ["bcd"])


def test_the_deadline_is_kept_and_says_why():
    with (
        ScorerClient(Lengths([ScorerUnavailable("all are asleep")] * 10_000)) as client,
        pytest.raises(ScorerUnavailable, match=r"no scorer answered 1 items within 0\.5 s \(all are asleep\)"),
    ):
        client.score(["a"], ["b"], deadline_s=0.5)
    with (
        ScorerClient(Lengths(seconds=60), max_in_flight=1) as client,
        pytest.raises(ScorerUnavailable, match="all busy"),
    ):
        client.score(["a"], ["b"], deadline_s=0.3)


def test_one_version_answers_a_whole_call():
    # Parts that the old version answered are scored again.
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
    before = client_threads()
    transport = Lengths(seconds=60)
    client = ScorerClient(transport)
    taken_back, left = client.submit(conversations_of(2)), client.submit(conversations_of(2))
    wait_until(lambda: transport.in_flight == 2, "both calls to begin", 30)
    assert taken_back.cancel()
    client.close()
    with pytest.raises((CancelledError, asyncio.CancelledError)):
        left.result(10)
    assert transport.closed
    assert client_threads() == before
    client.close()


def test_a_client_travels_to_another_process(tmp_path):
    with ScorerClient(Lengths(versions=["v3"]), max_items_per_call=2, max_in_flight=1, deadline_s=7) as client:
        client.submit(conversations_of(1)).result(30)  # one that is at work travels too
        (tmp_path / "client").write_bytes(pickle.dumps(client))
    there = (
        "import pickle, sys; from rlhf_critic.scoring.items import Conversation\n"
        "client = pickle.load(open(sys.argv[1], 'rb'))\n"
        "scores = client.score_items([Conversation('p', 'x' * number) for number in range(5)])\n"
        "print(scores.rewards_S.tolist(), scores.model_version, client._transport.calls, client._deadline_s)"
    )
    root = Path(__file__).parents[3]
    done = run_command(["-c", there, str(tmp_path / "client")], root, {"PYTHONPATH": os.pathsep.join([str(root)])})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[0.0, 1.0, 2.0, 3.0, 4.0] v3 [1, 2, 2, 1] 7"


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


def test_a_client_needs_neither_torch_nor_transformers():
    modules = "client", "http_client", "http_schema", "items"
    script = "; ".join(f"import rlhf_critic.scoring.{module}" for module in modules)
    script += "; import sys; assert not {'torch', 'transformers', 'datasets', 'ray'} & set(sys.modules)"
    done = run_command(["-c", script], Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_goes_on_with_the_client():
    script = """
import os, warnings
warnings.simplefilter("ignore")
import numpy as np
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Scores

class Lengths:
    async def ask(self, items, values, version, timeout_s):
        rewards_S = np.array([len(item.response) for item in items], dtype=np.float32)
        return Scores(rewards_S, "v1", rewards_S.astype(np.bool_), rewards_S.astype(np.int64))

client = ScorerClient(Lengths(), deadline_s=20)
assert client.score(["a"], ["bc"]).tolist() == [2.0]
client._starting.acquire()  # as another thread may hold it during the fork
child = os.fork()
if not child:
    os._exit(0 if client.score(["a"], ["bcd"]).tolist() == [3.0] else 1)
client._starting.release()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert client.score(["a"], ["b"]).tolist() == [1.0]
"""
    done = run_command(["-c", script], Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
