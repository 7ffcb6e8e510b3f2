"""The status actor keeps the reports of replicas that live, the latest first."""

import pytest

from actors.serving import replica_status
from actors.serving.replica_status import ReplicaReport, ReplicaStatus
from rlhf_critic.config.serve import CallLimits
from rlhf_critic.scoring.items import ScorerInfo


def report_of(replica):
    info = ScorerInfo("v1", "critic", "f", 64, CallLimits(), False, {"critic": 1.0})
    return ReplicaReport(replica, 1, info, "hash", True)


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
