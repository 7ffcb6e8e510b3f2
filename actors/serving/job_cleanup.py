"""Stops a job's own pool of scorers when the job ends, however it ends.

Ray Serve outlives the job that starts it, and a job may be killed before it can clean up: ``ray job stop`` gives it
three seconds. A detached actor therefore watches the job and stops the pool. Knows nothing about what the job does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from actors.runtime.ray_internals import ray_state
from actors.serving import control
from actors.serving.replica_status import NAMESPACE, ON_HEAD

logger = logging.getLogger(__name__)

POLL_S = 2.0
DEATH_IS_SEEN_S = 20.0  # time for Ray to notice that a killed job is dead
PREFIX = "pool-keeper-"


class JobCleanup:
    """The actor that watches the job that created it, for the pool ``app``."""

    def __init__(self, app: str) -> None:
        self._app = app
        # A thread, not an actor call that waits: Ray would cancel the job's call together with the job.
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        context = ray.get_runtime_context()
        while not self._is_done(context.get_job_id()):
            time.sleep(POLL_S)
        ray.kill(context.current_actor)

    def _is_done(self, job_id: str) -> bool:
        """Returns whether the job has ended and its pool is stopped. An error means that it must be tried again."""
        try:
            if not _has_ended(job_id):
                return False
            if control.is_running(self._app):
                control.stop(self._app)
        except Exception:  # Ray's or Serve's controller may restart; without this actor, the pool would stay for ever
            logger.exception("cannot stop the pool of a job that ended; trying again app=%s", self._app)
            return False
        return True


@contextmanager
def ends_with_this_job(app: str) -> Iterator[None]:
    """Guarantees that a pool started inside the block does not outlive the block or, if that is killed, the job."""
    actor: Any = ray.remote(JobCleanup)
    cleanup = actor.options(
        name=f"{PREFIX}{app}-{ray.get_runtime_context().get_job_id()}",
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        resources=ON_HEAD,
    ).remote(app)
    try:
        yield
    finally:
        if control.is_running(app):
            control.stop(app)
        ray.kill(cleanup)  # not if the stop failed or was interrupted: it then stops the pool after this job


def wait_for_earlier_jobs(app: str, timeout_s: float) -> None:
    """Waits until jobs that were killed have no pool ``app`` any more. Jobs that run are not waited for.

    A job that is restarted at once finds the pool of its predecessor, which the latter's actor is about to stop.
    """
    started = time.monotonic()
    while cleanups := _jobs_with_pool(app):
        waited = time.monotonic() - started
        if waited > timeout_s or (waited > DEATH_IS_SEEN_S and not any(map(_has_ended, cleanups))):
            return
        time.sleep(0.5)


def _jobs_with_pool(app: str) -> list[str]:
    """Returns the ids of other jobs that have, or had, a pool of this name."""
    prefix = f"{PREFIX}{app}-"
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"]]
    jobs = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return [job for job in jobs if "-" not in job and job != ray.get_runtime_context().get_job_id()]


def _has_ended(job_id: str) -> bool:
    """Returns whether a job's driver is dead. Ray's public API for this needs the dashboard."""
    return not any(one["JobID"] == job_id and not one["IsDead"] for one in ray_state.jobs())
