"""Without Ray's token, a cluster answers nothing: not its Jobs API, not its agents, not Ray itself.

The HTTP scorers' own token is held by tests/actors/serving/test_http_api.py.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.helpers import wait_until

RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = secrets.token_hex(32)
STRANGERS = {"nobody": {}, "somebody else": {"Authorization": f"Bearer {secrets.token_hex(32)}"}}
DENIED = {401, 403}
ASK_RAY = """
import sys, ray
ray.init(sys.argv[1], logging_level="ERROR")
print("CPUs:", ray.cluster_resources()["CPU"])
"""
pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True)
class Head:
    """A cluster's head node, and the addresses it listens on."""

    address: str
    client: str
    dashboard: str
    agent: str


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def environment(**changes: str) -> dict[str, str]:
    """Returns a user's environment without variables of this machine's Ray; the test's Ray stays on loopback."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} | changes


@pytest.fixture(scope="module")
def head():
    """Starts a head node with a token, like ``ray start --head``."""
    gcs, client, *http = free_ports(4)
    directory = tempfile.mkdtemp(prefix="ray-")  # short, because it contains Ray's sockets
    options = ("port", "ray-client-server-port", "dashboard-port", "dashboard-agent-listen-port")
    arguments = [f"--{name}={port}" for name, port in zip(options, (gcs, client, *http), strict=True)]
    process = psutil.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=1", f"--temp-dir={directory}", *arguments],
        env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        made = Head(f"127.0.0.1:{gcs}", f"ray://127.0.0.1:{client}", *(f"http://127.0.0.1:{port}" for port in http))
        wait_until(lambda: status(f"{made.dashboard}/api/jobs/", TOKEN) == 200, "the Jobs API")
        wait_until(lambda: status(f"{made.agent}/api/local_raylet_healthz", TOKEN) == 200, "the agent")
        yield made
    finally:
        everything = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(everything, timeout=30)
        for one in alive:
            one.kill()
        shutil.rmtree(directory, ignore_errors=True)


def status(url: str, token: str) -> int:
    try:
        return httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10).status_code
    except httpx.HTTPError:
        return 0


@pytest.mark.parametrize("who", STRANGERS)
def test_the_jobs_api_denies_strangers_everything(head, who, tmp_path):
    job = {"entrypoint": f"touch {tmp_path}/ran"}
    asked = [
        ("POST", f"{head.dashboard}/api/jobs/", job),
        ("GET", f"{head.dashboard}/api/jobs/", None),
        ("GET", f"{head.dashboard}/nodes?view=summary", None),
        ("GET", f"{head.dashboard}/api/cluster_status", None),
        ("GET", f"{head.dashboard}/api/v0/actors", None),
        ("GET", f"{head.dashboard}/api/serve/applications/", None),
        ("PUT", f"{head.dashboard}/api/serve/applications/", {"applications": []}),
        ("POST", f"{head.agent}/api/job_agent/jobs/", job),
    ]
    for method, url, body in asked:
        answer = httpx.request(method, url, json=body, headers=STRANGERS[who], timeout=60)
        assert answer.status_code in DENIED, (method, url, answer.status_code, answer.text[:200])
        if who == "nobody":
            assert answer.status_code == 401
    assert httpx.get(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}).json() == []
    assert not (tmp_path / "ran").exists()


def test_a_job_is_run_for_those_with_the_token_only(head, tmp_path):
    def submit(**credentials):
        arguments = ["-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard]
        ran = f"{tmp_path}/ran"
        known = environment(HOME=str(tmp_path), **credentials)
        return subprocess.run(
            [sys.executable, *arguments, "--", "touch", ran],
            env=known,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    for credentials in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = submit(**credentials)
        assert refused.returncode != 0
        assert not (tmp_path / "ran").exists()
    accepted = submit(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert (tmp_path / "ran").exists()
    assert TOKEN not in accepted.stdout + accepted.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["address", "client"])
def test_ray_itself_answers_those_with_the_token_only(head, way, tmp_path):
    def ask(**credentials):
        known = environment(HOME=str(tmp_path), **credentials)
        return subprocess.run(
            [sys.executable, "-c", ASK_RAY, getattr(head, way)],
            env=known,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    strangers = [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]
    for credentials in strangers[: 1 if way == "client" else None]:  # Ray Client retries for half a minute
        refused = ask(**credentials)
        assert refused.returncode != 0
        assert "CPUs:" not in refused.stdout
    accepted = ask(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert accepted.stdout.strip().endswith("CPUs: 1.0"), accepted.stderr
