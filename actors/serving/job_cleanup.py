"""Ends a pool of scorers with the job that runs it for itself, however that job ends.

What a job starts in Ray Serve outlives it, and a job may be killed before it can tidy up: ``ray job stop`` gives it
three seconds. So an actor that outlives the job, too, looks whether it is still there. Knows nothing of what it does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from actors.runtime.ray_internals import ray_state
from actors.serving import control
from actors.serving.replica_status import NAMESPACE, ON_HEAD

POLL_S = 2.0


class JobCleanup:
    """The actor.

    Args:
        app: The pool's name.
    """

    def __init__(self, app: str) -> None:
        self._app = app
        # Not a call that waits: that would be one of the job, and end with it.
        threading.Thread(target=self._keep, daemon=True).start()

    def _keep(self) -> None:
        context = ray.get_runtime_context()
        try:
            while _runs(context.get_job_id()):
                time.sleep(POLL_S)
            if control.is_running(self._app):
                control.stop(self._app)
        finally:
            ray.kill(context.current_actor)


_Keeper: Any = ray.remote(JobCleanup)


@contextmanager
def ends_with_this_job(app: str) -> Iterator[None]:
    """Sees to it that a pool which is started and stopped inside the block does not outlive the job."""
    keeper = _Keeper.options(
        name=f"pool-keeper-{app}", namespace=NAMESPACE, lifetime="detached", num_cpus=0, resources=ON_HEAD
    ).remote(app)
    try:
        yield
    finally:
        ray.kill(keeper)


def _runs(job: str) -> bool:
    """Whether a job's driver is there; Ray's public way to ask needs a dashboard."""
    return any(one["JobID"] == job and not one["IsDead"] for one in ray_state.jobs())
