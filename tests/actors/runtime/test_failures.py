"""Only the loss of a process, a node or a connection is worth another attempt."""

import errno

import pytest
import ray
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RuntimeEnvSetupError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from torch.distributed import DistBackendError, DistNetworkError

from actors.runtime import ray_internals
from actors.runtime.failures import first_fault, is_loss
from actors.training.retry import RetryLost, fault_of
from rlhf_critic.errors import DataError, describe_error

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:33517"


def health(failure: Exception) -> Exception:
    return ray_internals.WorkerHealthCheckFailedError("A worker health check failed.", failure=failure)


LOSSES = {
    "a dead worker": health(ActorDiedError()),
    "a dead worker, seen directly": ActorDiedError(),
    "a dead node": NodeDiedError("gone"),
    "a lost object": ObjectLostError("aa", None, ""),
    "a worker killed for its memory": OutOfMemoryError("killed"),
    "a worker that does not answer": ray_internals.WorkerHealthCheckTimeoutError("hangs"),
    "a start that lost a worker": ray_internals.WorkerGroupStartupFailedError("one of the workers"),
    "a barrier that timed out": ray_internals.CollectiveTimeoutError("timed out"),
    "a lost peer": RuntimeError(GLOO),
    "a collective that timed out": RuntimeError("[gloo/pair.cc:1] Timed out waiting 1800000ms for recv operation"),
    "NCCL": DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94"),
    "a store that is gone": DistNetworkError("failed to recv, got 0 bytes"),
    "a closed connection": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "no route": OSError(errno.EHOSTUNREACH, "No route to host"),
    "a broken GPU": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
}
FAULTS = {
    "one of this project": DataError("d.jsonl:3"),
    "a bug": TypeError("unsupported operand"),
    "a shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    "a disk": OSError(errno.EIO, "Input/output error"),
    "a permission": PermissionError(errno.EACCES, "Permission denied", "/x"),
    "an environment": RuntimeEnvSetupError("cannot be set up"),
    "a described one": describe_error(ZeroDivisionError("by zero")),
    "text": UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
    "a value that cannot be sent": health(TypeError("cannot pickle")),
    "a device assertion": RuntimeError("CUDA error: device-side assert triggered"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_loss_is_retried(what):
    assert is_loss(LOSSES[what])
    policy = RetryLost(FailureConfig(max_failures=1))
    lost = WorkerGroupError("lost", {1: LOSSES[what]})
    assert fault_of(lost) is None
    assert [policy.make_decision(lost).name for _ in range(2)] == ["RETRY", "RAISE"]


@pytest.mark.parametrize("what", FAULTS)
def test_anything_else_ends_the_run_at_once(what):
    assert not is_loss(FAULTS[what])
    policy = RetryLost(FailureConfig(max_failures=3, controller_failure_limit=3))
    for error in (WorkerGroupError("failed", {0: FAULTS[what]}), ControllerError(FAULTS[what])):
        assert fault_of(error) is FAULTS[what]
        assert policy.make_decision(error).name == "RAISE"


def test_what_follows_from_a_death_is_no_fault_and_what_follows_from_a_fault_no_loss():
    bug, closed, death = TypeError("a bug"), RuntimeError(GLOO), health(ActorDiedError())
    assert first_fault([closed, bug]) is bug
    assert first_fault([closed, death, ValueError("half of a message")]) is None
    assert first_fault([]) is None


def test_a_constructor_that_raises_loses_no_actor(ray_address):
    @ray.remote(num_cpus=0)
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no such option")

        def answer(self) -> None: ...

    with pytest.raises(ray.exceptions.RayActorError, match="no such option") as died:
        ray.get(Broken.remote().answer.remote(), timeout=60)
    assert not is_loss(died.value)
