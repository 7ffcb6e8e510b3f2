"""The autoscaler adds nodes for work and removes idle ones, without lost requests or wrong answers."""

import pytest

from tests.cluster.alone import observe_alone

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1900)]  # guards against hangs; normally minutes


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return observe_alone("tests.cluster.scenarios.autoscaling", tmp_path_factory.mktemp("autoscaling"), timeout_s=1800)


def test_training_waits_for_nodes_runs_to_its_end_and_gives_them_back(seen):
    training = seen["training"]
    assert training["code"] == 0, training["output"]
    assert "trained 4 steps" in training["output"]
    assert training["checkpoints"] == ["step-000004"]
    nodes = training["nodes"]
    assert nodes["before"] == nodes["when idle"] == 0
    # Two are needed; if they start slowly, Ray may request another.
    assert nodes["at most"] in {2, 3}


def test_scorers_take_nodes_as_they_are_called_and_give_them_back(seen):
    scoring = seen["scoring"]
    for job in ("started", "stopped"):
        assert scoring[job]["code"] == 0, scoring[job]["output"]
    assert scoring["replicas under load"] == 3
    assert scoring["nodes"] == {
        "before": 0,
        "started": 1,
        "under load": 3,
        "with one caller": 1,
        "without a caller": 0,
        "called again": 1,
        "stopped": 0,
    }


def test_no_request_is_lost_and_no_answer_is_wrong_while_nodes_come_and_go(seen):
    scoring = seen["scoring"]
    assert scoring["failures"] == []
    assert all(count > 0 for count in scoring["answered"].values()), scoring["answered"]
    assert scoring["largest error"] <= 1e-5
