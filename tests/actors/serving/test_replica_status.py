"""The status actor keeps the reports of replicas that live, the latest first."""

import pytest

from actors.serving import replica_status
from actors.serving.replica_status import ReplicaReport, ReplicaStatus
from rlhf_critic.config.serve import CallLimits
from rlhf_critic.scoring.items import ScorerInfo


def report_of(replica, published="hash", is_current=True, version="v1"):
    info = ScorerInfo(version, "critic", "f", 64, CallLimits(), False, {"critic": 1.0})
    return ReplicaReport(replica, 1, info, published, is_current)


def test_a_publication_is_remembered_once_it_is_served(clock):
    status = ReplicaStatus()
    for report in (
        report_of("a"),
        report_of("b"),
        report_of("a", "other", is_current=False),
        report_of("a", "other", version="v2"),
        report_of("b"),
        report_of("b", "other", version="v2"),
    ):
        status.report(report)
    assert [one.model_version for one in status.published()] == ["v2", "v1"]
    for number in range(50):
        status.report(report_of("a", f"publication {number}", version=f"v{number}"))
    assert len(status.published()) == replica_status.KEPT_PUBLICATIONS
    assert status.published()[0].model_version == "v49"


@pytest.fixture
def clock(monkeypatch):
    times = [1000.0]
    monkeypatch.setattr(replica_status.time, "monotonic", lambda: times[0])
    return times


def test_replicas_that_are_long_gone_are_forgotten(clock):
    status = ReplicaStatus()
    for number in range(50):  # on spot nodes replicas come and go for months
        status.report(report_of(f"replica-{number}"))
        clock[0] += 600.0
    names = [report.replica for report in status.reports()]
    assert names == [f"replica-{number}" for number in range(49, 43, -1)]
    assert len(status.reports(within_s=600.0)) == 1
