"""A job that starts a local Ray is reachable from this machine only, and writes no secret where others can read it.

Each job runs once, as a user types it, with secrets in its environment, while its processes are watched.
"""

import contextlib
import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from jobs.serve import read_token
from rlhf_critic.scoring.http_client import connect_http
from tests.actors.scorers import make_conversations, rewards_by_engine
from tests.helpers import run_command, wait_until

REPOSITORY = Path(__file__).parents[2]
# Where Ray, W&B, hubs and clouds look for theirs.
NAMES = ("RAY_AUTH_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")
TIMEOUT_S = 480  # against hangs; a pool takes minutes to start on a busy machine
WATCH_EVERY_S = 1.0  # listing all processes costs the job more than a tenth of this
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Observed:
    """Observations of a job.

    Attributes:
        secrets: By the name of what holds them.
        directory: What the job wrote, Ray's logs among it.
        listening: Titles of processes and the addresses at which they listened, at any time.
        command_lines: Of all processes, at any time; anybody on the machine can read those.
        texts: What else the job told: its output, its metrics, what it answered.
    """

    secrets: dict[str, str]
    directory: Path
    listening: set[tuple[str, str]] = field(default_factory=set)
    command_lines: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)

    def look(self, process: psutil.Process) -> None:
        """Records a process and its descendants."""
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                command = one.cmdline()
                self.command_lines.add(" ".join(command))
                title = Path(command[0].split(" ")[0]).name if command else ""
                listening = [at for at in one.net_connections("inet") if at.status == psutil.CONN_LISTEN]
                self.listening |= {(title, at.laddr.ip) for at in listening}

    def require_listened(self, *titles: str) -> None:
        """Checks that listeners of these processes were seen, so that the absence of others is evidence."""
        for title in titles:
            assert any(seen.startswith(title) for seen, _ in self.listening), (title, self.listening)

    def texts_and_files(self) -> Iterator[tuple[str, bytes]]:
        """Returns all output and all written files."""
        yield from ((name, text.encode()) for name, text in self.texts.items())
        yield from (("a command line", line.encode()) for line in self.command_lines)
        for path in self.directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[Callable[..., contextlib.AbstractContextManager]]:
    """Runs a job with secrets and watches it; yields the observations and the process."""
    made: list[Path] = []

    @contextlib.contextmanager
    def watch(job: str, *options: str, **environment: str) -> Iterator[tuple[Observed, psutil.Popen]]:
        directory = Path(tempfile.mkdtemp(prefix="sec-"))  # short, because it contains Ray's sockets
        made.append(directory)
        observed = Observed({name: secrets.token_hex(32) for name in NAMES}, directory)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own_ray = {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(directory), "RAY_USAGE_STATS_ENABLED": "0"}
        process = psutil.Popen(
            [sys.executable, "-m", job, *options],
            cwd=REPOSITORY,
            env=inherited | own_ray | {"RAY_AUTH_MODE": "token"} | observed.secrets | environment,
            stdout=(directory / "stdout").open("w"),
            stderr=(directory / "stderr").open("w"),
        )
        ended = threading.Event()

        def watch_on() -> None:
            while not ended.wait(WATCH_EVERY_S):
                with contextlib.suppress(psutil.NoSuchProcess):
                    observed.look(process)

        watching = threading.Thread(target=watch_on)
        watching.start()
        everything = []
        try:
            yield observed, process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                everything = [process, *process.children(recursive=True)]
                process.send_signal(signal.SIGINT)
            _, alive = psutil.wait_procs(everything, timeout=60)
            for one in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            ended.set()
            watching.join()

    yield watch
    for directory in made:
        shutil.rmtree(directory, ignore_errors=True)


def output_of(observed: Observed) -> str:
    return (observed.directory / "stdout").read_text() + (observed.directory / "stderr").read_text()


def wait_for_success(observed: Observed, process: psutil.Popen) -> None:
    assert process.wait(TIMEOUT_S) == 0, output_of(observed)[-4000:]


@pytest.fixture(scope="module")
def training(watched, tiny_model, preference_file, tmp_path_factory):
    """Trains a few steps with two shards."""
    with watched(
        "jobs.train",
        *("--model.path", tiny_model, "--encoding.max-length", "64", "--data.train", preference_file),
        *("--data.cache-dir", str(tmp_path_factory.mktemp("cache")), "--train.max-steps", "4"),
        *("--train.global-batch-size", "4", "--train.token-budget", "300", "--run.num-workers", "2"),
        *("--run.storage-path", str(storage := tmp_path_factory.mktemp("runs"))),
    ) as (observed, process):
        wait_for_success(observed, process)
    shutil.copytree(storage, observed.directory / "runs")
    observed.require_listened("gcs_server", "raylet", "ray::RayTrainWorker")
    return observed


