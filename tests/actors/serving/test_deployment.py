"""A pool of real replicas gives correct rewards by every interface, under load, while replicas die, swap and scale."""

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from actors.serving import control
from actors.serving.deployment import deployment_hash
from actors.serving.handle import connect, why_down
from actors.serving.replica_status import read_status
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.errors import (
    CheckpointError,
    ConfigError,
    CriticError,
    ScorerRejected,
    ScorerUnavailable,
    VersionMismatch,
)
from rlhf_critic.scoring.http_client import connect_http
from rlhf_critic.scoring.items import Conversation, Text
from tests.actors.scorers import make_conversations, rewards_by_engine
from tests.helpers import wait_until
from tests.jobs.ppo_rules import DIE

TOLERANCE = 1e-5
pytestmark = pytest.mark.timeout(600)


def replica_pids():
    """Returns the process ids of the running replicas."""
    details = control._client().get_serve_details()["applications"]["scorers"]["deployments"]["Scorer"]["replicas"]
    return [replica["pid"] for replica in details if replica["state"] == "RUNNING"]


@pytest.fixture
def client():
    with connect(max_in_flight=64, deadline_s=240) as connected:
        yield connected


def test_a_text_has_one_reward_whoever_asks_and_in_whatever_company(serving, critics, client):
    url = serving(critics["first"], max_replicas=1)
    items = make_conversations(40)
    wanted = rewards_by_engine(critics["first"], items)
    encoder = load_critic(critics["first"]).encoder
    texts = [encoder.render(*item) for item in items]
    ids = [encoder.encode(*item).ids for item in items]

    def ask_all_ways():
        over_http = connect_http(url)
        yield client.score([item.prompt for item in items], [item.response for item in items])
        yield client.score_items([Text(text) for text in texts]).rewards_S
        yield client.score_items(ids).rewards_S
        yield over_http.score_items(items).rewards_S
        yield over_http.score_items(ids).rewards_S
        chats = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]} for p, r in items]
        yield httpx.post(f"{url}/score", json={"items": chats}).json()["rewards"]
        yield httpx.post(f"{url}/get_reward", json={"query": texts, "prompts": texts, "labels": texts}).json()[
            "rewards"
        ]
        unfinished = [text.removesuffix(encoder.ending) + "</s></s>" for text in texts]
        yield httpx.post(f"{url}/get_reward", json={"query": unfinished}).json()["scores"]
        for sent in (texts, ids):
            data = httpx.post(f"{url}/classify", json={"input": sent, "model": None}).json()["data"]
            yield [entry["probs"][0] for entry in data]
        yield [
            httpx.post(f"{url}/classify", json={"messages": chat["messages"]}).json()["data"][0]["probs"][0]
            for chat in chats
        ]
        over_http.close()

    for rewards in ask_all_ways():
        np.testing.assert_allclose(rewards, wanted, atol=TOLERANCE)
    others = [client.submit(make_conversations(1 + seed % 7, seed)) for seed in range(200)]
    for rewards in ask_all_ways():
        np.testing.assert_allclose(rewards, wanted, atol=TOLERANCE)
    for seed, other in enumerate(others[::20]):
        expected = rewards_by_engine(critics["first"], make_conversations(1 + (seed * 20) % 7, seed * 20))
        np.testing.assert_allclose(other.result(60).rewards_S, expected, atol=TOLERANCE)


def test_values_end_with_the_reward(serving, critics, client):
    serving(critics["first"], max_replicas=1)
    items = make_conversations(10)
    scores = client.score_items(items, values=True)
    assert [len(values) for values in scores.values] == scores.tokens_S.tolist()
    np.testing.assert_allclose([values[-1] for values in scores.values], scores.rewards_S, atol=TOLERANCE)
    assert scores.truncated_S.any()
    assert not scores.truncated_S.all()


