"""What works all the time in a soak: callers, a publisher and training runs. Each checks its own results."""

from __future__ import annotations

import random
import signal
import subprocess
import threading

import numpy as np

from actors.serving import control
from actors.serving.handle import connect
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.http_client import connect_http
from rlhf_critic.scoring.items import Conversation
from tests.soak.world import DEADLINE_S, TRAIN_TIMEOUT_S, Tally, World

TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-6
ROWS_A_CALL = 8
PAUSE_S = 0.05  # a caller waits so long between its calls
PUBLISH_EVERY_S = 6.0


class Callers:
    """Threads that ask for random items until the end, and check each answer."""

    def __init__(self, world: World, tally: Tally, seed: int) -> None:
        self.clients = [
            connect(deadline_s=DEADLINE_S),
            connect(deadline_s=DEADLINE_S),
            connect_http(world.url, world.token, deadline_s=DEADLINE_S),
        ]
        self._world, self._tally = world, tally
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(client, random.Random(seed + number)), daemon=True)
            for number, client in enumerate(self.clients)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Waits for the last answers."""
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * DEADLINE_S)
        for client in self.clients:
            client.close()

    def _ask_on(self, client: ScorerClient, rng: random.Random) -> None:
        items, tally = self._world.items, self._tally
        while not self._ended.wait(PAUSE_S):
            rows = rng.sample(range(len(items)), ROWS_A_CALL)
            tally.count("requests sent")
            try:
                scores = client.score_items([items[row] for row in rows])
            except Exception as error:  # any failure loses the request
                tally.problem("requests lost", f"{type(error).__name__}: {error}")
                continue
            tally.count("requests answered")
            wanted = self._world.rewards.get(scores.model_version.split("#")[0], np.full(len(items), np.nan))[rows]
            difference = float(np.abs(scores.rewards_S - wanted).max())
            if not difference < TOLERANCE:
                tally.problem("wrong answers", f"{scores.model_version} is off by {difference}")


class Publisher:
    """Thread that publishes one critic after the other, and checks that the pool serves it."""

    def __init__(self, world: World, tally: Tally, client: ScorerClient) -> None:
        self._world, self._tally, self._client = world, tally, client
        self.publishing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._publish_on, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Waits for the last publication."""
        self._ended.set()
        self._thread.join(2 * DEADLINE_S)

    def _publish_on(self) -> None:
        versions = list(self._world.critics)
        probe: list[Conversation] = self._world.items[:1]
        number = 0
        while not self._ended.wait(PUBLISH_EVERY_S):
            number += 1
            version = versions[number % len(versions)]
            try:
                with self.publishing:
                    told = control.publish("scorers", self._world.critics[version], DEADLINE_S, lambda _: None)
                    served = self._client.score_items(probe).model_version
            except Exception as error:  # any failure counts
                self._tally.problem("publishes failed", f"{type(error).__name__}: {error}")
                continue
            self._tally.count("publishes done")
            if told != served or told.split("#")[0] != version:
                self._tally.problem("publishes not served", f"{version}: told {told}, served {served}")


class Trainer:
    """Thread that trains again and again, and resumes a run whose driver was killed."""

    def __init__(self, world: World, tally: Tally) -> None:
        self._world, self._tally = world, tally
        code, output = world.train("undisturbed")
        if code:
            raise RuntimeError(f"jobs.train failed before anything was killed:\n{output[-4000:]}")
        self._undisturbed = world.take_weights("undisturbed")
        self.driver: subprocess.Popen[str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._train_on, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Waits for the current training run."""
        self._ended.set()
        self._thread.join(2 * TRAIN_TIMEOUT_S)
        if self._thread.is_alive():
            self._tally.problem("runs failed", f"the last run did not end within {2 * TRAIN_TIMEOUT_S:g} s")

    def _train_on(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            name = f"run-{number}"
            while True:
                try:
                    code, output = self._world.train(name, self._set_driver)
                except subprocess.TimeoutExpired:
                    self._tally.problem("runs failed", f"{name} did not end within {TRAIN_TIMEOUT_S:g} s")
                    return
                if code != -signal.SIGKILL:
                    break
                self._tally.count("runs resumed")
            self.driver = None
            if code:
                self._tally.problem("runs failed", f"{name}: exit code {code}: {output[-2000:]}")
                continue
            weights = self._world.take_weights(name)
            difference = max(float((weights[key] - self._undisturbed[key]).abs().max()) for key in self._undisturbed)
            self._tally.count("runs finished")
            if weights.keys() != self._undisturbed.keys() or not difference < WEIGHT_TOLERANCE:
                self._tally.problem("runs with other weights", f"{name} is off by {difference}")

    def _set_driver(self, driver: subprocess.Popen[str]) -> None:
        self.driver = driver
