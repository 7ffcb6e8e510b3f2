"""Stops a job's own pool of scorers when the job ends, however it ends.

Ray Serve outlives the job that starts it, and a job may be killed before it can clean up: ``ray job stop`` gives it
three seconds. A detached actor therefore watches the job and stops the pool. Knows nothing about what the job does.
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
    """The actor that watches the job that created it, for the pool ``app``."""

    def __init__(self, app: str) -> None:
        self._app = app
        # A thread, not an actor call that waits: Ray would cancel the job's call together with the job.
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        context = ray.get_runtime_context()
        try:
            # Whether the job's driver is alive. Ray's public API for this needs the dashboard.
            while any(one["JobID"] == context.get_job_id() and not one["IsDead"] for one in ray_state.jobs()):
                time.sleep(POLL_S)
            if control.is_running(self._app):
                control.stop(self._app)
        finally:
            ray.kill(context.current_actor)


@contextmanager
def ends_with_this_job(app: str) -> Iterator[None]:
    """Guarantees that a pool started and stopped inside the block does not outlive the job."""
    actor: Any = ray.remote(JobCleanup)
    cleanup = actor.options(
        name=f"pool-keeper-{app}", namespace=NAMESPACE, lifetime="detached", num_cpus=0, resources=ON_HEAD
    ).remote(app)
    try:
        yield
    finally:
        ray.kill(cleanup)
