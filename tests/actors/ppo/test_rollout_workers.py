"""Each rollout is made once with the same result, whichever process is killed, with the numbers of its policy.

Real workers and a real pool of scorers. Knows nothing about updates.
"""

import dataclasses
import os
import random
import signal
import threading
import time

import numpy as np
import psutil
import pytest
import ray

from actors.ppo import rollout_workers
from actors.ppo.policy_group import PolicyOptions, PolicyWeights
from actors.ppo.rollout_workers import RolloutTask, RolloutWorkers, score_again
from actors.serving import control
from actors.serving.handle import connect
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import EncodingError, RankLost, RolloutsUnavailable, ScorerUnavailable
from rlhf_critic.model.policy import create_policy
from rlhf_critic.scoring.items import Conversation
from tests.actors.scorers import rewards_by_engine
from tests.helpers import WORDS, wait_until

TOKENS, TASKS, PROMPTS = 24, 12, 4
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def slow_scorers(serving, critics, tmp_path_factory):
    """Two slow replicas: 0.3 s per call."""
    components = tmp_path_factory.mktemp("components") / "components.yaml"
    components.write_text(
        "components:\n  - {kind: critic}\n"
        "  - {kind: python, name: exclaims, function: 'tests.jobs.ppo_rules:exclaims_slowly', weight: 2.0}\n"
    )
    serving(critics["first"], min_replicas=2, max_replicas=2, components=str(components))


@pytest.fixture(scope="module")
def client(slow_scorers):
    with connect(deadline_s=120) as connected:
        yield connected


@pytest.fixture(scope="module")
def options(tiny_model) -> PolicyOptions:
    return PolicyOptions(BodyConfig(path=tiny_model), OptimizerConfig(), "plain", 1, 0, 1.0)


@pytest.fixture(scope="module")
def weights(options, ray_address) -> PolicyWeights:
    policy = create_policy(options.model, options.tokenizer())
    return PolicyWeights.put(3, policy.model.state_dict())