def test_normalised_rewards_are_on_the_scale_of_the_card(serving, critics, client):
    serving(critics["first"], max_replicas=1, normalize=True)
    items = make_conversations(5)
    plain = rewards_by_engine(critics["first"], items)
    np.testing.assert_allclose(client.score_items(items).rewards_S, (plain - 0.25) / 2.0, atol=TOLERANCE)


def test_many_threads_ask_at_once_whether_a_pool_is_down(serving, critics):
    """Callers that wait for long ask so, and Ray's own `serve.status` fails in several threads."""
    serving(critics["first"], max_replicas=1)
    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(why_down, ["scorers"] * 200)) == {""}
        assert why_down("other") == "there is no pool 'other'"


def test_a_version_that_is_not_served_gives_no_rewards(serving, critics, client):
    url = serving(critics["first"], max_replicas=1)
    served = client.score_items(make_conversations(1)).model_version
    assert client.score_items(make_conversations(1), version=served).model_version == served
    with pytest.raises(VersionMismatch, match="other@7 was requested, this scorer serves tiny@1#"):
        client.score_items(make_conversations(1), version="other@7")
    with connect_http(url) as over_http, pytest.raises(VersionMismatch, match="other@7"):
        over_http.score_items(make_conversations(1), version="other@7")


def test_publishing_under_load_loses_nothing_and_mixes_nothing(serving, critics, client, tmp_path):
    serving(critics["first"], min_replicas=2, max_replicas=2)
    items = make_conversations(30)
    wanted = {name: rewards_by_engine(path, items) for name, path in critics.items()}
    ended = threading.Event()
    failures, answers = [], Counter()

    def ask(seed):
        rng = random.Random(seed)
        while not ended.is_set():
            rows = rng.sample(range(len(items)), 8)
            try:
                scores = client.score_items([items[row] for row in rows])
            except CriticError as error:
                failures.append(error)
                return
            name = {"tiny@1": "first", "tiny@2": "second"}[scores.model_version.split("#")[0]]
            answers[name] += 1
            if not np.allclose(scores.rewards_S, wanted[name][rows], atol=TOLERANCE):
                failures.append((name, rows, scores))

    with ThreadPoolExecutor(4) as callers:
        asking = [callers.submit(ask, seed) for seed in range(4)]
        try:
            for name in ("second", "first", "second"):
                version = control.publish("scorers", critics[name], 120, lambda _: None)
                reports = [report for report in read_status("scorers") if report.pid in replica_pids()]
                assert len(reports) == 2
                assert {report.info.model_version for report in reports} == {version}
            bad = shutil.copytree(critics["first"], tmp_path / "bad")
            weights = load_file(bad / "model.safetensors")
            weights["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))
            save_file(weights, bad / "model.safetensors", {"format": "pt"})
            with pytest.raises(CheckpointError, match="NaN or infinite"):
                control.publish("scorers", str(bad), 120, lambda _: None)
            os.truncate(bad / "model.safetensors", 1000)
            with pytest.raises(CheckpointError, match="damaged"):
                control.publish("scorers", str(bad), 120, lambda _: None)
        finally:
            ended.set()
        for caller in asking:
            caller.result(60)
    assert not failures
    assert min(answers.values()) > 20
    assert client.score_items(items).model_version == version
    assert control.wait_until_served("scorers", 60, lambda _: None) == version
    # A replica that starts later serves the published critic, not the pool's first one.
    pid = replica_pids()[0]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(set(replica_pids()) - {pid}) == 2, "another replica", 90)
    for _ in range(20):
        assert client.score_items(items[:1]).model_version == version


@pytest.mark.slow
def test_of_two_that_publish_at_once_the_later_wins_and_the_other_is_told(serving, critics, client):
    serving(critics["first"], min_replicas=2, max_replicas=2)
    later: list[str] = []

    def publish_another(_):
        if not later:
            later.append("")
            later[0] = control.publish("scorers", critics["first"], 120, lambda _: None)

    with pytest.raises(ConfigError, match="'scorers' was changed by another process meanwhile"):
        control.publish("scorers", critics["second"], 120, publish_another)
    assert control.wait_until_served("scorers", 60, lambda _: None) == later[0]
    assert client.score_items(make_conversations(3)).model_version == later[0]


