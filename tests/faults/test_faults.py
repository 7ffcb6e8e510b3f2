"""Faults of a cluster change no number, lose nothing, and are reported; README.md here has the table."""

import re

import pytest

from tests.cluster.alone import observe_alone
from tests.faults.scenario import CHECKPOINT_EVERY, STEPS, STRIKE_AFTER

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1900)]  # a hang guard: on a quiet machine it takes minutes
ALL_STEPS = list(range(1, STEPS + 1))
SAME = 1e-6
CHECKPOINTS = [f"step-{step:06d}" for step in range(CHECKPOINT_EVERY, STEPS + 1, CHECKPOINT_EVERY)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return observe_alone("tests.faults.scenario", tmp_path_factory.mktemp("faults"), timeout_s=1800)


def assert_undisturbed(run):
    """Checks exit code 0, every step once, and the weights of the undisturbed run."""
    assert run["code"] == 0, run["output"]
    assert run["steps"] == ALL_STEPS
    assert run["difference"] <= SAME


def assert_refused(job, *messages):
    assert job["code"] == 2, job["output"]
    assert "Traceback" not in job["output"]
    for message in messages:
        assert message in job["output"]


def test_the_run_that_others_are_compared_with_has_three_checkpoints(seen):
    assert_undisturbed(seen["undisturbed"])
    assert seen["undisturbed"]["checkpoints"] == CHECKPOINTS[1:]


def test_the_node_under_a_training_worker_goes(seen):
    fault = seen["node_of_worker"]
    assert STRIKE_AFTER <= fault["struck after"] < STEPS
    assert_undisturbed(fault)


def test_of_two_runs_on_one_name_one_works_and_the_other_is_told(seen):
    fault = seen["driver_killed"]
    assert_refused(fault["second"], "the run 'driver-killed'", "another job is at work on")
    assert_refused(fault["late"], "another job is at work on the run 'driver-killed'")


def test_a_driver_that_is_killed_leaves_a_run_that_goes_on(seen):
    assert STRIKE_AFTER <= seen["driver_killed"]["struck after"] < STEPS
    assert_undisturbed(seen["driver_killed"])


def test_a_rank_that_gets_a_tenth_of_the_time_is_waited_for(seen):
    assert_undisturbed(seen["slow_rank"])
    assert seen["slow_rank"]["slices"] > 5, "the rank was slowed"


def test_a_full_disk_ends_the_run_with_its_checkpoints_and_it_goes_on_when_there_is_room(seen):
    fault = seen["full_disk"]
    failed = fault["failed"]
    assert failed["code"] == 2, failed["output"]
    # The message comes from the project, even where Ray Train meets the full disk first and prints tracebacks.
    assert re.search("^error: .*Free some space, .*--resume", failed["output"], re.MULTILINE)
    assert failed["checkpoints"] == CHECKPOINTS[:1]
    assert "removed unreadable Ray Train snapshot" in fault["output"]
    assert_undisturbed(fault)


def test_a_run_whose_newest_checkpoints_are_damaged_goes_on_from_the_newest_whole_one(seen):
    fault = seen["damaged"]
    _, middle, newest = CHECKPOINTS[1:]
    assert f"damaged/{newest}/model.safetensors: damaged" in fault["output"]
    assert f"damaged/{middle}/resume/" in fault["output"]
    assert f"checkpoint={CHECKPOINTS[1]}" in fault["output"]
    assert_undisturbed(fault)
    assert fault["checkpoints"][-1] == f"{newest}-again"


def test_a_run_without_a_whole_checkpoint_and_an_export_of_a_damaged_one_are_refused(seen):
    fault = seen["damaged"]
    assert_refused(fault["hopeless"], f"hopeless/{CHECKPOINTS[-1]}/model.safetensors: damaged")
    assert fault["hopeless"]["checkpoints"] == CHECKPOINTS[1:], "nothing is removed"
    assert_refused(fault["exported"], f"hopeless/{CHECKPOINTS[1]}/model.safetensors: damaged")


def test_the_node_under_a_critic_shard_goes_and_another_group_meets_a_full_disk(seen):
    fault = seen["node_of_shard"]
    assert len(fault["lost"]) == 1
    assert "critic rank" in fault["lost"][0]
    assert fault["noticed after"] < 30
    assert fault["difference"] <= SAME
    assert "disk/group: could not be written" in fault["full disk"]
    assert not fault["left on it"]


def test_the_node_under_a_scorer_goes_and_a_damaged_critic_is_published(seen):
    fault = seen["node_of_scorer"]
    for job in ("started", "stopped"):
        assert fault[job]["code"] == 0, fault[job]["output"]
    assert_refused(fault["refused"], "model.safetensors: damaged")
    assert fault["failures"] == []
    assert fault["answered"] > 60
    assert len(fault["versions"]) == 1
    assert fault["largest error"] <= 1e-5
