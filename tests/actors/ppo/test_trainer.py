"""A PPO job loses no complete iteration, whatever fails, and waits for scorers that will come back.

These tests replace the work of an iteration; tests/jobs/test_ppo.py runs whole jobs.
"""

import json
import threading
import time

import pytest

from actors.ppo import rollout_workers
from actors.ppo.checkpoint import CHECKPOINT_PATTERN
from actors.ppo.concurrency import run_concurrently
from actors.ppo.rollout_workers import score_patiently
from actors.ppo.trainer import PPOTrainer
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    RankLost,
    RolloutsUnavailable,
    ScorerFailed,
    ScorerUnavailable,
)
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Conversation
from tests.rlhf_critic.scoring.test_client import Lengths


class Critic:
    """The part of a critic group that a failing job uses."""

    def onload(self):
        pass


class Scripted(PPOTrainer):
    """A trainer whose iterations, evaluations and checkpoints are entries in a list, and fail where they are told to.

    Attributes:
        done: What was done, such as ``iterate 1``.
        failures: Errors by the entry that raises them, and whether they come during the updates of the models.
    """

    def __init__(self, directory, failures=(), iterations=4, **run):
        self.config = PPOJobConfig.model_validate(
            {"ppo": {"iterations": iterations}, "run": {"storage_path": str(directory), "name": "run", **run}}
        )
        self.directory = directory / "run"
        self.failures = dict(failures)
        self.done = []
        self._critic = Critic()
        self._held_out = "prompts"
        self._is_whole = True
        saved = sorted(self.directory.glob("iteration-*"))
        self._iteration = int(saved[-1].name.removeprefix("iteration-")) if saved else 0

    def _do(self, what):
        if error := self.failures.get(what):
            raise error
        self.done.append(what)

    def _iterate(self):
        number = self._iteration + 1
        self._do(f"roll out {number}")
        self._is_whole = False
        self._do(f"update {number}")
        self._is_whole = True
        self._iteration = number
        return {"reward": 0.0, "kl": 0.0}

    def _evaluate(self, history):
        self._do(f"evaluate {self._iteration}")
        history.write("validation", self._iteration, {"reward": 1.0})

    def _checkpoint(self):
        self._is_whole = False
        self._do(f"save {self._iteration}")
        (self.directory / CHECKPOINT_PATTERN.format(self._iteration)).mkdir()
        self._is_whole = True


def iterations(first, last):
    return [f"{what} {number}" for number in range(first, last + 1) for what in ("roll out", "update")]


def kinds_of_history(directory):
    lines = (directory / "run" / "history" / "metrics.jsonl").read_text().splitlines()
    return [(row["kind"], row["step"]) for row in map(json.loads, lines)]


def test_an_evaluation_that_fails_at_the_end_costs_nothing_and_is_made_up_for(tmp_path):
    failing = Scripted(tmp_path, {"evaluate 4": RolloutsUnavailable("no nodes")}, checkpoint_every=0)
    with pytest.raises(RolloutsUnavailable):
        failing.run()
    assert failing.done == ["evaluate 0", *iterations(1, 4), "save 4"]
    again = Scripted(tmp_path, checkpoint_every=0)
    again.run()
    assert again.done == ["evaluate 4"]
    assert kinds_of_history(tmp_path) == [("validation", 0), *[("train", n) for n in (1, 2, 3, 4)], ("validation", 4)]
    for total in (4, 3):  # a run may be told to end earlier
        whole = Scripted(tmp_path, iterations=total, checkpoint_every=0)
        whole.run()
        assert whole.done == [], "it was evaluated"