@pytest.mark.slow
def test_a_publication_that_is_interrupted_leaves_the_pool_with_what_it_had(serving, critics, client):
    serving(critics["first"], min_replicas=2, max_replicas=2)
    before = client.score_items(make_conversations(1)).model_version

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        control.publish("scorers", critics["second"], 120, interrupt)
    assert control.wait_until_served("scorers", 60, lambda _: None) == before
    assert {client.score_items(make_conversations(1)).model_version for _ in range(20)} == {before}


@pytest.mark.slow
def test_a_swap_that_failed_heals_without_anybody_who_publishes(serving, critics, client, tmp_path):
    url = serving(critics["first"], min_replicas=2, max_replicas=2)
    before = client.score_items(make_conversations(1)).model_version
    late = tmp_path / "late"
    config = control._deployed("scorers")
    user_config = control._replicas(config)["user_config"]
    user_config["scorer"] = {**user_config["scorer"], "checkpoint": str(late), "digest": None}
    control._apply("scorers", config)  # as `kubectl apply` of a manifest does
    wanted = deployment_hash(user_config)

    def failed():
        reports = [one for one in read_status("scorers") if one.pid in replica_pids() and one.published == wanted]
        return len(reports) == 2 and all(one.error for one in reports)

    def told():
        alive = {one.replica for one in read_status("scorers") if one.pid in replica_pids()}
        replicas = httpx.get(f"{url}/info", timeout=30).json()["replicas"]
        return [one["is_current"] for one in replicas if one["replica"] in alive]

    wait_until(failed, "both replicas to fail", 60)
    assert told() == [False, False]
    assert {client.score_items(make_conversations(1)).model_version for _ in range(10)} == {before}
    shutil.copytree(critics["second"], tmp_path / "copy")
    (tmp_path / "copy").rename(late)

    def served():
        reports = [one for one in read_status("scorers") if one.pid in replica_pids()]
        return {one.info.model_version for one in reports} if sum(one.is_current for one in reports) == 2 else ()

    wait_until(lambda: len(served()) == 1, "both replicas to serve it", 60)
    (version,) = served()
    assert {client.score_items(make_conversations(1)).model_version for _ in range(20)} == {version}
    assert told() == [True, True]


@pytest.mark.slow
def test_a_link_that_moves_on_changes_nothing_and_callers_are_told_why_a_pool_is_down(serving, critics, tmp_path):
    served, away, latest = tmp_path / "served", tmp_path / "away", tmp_path / "latest"
    shutil.copytree(critics["first"], served)
    latest.symlink_to(served)
    serving(str(latest), min_replicas=1, max_replicas=1)
    items = make_conversations(3)

    def kill():
        (pid,) = replica_pids()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in replica_pids(), "the end of the replica", 60)

    with connect(deadline_s=120) as patient, connect(deadline_s=30) as waiting:
        before = patient.score_items(items).model_version
        latest.unlink()
        latest.symlink_to(tmp_path / "nothing")
        kill()
        assert patient.score_items(items).model_version == before, "the directory that was published"
        served.rename(away)
        kill()
        try:
            with pytest.raises(ScorerUnavailable, match=rf"no scorer is running: .*{served}: no such directory"):
                waiting.score_items(items)
        finally:
            control.stop("scorers")


