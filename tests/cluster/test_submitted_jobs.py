"""Jobs submitted to a cluster of several nodes: their results, the output for users, and their leftovers."""

import pytest

from tests.cluster.alone import observe_alone

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1900)]  # guards against hangs; normally minutes


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return observe_alone("tests.cluster.scenarios.submitting", tmp_path_factory.mktemp("submitting"), timeout_s=1800)


def test_training_spans_nodes_and_tells_the_user(seen):
    job = seen["train"]
    assert job["code"] == 0, job["output"]
    assert "succeeded" in job["output"]
    assert "train.jsonl: 24 preferences" in job["output"]
    assert "trained 4 steps" in job["output"]
    assert "Error in training function" not in job["output"]
    assert {"critic.json", "model.safetensors", "manifest-0-of-2.json", "manifest-1-of-2.json"} <= set(job["files"])


def test_each_node_hands_over_what_its_own_ranks_wrote(seen):
    """These nodes share their temporary directory."""
    first, second = map(set, seen["train"]["of nodes"])
    assert first
    assert second
    assert not first & second


def test_a_job_that_is_refused_fails_and_tells_why(seen):
    job = seen["refused"]
    assert job["code"] == 1
    assert "error: there is a run named 'first'" in job["output"]
    assert "Traceback" not in job["output"]


def test_a_pool_serves_after_the_job_that_started_it_and_ends_with_the_job_that_stops_it(seen):
    started, stopped = seen["serve"], seen["serve --stop"]
    assert started["code"] == 0, started["output"]
    assert "scorers serves first@4#" in started["output"]
    assert stopped["code"] == 0, stopped["output"]
    assert "stopped the pool 'scorers'" in stopped["output"]
    assert stopped["left"] == []


def test_only_scorers_and_their_way_in_keep_nodes_from_an_autoscaler(seen):
    """Single actors of a pool run on the head, which stays; a proxy ends with the last replica of its node."""
    assert set(seen["serve"]["on nodes"]) <= {"ServeReplica:scorers:Scorer", "ProxyActor"}
    assert "ServeReplica:scorers:Scorer" in seen["serve"]["on nodes"]


def test_offline_scoring_gives_every_row_the_reward_of_the_engine(seen):
    job = seen["score"]
    assert job["code"] == 0, job["output"]
    assert "rewards of first@4#" in " ".join(job["output"].split()), "the title of a table, which may be wrapped"
    assert job["rows"] == list(range(12))
    assert job["largest error"] <= 1e-5


def test_ppo_spreads_a_critic_over_nodes_and_asks_the_pool_that_runs(seen):
    job = seen["ppo"]
    assert job["code"] == 0, job["output"]
    assert "versions=first@4#" in job["output"]
    assert {"critic", "policy"} <= set(job["files"])
    assert job["nodes of groups"]["2"] == 2


@pytest.mark.parametrize(
    ("job", "workers"),
    [("train", ["RayTrainWorker"]), ("ppo", ["CriticRank", "RolloutWorker", "ServeReplica:scorers:Scorer"])],
)
def test_a_job_that_is_stopped_leaves_nothing(seen, job, workers):
    """The job is killed at once; its deployments in Ray Serve remain for some seconds."""
    stopped = seen[f"stopped {job}"]
    assert stopped["code"] == 0, stopped["output"]
    assert {f"actor {worker}" for worker in workers} <= set(stopped["worked"])
    assert stopped["left"] == []
