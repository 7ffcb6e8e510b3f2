"""A run that shrinks when it loses a node, and grows when the autoscaler adds one, equals an undisturbed run."""

import pytest

from tests.cluster.alone import observe_alone

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1000)]  # guards against hangs; normally minutes


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return observe_alone("tests.cluster.scenarios.elastic", tmp_path_factory.mktemp("elastic"), timeout_s=900)


def test_a_run_shrinks_when_a_node_is_killed_and_grows_when_the_autoscaler_brings_one(seen):
    checkpoints = [(one["workers"], one["nodes"]) for one in seen["seen"] if one["what"] == "checkpoint"]
    assert checkpoints == [(2, 2), (2, 2), (1, 1), (2, 2)], seen["seen"]
    counts = [count for _, count in seen["nodes"]]
    assert counts[0] == 0, "the autoscaler brought the first ones, too"


def test_changes_of_size_change_no_loss(seen):
    assert seen["steps"] == 200
    for record, expected in zip(seen["elastic"], seen["undisturbed"], strict=True):
        assert record["step"] == expected["step"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6), record["step"]