@pytest.mark.slow
def test_replicas_that_are_killed_lose_no_request(serving, critics, client):
    calls, kill_every_s = 1000, 2.0
    serving(critics["first"], min_replicas=3, max_replicas=3)
    items = make_conversations(60)
    wanted = rewards_by_engine(critics["first"], items)
    ended = threading.Event()
    killed = []

    def kill_now_and_then():
        rng = random.Random(0)
        while not ended.wait(kill_every_s):
            alive = [pid for pid in replica_pids() if not is_zombie(pid)]
            if alive:
                os.kill(pid := rng.choice(alive), signal.SIGKILL)
                killed.append(pid)

    def ask(number):
        rows = random.Random(number).sample(range(len(items)), 6)
        time.sleep(0.05)  # pauses between calls, so that several kills happen during the run
        return np.abs(client.score_items([items[row] for row in rows]).rewards_S - wanted[rows]).max()

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        with ThreadPoolExecutor(4) as callers:
            differences = list(callers.map(ask, range(calls)))
    finally:
        ended.set()
        killer.join()
    assert len(differences) == calls
    assert max(differences) < TOLERANCE
    assert len(killed) >= 3
    wait_until(lambda: len(replica_pids()) == 3, "three replicas again", 120)
    assert not set(killed) & set(replica_pids())
    assert client.score_items(items[:3]).rewards_S == pytest.approx(wanted[:3], abs=TOLERANCE)


@pytest.mark.slow
def test_an_item_that_kills_replicas_is_named_by_its_index_and_others_are_scored(serving, critics, tmp_path):
    components = tmp_path / "components.yaml"
    components.write_text(
        "components:\n- {kind: critic}\n"
        "- {kind: python, name: dies, weight: 0.0, function: 'tests.jobs.ppo_rules:dies'}\n"
    )
    url = serving(critics["first"], min_replicas=2, max_replicas=2, components=str(components))
    items = make_conversations(12)
    poisoned = [*items[:7], Conversation("please", DIE), *items[7:]]
    with connect(deadline_s=200) as client, connect_http(url, deadline_s=200) as over_http:
        before = set(replica_pids())
        for ask in (client, over_http):
            with pytest.raises(ScorerRejected, match="item 7: 2 scorers died while they scored it alone") as refused:
                ask.score_items(poisoned)
            assert (refused.value.kind, refused.value.item) == ("kills_scorers", 7)
        assert not before & set(replica_pids())
        wanted = rewards_by_engine(critics["first"], items)
        np.testing.assert_allclose(client.score_items(items).rewards_S, wanted, atol=TOLERANCE)


def test_a_full_pool_turns_callers_away_at_their_deadline_and_recovers(serving, critics):
    url = serving(critics["first"], max_replicas=1, max_ongoing_requests=1, max_queued_requests=1)
    heavy = [Conversation(f"please {number} " * 60, "thank you " * 60) for number in range(1024)]
    with connect(max_items_per_call=1024, max_in_flight=40) as client:
        started = time.monotonic()
        calls = [client.submit(heavy, deadline_s=1.5) for _ in range(20)]
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200, "it is warm, though busy"
        outcomes = []
        for call in calls:
            try:
                outcomes.append(call.result(60).rewards_S)
            except ScorerUnavailable as error:
                outcomes.append(error)
        assert time.monotonic() - started < 30
        refused = [outcome for outcome in outcomes if isinstance(outcome, ScorerUnavailable)]
        assert len(refused) >= 10
        assert "no scorer answered 1024 items within 1.5 s" in str(refused[0])
        items = make_conversations(5)
        wanted = rewards_by_engine(critics["first"], items)
        np.testing.assert_allclose(client.score_items(items, deadline_s=60).rewards_S, wanted, atol=TOLERANCE)