@pytest.fixture(scope="module")
def ppo(watched, tiny_model, critics, tmp_path_factory):
    """Runs one PPO iteration with scorers, two shards of the critic and a rollout worker."""
    directory = tmp_path_factory.mktemp("ppo")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"please {number}"}) + "\n" for number in range(8)))
    few = "0.2"
    with watched(
        "jobs.ppo",
        *("--policy.model.path", tiny_model, "--policy.chat-template", "plain", "--policy.cpus-per-shard", few),
        *("--critic.shards", "2", "--critic.cpus-per-shard", few, "--prompts.train", str(prompts)),
        *("--rollout.workers", "1", "--rollout.cpus-per-worker", few, "--rollout.prompts-per-iteration", "4"),
        *("--rollout.samples-per-prompt", "2", "--rollout.max-new-tokens", "4", "--prompts.max-tokens", "16"),
        *("--reward.checkpoint", critics["first"], "--reward.cpus-per-replica", few, "--ppo.iterations", "1"),
        *("--ppo.minibatches", "1", "--run.storage-path", str(directory / "runs")),
    ) as (observed, process):
        wait_for_success(observed, process)
    shutil.copytree(directory / "runs", observed.directory / "runs")
    observed.require_listened("gcs_server", "raylet", "ray::CriticRank", "ray::ProxyActor")
    return observed


@pytest.fixture(scope="module")
def serving_alone(watched, critics, tmp_path_factory):
    """Runs a pool with a token: valid and invalid calls, valid and invalid publications, and a lost replica."""
    directory = tmp_path_factory.mktemp("serve")
    token_file = directory / "token"
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [critics["first"], "--port", str(port), "--auth", "on", "--token-file", str(token_file)]
    with watched("jobs.serve", *options) as (observed, process):
        wait_until(lambda: "try: curl" in output_of(observed) or process.poll() is not None, "the pool", TIMEOUT_S)
        assert process.poll() is None, output_of(observed)
        token = observed.secrets["the pool's token"] = read_token(str(token_file))
        items = make_conversations(4)
        first, second = (rewards_by_engine(critics[name], items) for name in ("first", "second"))
        with connect_http(f"http://127.0.0.1:{port}", token, deadline_s=120) as client:
            rewards = client.score_items(items).rewards_S
            assert rewards == pytest.approx(first, abs=1e-5)
            for headers in ({}, {"Authorization": f"Bearer {token[:-1]}"}, {"Authorization": f"Basic {token}"}):
                refused = httpx.post(f"http://127.0.0.1:{port}/score", json={}, headers=headers, timeout=60)
                assert refused.status_code == 401
                observed.texts[f"an answer to {len(headers)} headers"] = refused.text
            (gcs,) = {word for line in observed.command_lines for word in line.split() if "--gcs-address=" in word}
            known = {"RAY_ADDRESS": gcs.removeprefix("--gcs-address="), "RAY_AUTH_MODE": "token"}
            known |= {name: observed.secrets[name] for name in NAMES}
            for checkpoint, code in ((critics["second"], 0), (str(directory), 2)):
                published = run_command(["-m", "jobs.serve", checkpoint, "--publish"], REPOSITORY, known)
                assert published.returncode == code, published.stderr
                observed.texts[f"publishing {checkpoint}"] = published.stdout + published.stderr
            rewards = client.score_items(items).rewards_S
            assert rewards == pytest.approx(second, abs=1e-5)
            (replica,) = (
                one for one in process.children(recursive=True) if "ServeReplica:scorers:Scorer" in title_of(one)
            )
            replica.kill()
            rewards = client.score_items(items).rewards_S
            assert rewards == pytest.approx(second, abs=1e-5)
        observed.texts |= metrics_of(observed.directory)
        time.sleep(2 * WATCH_EVERY_S)
    observed.require_listened("gcs_server", "raylet", "ray::ServeReplica", "ray::ProxyActor")
    return observed


def title_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def metrics_of(directory: Path) -> dict[str, str]:
    """Returns the metrics that Prometheus reads from a Ray, by address."""
    (told,) = directory.glob("ray/session_2*/prom_metrics_service_discovery.json")
    wait_until(lambda: json.loads(told.read_text()) != [], "the places of the metrics")
    places = [place for group in json.loads(told.read_text()) for place in group["targets"]]
    read = {}
    for place in places:
        with contextlib.suppress(httpx.HTTPError):  # some endpoints of Ray exist only with an autoscaler
            read[place] = httpx.get(f"http://{place}/metrics", timeout=60).text
    assert any("ray_serve" in text for text in read.values())
    return read


def is_loopback(ip: str) -> bool:
    """Returns whether an address is loopback; IPv4 addresses may be written as IPv6."""
    return ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback


JOBS = ("training", "serving_alone", "ppo")


@pytest.mark.parametrize("job", JOBS)
def test_a_job_alone_listens_on_loopback_only(job, request):
    observed = request.getfixturevalue(job)
    outside = {(title, ip) for title, ip in observed.listening if not is_loopback(ip)}
    assert not outside


@pytest.mark.parametrize("job", JOBS)
def test_no_secret_is_told_logged_or_written(job, request):
    observed = request.getfixturevalue(job)
    read = 0
    for place, content in observed.texts_and_files():
        read += len(content)
        found = [name for name, secret in observed.secrets.items() if secret.encode() in content]
        assert not found, f"{place} holds {found}"
    assert read > 100_000, "Ray's logs are not where this looks"
