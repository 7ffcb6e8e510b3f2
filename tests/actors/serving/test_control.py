"""Processes that change pools at once do not undo each other's changes, and a job's pool ends with the job."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from actors.serving import control, job_cleanup
from actors.serving.job_cleanup import ends_with_this_job, wait_for_earlier_jobs
from actors.serving.replica_status import NAMESPACE
from rlhf_critic.config.serve import ServeJobConfig
from rlhf_critic.errors import PlacementError
from tests.helpers import wait_until

pytestmark = pytest.mark.timeout(300)
APPS = ("one", "two", "three")


def config_of(app, step):
    return {
        "name": app,
        "route_prefix": f"/{app}",
        "import_path": "tests.actors.serving.small_pool:app",
        "deployments": [{"name": "Scorer", "num_replicas": 1, "user_config": {"step": step}}, {"name": "Gateway"}],
    }


def steps():
    """Returns the configuration of each pool of this module."""
    return {
        name: control._replicas(one)["user_config"]["step"] for name, one in control._configs().items() if name in APPS
    }


@pytest.fixture
def serve_runs(serve_port):
    control.start_serve(ServeJobConfig(checkpoint="-", port=serve_port), authenticated=False)
    yield
    for app in APPS:
        if control.is_running(app):
            control.stop(app)


def keepers():
    return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "pool-keeper-" in one["name"]]


def test_changes_of_different_pools_at_once_are_all_kept(serve_runs, monkeypatch):
    read = control._configs

    def slow_read():
        found = read()
        time.sleep(0.3)  # others read meanwhile
        return found

    monkeypatch.setattr(control, "_configs", slow_read)

    def change(app):
        for step in range(3):
            assert control._apply(app, config_of(app, step))

    with ThreadPoolExecutor(2) as threads:
        for changed in [threads.submit(change, app) for app in APPS[:2]]:
            changed.result(120)
    assert steps() == {"one": 2, "two": 2}


def test_a_pool_that_is_stopped_meanwhile_does_not_come_back(serve_runs, monkeypatch):
    control._apply("one", config_of("one", 0))
    control._apply("two", config_of("two", 0))
    before = control._hash(control._deployed("one"))
    read, has_read = control._configs, threading.Event()

    def slow_read():
        found = read()
        has_read.set()
        time.sleep(1)
        return found

    monkeypatch.setattr(control, "_configs", slow_read)
    with ThreadPoolExecutor(1) as threads:
        changed = threads.submit(control._apply, "two", config_of("two", 1))
        assert has_read.wait(60)
        monkeypatch.setattr(control, "_configs", read)
        control.stop("one")
        assert changed.result(60)
    assert steps() == {"two": 1}
    assert not control._apply("one", config_of("one", 1), only_if=before), "nor by its own publisher"
    assert steps() == {"two": 1}


def test_a_writer_that_ends_or_fails_leaves_the_turn_to_others(serve_runs, monkeypatch):
    with pytest.raises(KeyboardInterrupt), control.only_writer():
        raise KeyboardInterrupt
    with control.only_writer():
        monkeypatch.setattr(control, "WRITER_TIMEOUT_S", 0.5)
        refused = pytest.raises(PlacementError, match="another process has been writing")
        with refused, control.only_writer():
            raise AssertionError("two writers at once")
    monkeypatch.undo()
    with control.only_writer():
        pass


def test_a_stop_that_fails_leaves_the_pool_to_the_actor_that_watches_the_job(serve_runs, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), ends_with_this_job("one"):
        control._apply("one", config_of("one", 0))

        def interrupted(app):
            raise KeyboardInterrupt

        patch.setattr(control, "stop", interrupted)
    (name,) = keepers()
    ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    with ends_with_this_job("two"):
        control._apply("two", config_of("two", 0))
    assert not control.is_running("two")
    wait_until(lambda: not keepers(), "the actor to end", 30)


JOB = """
import ray, sys, time
from actors.serving import control
from actors.serving.job_cleanup import ends_with_this_job
from tests.actors.serving.test_control import config_of
ray.init(sys.argv[1], log_to_driver=False)
with ends_with_this_job("three"):
    control._apply("three", config_of("three", 0))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_pool_of_a_killed_job_ends_and_its_successor_waits_for_that(serve_runs, ray_address, monkeypatch):
    root = Path(__file__).parents[3]
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, ray_address],
        cwd=root,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "."},
    )
    try:
        assert job.stdout.readline() == b"ready\n"
        monkeypatch.setattr(job_cleanup, "DEATH_IS_SEEN_S", 0.5)
        started = time.monotonic()
        wait_for_earlier_jobs("three", 60)
        assert time.monotonic() - started < 20, "a job that runs is not waited for"
        assert control.is_running("three")
        monkeypatch.undo()
    finally:
        os.kill(job.pid, signal.SIGKILL)
        job.wait(30)
    wait_for_earlier_jobs("three", 120)
    assert not control.is_running("three")
    assert not keepers()