@pytest.mark.slow
def test_the_pool_grows_under_load_and_shrinks_when_idle(serving, critics, client):
    options = {"max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 2}
    serving(critics["first"], min_replicas=1, **options)
    wait_until(lambda: len(replica_pids()) == 1, "one idle replica", 120)
    items = make_conversations(200)
    wanted = rewards_by_engine(critics["first"], items)
    ended = threading.Event()
    seen = set()

    def ask(seed):
        rng, asked = random.Random(seed), 0
        while not ended.is_set():
            rows = rng.sample(range(len(items)), 64)
            np.testing.assert_allclose(
                client.score_items([items[row] for row in rows]).rewards_S, wanted[rows], atol=TOLERANCE
            )
            asked += 1
        return asked

    with ThreadPoolExecutor(32) as callers:
        asking = [callers.submit(ask, seed) for seed in range(32)]
        try:
            wait_until(lambda: seen.add(len(replica_pids())) or max(seen) >= 2, "a second replica", 120)
            *_, there = control._state("scorers")
            targets = [there]
            control.publish("scorers", critics["first"], 120, lambda _: targets.append(control._state("scorers")[-1]))
            assert min(targets) == there >= 2, "a pool does not shrink because something is published"
        finally:
            ended.set()
        assert all(caller.result(120) > 0 for caller in asking)
    wait_until(lambda: len(replica_pids()) == 1, "the pool to shrink", 120)
    np.testing.assert_allclose(client.score_items(items[:5]).rewards_S, wanted[:5], atol=TOLERANCE)


@pytest.mark.slow
def test_a_replica_of_two_shards_answers_like_one_in_one_process(serving, critics, client):
    serving(critics["first"], max_replicas=1, shards=2)
    items = make_conversations(40)
    wanted = rewards_by_engine(critics["first"], items)
    calls = [client.submit(items[start : start + 8], values=start % 16 == 0) for start in range(0, 40, 8)]
    rewards = np.concatenate([call.result(120).rewards_S for call in calls])
    np.testing.assert_allclose(rewards, wanted, atol=TOLERANCE)
    # The next critic is loaded in the same bundles, beside the served one.
    control.publish("scorers", critics["second"], 120, lambda _: None)
    wanted = rewards_by_engine(critics["second"], items)
    np.testing.assert_allclose(client.score_items(items).rewards_S, wanted, atol=TOLERANCE)
    wait_until(lambda: len(live_shards()) == 2, "the shards before to end", 60)
    # A lost shard ends its replica, and callers do not notice.
    shards = live_shards()
    os.kill(shards[0], signal.SIGKILL)
    np.testing.assert_allclose(client.score_items(items).rewards_S, wanted, atol=TOLERANCE)
    wait_until(lambda: is_zombie(shards[1]), "the other shard to end", 60)


def live_shards():
    """Returns the ids of the processes that hold a shard of a critic."""
    there = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    return [process.pid for process in there if process.info["cmdline"][0].startswith("ray::ShardedCriticRank")]


def is_zombie(pid):
    """Returns whether a process has ended, even if its parent has not reaped it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_cannot_be_scored_is_refused_with_a_word_for_it(serving, critics, client):
    serving(critics["first"], max_replicas=1)
    bad = {
        "no_items": [],
        "empty_text": [Text("")],
        "not_text": [Conversation("a", 3)],
        "text_too_long": [Text("a" * 1_000_000)],
        "bad_token_id": [[10**6]],
        "not_unicode": [Text("\ud800")],
    }
    for kind, items in bad.items():
        with pytest.raises(ScorerRejected) as refused:
            client.score_items(items)
        assert refused.value.kind == kind
        assert len(client.score_items(make_conversations(2)).rewards_S) == 2
    assert len(client.score_items(make_conversations(10_000)).rewards_S) == 10_000


def test_a_checkpoint_with_a_pickle_or_another_tokenizer_is_refused(serving, critics, tmp_path):
    import torch

    serving(critics["first"], max_replicas=1)
    pickled = shutil.copytree(critics["second"], tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors only"):
        control.publish("scorers", str(pickled), 60, lambda _: None)
    other = Path(shutil.copytree(critics["second"], tmp_path / "other"))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(CheckpointError, match="fingerprint"):
        control.publish("scorers", str(other), 60, lambda _: None)