def test_an_evaluation_that_cannot_be_recorded_is_an_error_of_the_job(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    running = Scripted(tmp_path, checkpoint_every=0)
    evaluate = running._evaluate

    def evaluate_on_a_full_disk(history):
        if running._iteration == 4:
            monkeypatch.setattr(history._log, "write", full)
        evaluate(history)

    running._evaluate = evaluate_on_a_full_disk
    with pytest.raises(CheckpointError, match="the history of the run could not be written"):
        running.run()
    assert running.done[-2:] == ["save 4", "evaluate 4"]
    assert (running.directory / "iteration-000004").exists()


@pytest.mark.parametrize(
    "error", [ScorerUnavailable("away"), ScorerFailed("broken"), ConfigError("wrong"), OSError("disk"), KeyError("bug")]
)
@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_an_error_between_updates_saves_the_last_whole_iteration(tmp_path, error, checkpoint_every):
    failing = Scripted(tmp_path, {"roll out 4": error}, checkpoint_every=checkpoint_every)
    with pytest.raises(type(error)):
        failing.run()
    saves = ["save 2"] if checkpoint_every else []
    assert [one for one in failing.done if "save" in one] == [*saves, "save 3"]
    again = Scripted(tmp_path, checkpoint_every=checkpoint_every)
    again.run()
    assert [one for one in again.done if "save" not in one] == [*iterations(4, 4), "evaluate 4"]


@pytest.mark.parametrize(
    "failures",
    [
        {"update 3": ValueError("in the middle of a step")},
        {"roll out 3": RankLost("gone")},
        {"roll out 3": DivergedError("NaN")},
        {"roll out 1": ScorerFailed("before the first")},
        {"roll out 3": ScorerFailed("first"), "save 2": CheckpointError("no room")},
    ],
)
def test_what_is_not_whole_or_cannot_be_saved_is_not_saved_and_the_first_error_is_told(tmp_path, failures):
    failing = Scripted(tmp_path, failures, checkpoint_every=0)
    with pytest.raises(type(next(iter(failures.values())))):
        failing.run()
    assert not list(failing.directory.glob("iteration-*"))


def test_a_checkpoint_that_cannot_be_written_is_not_tried_twice(tmp_path):
    failing = Scripted(tmp_path, {"save 2": CheckpointError("no room")}, checkpoint_every=2)
    with pytest.raises(CheckpointError):
        failing.run()
    assert failing.done == ["evaluate 0", *iterations(1, 2)]


def test_a_failure_is_told_while_others_are_at_work_and_can_end_them():
    ended = threading.Event()

    def works():
        if not ended.wait(60):
            raise AssertionError("nobody ended it")
        raise RankLost("ended")

    def fails():
        raise RankLost("lost")

    started = time.monotonic()
    told = []
    for actions in ((fails, works), (works, fails)):
        ended.clear()
        with pytest.raises(RankLost, match="lost"):
            run_concurrently(*actions, on_failure=lambda error: (told.append(str(error)), ended.set()))
    assert time.monotonic() - started < 20
    assert told == ["lost", "lost"]
    assert run_concurrently(lambda: 1, lambda: 2) == (1, 2)


def test_scorers_that_are_away_are_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(rollout_workers, "ASK_AGAIN_S", 0.05)
    items = [Conversation("p", "abc")]

    class Away(Lengths):
        """A pool that answers some time after its first call."""

        def __init__(self, seconds):
            super().__init__()
            self.back_at = time.monotonic() + seconds

        async def ask(self, *arguments):
            if time.monotonic() < self.back_at:
                raise ScorerUnavailable("nobody is there")
            return await super().ask(*arguments)

    with ScorerClient(Away(1.0), deadline_s=0.1) as client:
        assert score_patiently(client, items, 60).rewards_S.tolist() == [3.0]
    assert "waiting for scorers" in caplog.text
    assert "nobody is there" in caplog.text
    with ScorerClient(Away(60), deadline_s=0.1) as client:
        started = time.monotonic()
        with pytest.raises(ScorerUnavailable, match="nobody is there"):
            score_patiently(client, items, 0.5)
        assert 0.5 < time.monotonic() - started < 20
        with pytest.raises(ScorerUnavailable):
            score_patiently(client, items, 0)
    broken = Lengths([ScorerFailed("broken")])
    with ScorerClient(broken) as client, pytest.raises(ScorerFailed):
        score_patiently(client, items, 60)
    assert len(broken.calls) == 1, "only scorers that are away are waited for"
