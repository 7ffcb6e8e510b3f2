"""Decision whether a job that failed is worth another attempt: only if it lost a process, a node or a connection.

Every other error would come again, after the time of another start. Knows nothing about what was computed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable

from ray.exceptions import (
    ActorPlacementGroupRemoved,
    AuthenticationError,
    CrossLanguageError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from torch.distributed import DistError

# Ray's errors that are not the loss of a process, a node or an object.
NOT_LOST = (ActorPlacementGroupRemoved, AuthenticationError, CrossLanguageError, RuntimeEnvSetupError)
UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ETIMEDOUT, errno.EPIPE)
# Gloo raises a RuntimeError that names its source file; NCCL, and a GPU that breaks, have no class of their own either.
LOST_PEER = re.compile(r"\bgloo\b|\bNCCL\b|Connection (closed|reset) by peer|uncorrectable ECC error", re.IGNORECASE)


def is_loss(error: BaseException | None) -> bool:
    """Returns whether an error says that a worker, its node or a connection was lost, or a collective timed out."""
    if isinstance(error, RayTaskError):
        return is_loss(error.cause)
    if isinstance(error, RayActorError):
        return not error.actor_init_failed
    if isinstance(error, RayError):
        return not isinstance(error, NOT_LOST)
    if _is_of_ray_train(error):
        return _is_loss_in_ray_train(error)
    if isinstance(error, DistError | ConnectionError):
        return True
    if isinstance(error, OSError):
        return error.errno in UNREACHABLE
    return isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None


def first_fault(errors: Iterable[Exception]) -> Exception | None:
    """Returns the error of a group of workers that another attempt would meet again; None if a worker was lost.

    When a process dies, the errors of the others may be its consequences. A fault of the program comes again in the
    next attempt, where it is alone.
    """
    errors = list(errors)
    if any(is_loss(error) and (isinstance(error, RayError) or _is_of_ray_train(error)) for error in errors):
        return None
    return next((error for error in errors if not is_loss(error)), None)


def _is_of_ray_train(error: BaseException | None) -> bool:
    return type(error).__module__.startswith("ray.train.")


def _is_loss_in_ray_train(error: BaseException | None) -> bool:
    from actors.runtime import ray_internals  # seconds of import

    if isinstance(error, ray_internals.WorkerHealthCheckFailedError):
        return is_loss(error.health_check_failure)
    names = ("WorkerHealthCheckTimeoutError", "WorkerGroupStartupFailedError", "WorkerGroupStartupTimeoutError")
    return isinstance(error, tuple(getattr(ray_internals, name) for name in (*names, "CollectiveTimeoutError")))