@pytest.fixture(scope="module")
def tasks(options) -> list[RolloutTask]:
    encoder = Encoder(options.tokenizer(), 64)
    rng = random.Random(0)
    made = []
    for number in range(TASKS):
        prompts = tuple(" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(PROMPTS))
        ids = tuple(tuple(encoder.tokenizer(encoder.open(prompt))["input_ids"]) for prompt in prompts)
        made.append(RolloutTask(tuple(range(PROMPTS * number, PROMPTS * (number + 1))), prompts, ids, seed=number))
    return made


@pytest.fixture(scope="module")
def workers(options, client):
    with RolloutWorkers(2, options, client, TOKENS, cpus_per_worker=0.3) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(workers, tasks, weights):
    return workers.run(tasks, weights, 120)


def pids_of(name: str) -> list[int]:
    """Returns processes of this session's Ray with the title of an actor class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "".join(process.cmdline()[:1]).startswith(f"ray::{name}"):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return sorted(found)


def replica_pids() -> list[int]:
    details = control._client().get_serve_details()["applications"]["scorers"]["deployments"]["Scorer"]["replicas"]
    return [replica["pid"] for replica in details if replica["state"] == "RUNNING"]


def assert_same_rollouts(rollouts, expected):
    assert [rollout.row for rollout in rollouts] == [rollout.row for rollout in expected]
    for one, other in zip(rollouts, expected, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_array_equal(one.log_probs, other.log_probs)
        assert (one.prompt, one.response, one.truncated) == (other.prompt, other.response, other.truncated)
        assert one.reward == pytest.approx(other.reward, abs=1e-5)


def test_rollouts_carry_what_the_policy_drew_and_what_scorers_said(undisturbed, tasks, critics, options):
    rollouts, timings = undisturbed
    assert [one.row for one in rollouts] == [row for task in tasks for row in task.rows]
    by_row = {
        row: (p, ids) for task in tasks for row, p, ids in zip(task.rows, task.prompts, task.prompt_ids, strict=True)
    }
    tokenizer = load_tokenizer(options.model.path)
    unlimited = Encoder(load_tokenizer(critics["first"]), 10_000)
    critic = rewards_by_engine(critics["first"], [Conversation(one.prompt, one.response) for one in rollouts])
    for one, of_critic in zip(rollouts, critic, strict=True):
        assert (one.prompt, one.prompt_ids) == by_row[one.row]
        ended = one.response_ids.tolist()[-1] == tokenizer.eos_token_id
        assert one.truncated == (not ended)
        assert len(one.response_ids) == TOKENS or ended
        assert tokenizer.eos_token not in one.response
        said = one.response_ids.tolist()[: -1 if ended else None]
        assert one.response == tokenizer.decode(said, clean_up_tokenization_spaces=False)
        marks = one.response.count("!") / max(1, len("".join(one.response.split())))
        assert one.components["exclaims"] == pytest.approx(marks, abs=1e-6)
        assert one.components["critic"] == pytest.approx(of_critic, abs=1e-5)
        assert one.reward == pytest.approx(of_critic + 2 * marks, abs=1e-5)
        assert one.model_version.startswith("tiny@1#")
        assert one.policy_version == 3
        assert one.prompt_truncated_for_reward == (len(unlimited.encode(one.prompt, one.response).ids) > 64)
        assert one.log_probs.dtype == np.float32
        assert (one.log_probs <= 0).all()
    assert timings.generating > 0
    assert timings.waiting > 0.3


def test_a_task_comes_out_the_same_whoever_does_it_and_whatever_came_before(undisturbed, workers, tasks, weights):
    few = [tasks[7], tasks[2]]
    rollouts, _ = workers.run(few, weights, 120)
    by_row = {rollout.row: rollout for rollout in undisturbed[0]}
    assert_same_rollouts(rollouts, [by_row[row] for task in few for row in task.rows])


def test_killed_workers_and_replicas_lose_nothing_and_double_nothing(undisturbed, workers, tasks, weights):
    killed: dict[str, int] = {}
    finished: list[int] = []

    def kill(name: str, pids: list[int]) -> None:
        os.kill(pids[0], signal.SIGKILL)
        killed[name] = len(finished)

    def disturb(_: int) -> None:
        """Kills during sampling and scoring: after the second task, and after the fourth."""
        finished.append(_)
        if len(finished) == 2:
            kill("worker", pids_of("RolloutWorker"))
        if len(finished) == 4:
            kill("replica", replica_pids())

    before = pids_of("RolloutWorker")
    rollouts, _ = workers.run(tasks, weights, 200, disturb)
    assert killed == {"worker": 2, "replica": 4}
    assert sum(finished) == len(rollouts) == TASKS * PROMPTS
    assert_same_rollouts(rollouts, undisturbed[0])
    assert len(set(pids_of("RolloutWorker")) & set(before)) == 1, "another worker has taken its place"
    wait_until(lambda: len(replica_pids()) == 2, "two replicas again")


def test_a_worker_draws_the_next_task_while_scorers_judge_the_last(options, client, tasks, weights, tmp_path):
    """A client whose first call is answered only when the second has come."""
    meeting = [dataclasses.replace(task, prompts=(f"meet {tmp_path}",) * PROMPTS) for task in tasks[:2]]
    with RolloutWorkers(1, options, client, TOKENS, cpus_per_worker=0.3) as alone:
        assert len(alone.run(meeting, weights, 120)[0]) == 2 * PROMPTS


def test_progress_tells_every_rollout_once(workers, tasks, weights):
    told: list[int] = []
    workers.run(tasks[:3], weights, 120, told.append)
    assert told == [PROMPTS] * 3


def test_new_weights_are_loaded_and_named(undisturbed, workers, tasks, weights, options):
    policy = create_policy(options.model, options.tokenizer())
    for parameter in policy.parameters():
        parameter.data.mul_(1.5)
    changed = PolicyWeights.put(4, policy.model.state_dict())
    rollouts, _ = workers.run(tasks[:2], changed, 120)
    assert {rollout.policy_version for rollout in rollouts} == {4}
    old = [rollout.log_probs[0] for rollout in undisturbed[0][: len(rollouts)]]
    assert not np.allclose([rollout.log_probs[0] for rollout in rollouts], old)
    assert_same_rollouts(workers.run(tasks[:2], weights, 120)[0], undisturbed[0][: len(rollouts)])


def test_a_deadline_is_kept_and_the_next_call_is_not_confused(undisturbed, workers, tasks, weights):
    started = time.monotonic()
    with pytest.raises(RolloutsUnavailable, match=rf"waited 0.5 s for {TASKS} tasks of rollouts.*--rollout.timeout-s"):
        workers.run(tasks, weights, 0.5)
    assert time.monotonic() - started < 5
    assert_same_rollouts(workers.run(tasks[:2], weights, 120)[0], undisturbed[0][: 2 * PROMPTS])


@pytest.mark.slow
def test_a_policy_that_cannot_be_built_is_an_error_at_once(options, client, tasks, weights):
    """This is not the loss of a worker, after which another would be tried."""
    nowhere = PolicyOptions(BodyConfig(path="nowhere"), options.optimizer, "plain", 1, 0, 1.0)
    with (
        RolloutWorkers(1, nowhere, client, TOKENS, cpus_per_worker=0.3) as broken,
        pytest.raises(EncodingError, match="no tokenizer could be loaded from 'nowhere'"),
    ):
        broken.run(tasks, weights, 200)


def test_workers_that_are_lost_too_often_are_given_up(workers, tasks, weights, monkeypatch):
    monkeypatch.setattr(rollout_workers, "MAX_LOSSES", 0)
    with pytest.raises(RolloutsUnavailable, match="1 rollout workers were lost during one iteration"):
        workers.run(tasks, weights, 120, lambda _: os.kill(pids_of("RolloutWorker")[0], signal.SIGKILL))


@ray.remote(num_cpus=0)
class Holder:
    """Owner of weights, as a policy's rank is."""

    def put(self, weights):
        return (ray.put(weights),)


@pytest.mark.slow
def test_weights_that_went_with_their_shard_are_a_lost_rank_which_a_job_survives(workers, tasks, weights):
    holder = Holder.remote()
    (kept,) = ray.get(holder.put.remote(ray.get(weights.stored[0])))
    ray.kill(holder)
    time.sleep(1)
    with pytest.raises(RankLost, match="the policy's weights were lost"):
        workers.run(tasks[:1], PolicyWeights(99, (kept,)), 60)
    assert len(workers.run(tasks[:1], weights, 60)[0]) == PROMPTS


def test_rewards_of_two_versions_become_those_of_one(undisturbed, client, critics):
    rollouts, _ = undisturbed
    control.publish("scorers", critics["second"], 120, lambda _: None)
    again = score_again(rollouts, client)
    assert {rollout.model_version.split("#")[0] for rollout in again} == {"tiny@2"}
    items = [Conversation(one.prompt, one.response) for one in rollouts]
    np.testing.assert_allclose(
        [one.components["critic"] for one in again], rewards_by_engine(critics["second"], items), atol=1e-5
    )
    for before, after in zip(rollouts, again, strict=True):
        assert after.response_ids is before.response_ids
        assert after.log_probs is before.log_probs
        assert after.components["exclaims"] == before.components["exclaims"]
        assert after.reward == pytest.approx(after.components["critic"] + 2 * after.components["exclaims"], abs=1e-5)
        assert after.policy_version == before.policy_version


def test_what_was_too_long_for_the_scorers_says_so(undisturbed, client):
    short = dataclasses.replace(undisturbed[0][0], prompt="please", response="explain")
    long = dataclasses.replace(short, response="please " * 70)
    assert [one.prompt_truncated_for_reward for one in score_again([long, short], client)] == [True, False]


@pytest.mark.slow
def test_scorers_that_are_gone_end_a_call_after_its_deadline_unless_they_come_back_in_time(
    options, tasks, weights, serving, critics
):
    """The last test of this module, because it ends the pool."""
    serving(critics["first"])
    with connect(deadline_s=4) as impatient, RolloutWorkers(1, options, impatient, TOKENS, cpus_per_worker=0.3) as made:
        made.run(tasks[:1], weights, 120)
        gone = threading.Thread(target=control.stop, args=("scorers",))
        gone.start()
        gone.join()
        wait_until(lambda: not pids_of("ServeReplica:scorers:Scorer"), "the replicas to end")
        with pytest.raises(ScorerUnavailable, match=r"no scorer answered \d+ items within 4 s"):
            made.run(tasks, weights, 120)
    patience = {"patience_s": 120, "cpus_per_worker": 0.3}
    with connect(deadline_s=1) as client, RolloutWorkers(1, options, client, TOKENS, **patience) as made:
        back = threading.Timer(5, serving, (critics["first"],))
        back.start()
        assert len(made.run(tasks[:1], weights, 120)[0]) == PROMPTS
        back.join()
