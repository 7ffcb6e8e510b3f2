"""Faults of a soak, and a watch over what the replicas of its pool serve.

- Every few seconds, a process is killed.
- A publisher is killed as soon as its critic is published, and the critic's files are away for some seconds, as on a
  file system that fails once. No other process publishes meanwhile, so the replicas must heal alone.
- A component of the reward hangs.
- The gateway is killed while a body arrives.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from actors.serving import control
from actors.serving.replica_status import read_status
from rlhf_critic.errors import ComponentError
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Conversation
from tests.helpers import wait_until
from tests.jobs.ppo_rules import HANG
from tests.soak.growth import pids_of
from tests.soak.load import Trainer
from tests.soak.world import REPOSITORY, Tally, World

APP = "scorers"
FAULT_EVERY_S = 20.0
FILES_AWAY_S = 3.0
MAX_MIXED_S = 60.0
ANSWER_TIMEOUT_S = 120.0
BODY_ITEMS = 400


def running_reports() -> list[Any]:
    """Returns the last reports of the running replicas."""
    _, _, running, _ = control._state(APP)
    return [report for report in read_status(APP) if report.replica in running]


class Chaos:
    """Thread that makes one fault after the other.

    Args:
        world: The soak's world.
        tally: Counts and problems.
        client: Client of the pool.
        publishing: Held by whoever publishes.
    """

    def __init__(
        self,
        world: World,
        tally: Tally,
        client: ScorerClient,
        publishing: threading.Lock,
    ) -> None:
        self._world, self._tally, self._client = world, tally, client
        self._publishing = publishing
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._fail_on, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Waits for the last fault and its healing."""
        self._ended.set()
        self._thread.join(2 * ANSWER_TIMEOUT_S)

    def _fail_on(self) -> None:
        faults = (self._lose_publisher_and_files, self._hang_component, self._kill_gateway_during_body)
        number = 0
        while not self._ended.wait(FAULT_EVERY_S):
            fault = faults[number % len(faults)]
            number += 1
            try:
                fault()
            except Exception as error:
                self._tally.problem("faults that failed", f"{fault.__name__}: {type(error).__name__}: {error}")

    def _lose_publisher_and_files(self) -> None:
        with self._publishing:
            served = {report.info.model_version.split("#")[0] for report in running_reports()}
            critic = Path(next(path for version, path in self._world.critics.items() if version not in served))
            away = critic.with_name(f"{critic.name}-away")
            before = control._published(APP)
            publisher = subprocess.Popen(
                [sys.executable, "-m", "jobs.serve", str(critic), "--publish"],
                cwd=REPOSITORY,
                env={**os.environ, "RAY_ADDRESS": self._world.ray_address},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                wait_until(lambda: control._published(APP) != before, "a publication", ANSWER_TIMEOUT_S)
                critic.rename(away)
                publisher.send_signal(signal.SIGKILL)
                time.sleep(FILES_AWAY_S)
            finally:
                publisher.kill()
                publisher.wait()
                if away.exists():
                    away.rename(critic)
            self._tally.kills["publisher, with its critic's files away"] += 1
            failed = sum(bool(report.error) for report in running_reports())
            self._tally.count("swaps that failed once", failed)
            started = time.monotonic()
            wait_until(self._is_current, "replicas that serve what was published", MAX_MIXED_S)
            self._tally.count("seconds to heal", round(time.monotonic() - started))

    def _is_current(self) -> bool:
        reports = running_reports()
        return bool(reports) and all(report.is_current for report in reports)

    def _hang_component(self) -> None:
        started = time.monotonic()
        try:
            self._client.score_items([Conversation("please", HANG)], deadline_s=ANSWER_TIMEOUT_S)
        except ComponentError:
            self._tally.count("hanging components reported")
        else:
            self._tally.problem("hanging components", "a call was answered")
        if (seconds := time.monotonic() - started) > MAX_MIXED_S:
            self._tally.problem("hanging components", f"reported after {seconds:.0f} s")

    def _kill_gateway_during_body(self) -> None:
        address = urlsplit(self._world.url)
        rows = [number % len(self._world.items) for number in range(BODY_ITEMS)]
        items = [self._world.items[row]._asdict() for row in rows]
        body = json.dumps({"items": items}).encode()
        head = (
            f"POST /score HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {self._world.token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        answer = b""
        with (
            suppress(ConnectionError),  # refused, as the proxy is killed as well, or closed: the caller tries again
            socket.create_connection((address.hostname, address.port), timeout=ANSWER_TIMEOUT_S) as connection,
        ):
            connection.sendall(head.encode() + body[: len(body) // 2])
            time.sleep(0.5)
            for pid in pids_of("ray::ServeReplica:scorers:Gateway"):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
            connection.sendall(body[len(body) // 2 :])
            while part := connection.recv(1 << 16):
                answer += part
        self._tally.kills["HTTP gateway, while a body arrived"] += 1
        status = answer.split(b" ", 2)[1:2]
        if status == [b"200"]:
            told = json.loads(answer.partition(b"\r\n\r\n")[2])
            wanted = self._world.rewards[told["model_version"].split("#")[0]][rows]
            if not np.allclose(told["rewards"], wanted, atol=1e-5):
                self._tally.problem("wrong answers", "to a body that arrived while the gateway was killed")
        elif status and not status[0].startswith(b"5"):
            self._tally.problem("wrong answers", f"HTTP status {status[0]!r} after the gateway was killed")


class Killer:
    """Kills processes; spares one replica, so that the growth of a long-lived one can be measured."""

    def __init__(self, tally: Tally, trainer: Trainer, seed: int) -> None:
        self._tally, self._trainer = tally, trainer
        self._rng = random.Random(seed)
        self._spared = min(pids_of("ray::ServeReplica:scorers:Scorer"), default=0)
        self._kinds: dict[str, Callable[[], list[int]]] = {
            "replica": lambda: [pid for pid in pids_of("ray::ServeReplica:scorers:Scorer") if pid != self._spared],
            "HTTP gateway": lambda: pids_of("ray::ServeReplica:scorers:Gateway"),
            "HTTP proxy": lambda: pids_of("ray::ProxyActor"),
            "pool board": lambda: pids_of("ray::ReplicaStatus"),
            "training worker": lambda: pids_of("ray::RayTrainWorker"),
            "training driver": self._driver,
        }

    def kill_one(self) -> None:
        """Kills one process, of a kind that exists at the moment."""
        kinds = list(self._kinds)
        self._rng.shuffle(kinds)
        for kind in kinds:
            victims = self._kinds[kind]()
            if victims:
                with suppress(ProcessLookupError):
                    os.kill(self._rng.choice(sorted(victims)), signal.SIGKILL)
                    self._tally.kills[kind] += 1
                return

    def _driver(self) -> list[int]:
        driver = self._trainer.driver
        return [driver.pid] if driver is not None and driver.poll() is None else []


class MixedWatch:
    """Thread that measures for how long running replicas serve several critics.

    Attributes:
        longest_s: The longest such time, in seconds.
    """

    def __init__(self, tally: Tally) -> None:
        self.longest_s = 0.0
        self._tally = tally
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch_on, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ends the watch."""
        self._ended.set()
        self._thread.join(ANSWER_TIMEOUT_S)

    def _watch_on(self) -> None:
        since: float | None = None
        while not self._ended.wait(1.0):
            with suppress(Exception):  # the status actor or Serve's controller restarts
                versions = {report.info.model_version for report in running_reports()}
                now = time.monotonic()
                since = None if len(versions) < 2 else since or now
                seconds = now - since if since else 0.0
                if seconds > MAX_MIXED_S >= self.longest_s:
                    self._tally.problem("pools mixed", f"replicas serve {sorted(versions)} for {seconds:.0f} s")
                self.longest_s = max(self.longest_s, seconds)
