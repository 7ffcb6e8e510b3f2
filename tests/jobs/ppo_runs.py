"""What tests of PPO jobs share: options, histories, processes, and trainers in which something happens on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from actors.ppo.rollout_workers import RolloutWorkers
from actors.ppo.trainer import PPOOutcome, PPOTrainer
from actors.serving.handle import HandleTransport
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.errors import ScorerFailed
from tests.helpers import wait_until


def config_of(options: dict, name: str, resume: bool = False, **changes: dict) -> PPOJobConfig:
    """The options with changed sections."""
    sections = {section: {**values, **changes.get(section, {})} for section, values in options.items()}
    sections["run"]["name"] = name
    return PPOJobConfig.model_validate({**sections, "resume": resume}).resolved()


def of_length(iterations: int) -> dict:
    return {"iterations": iterations, "epochs": 3, "minibatches": 2, "kl_coefficient": 0.0, "max_kl": 1e6}


def directory_of(options: dict, name: str) -> Path:
    return Path(options["run"]["storage_path"]) / name


def history_of(run: Path, kind: str = "train") -> list[dict]:
    """Returns the records of a run's history, without times."""
    path = run / "history" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {name: value for name, value in record.items() if not name.startswith(("seconds", "tokens_per_second"))}
        for record in records
        if record["kind"] == kind
    ]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def actors_of(name: str) -> list[psutil.Process]:
    """Returns the processes of this session's Ray that run an actor of a class, the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "".join(process.cmdline()[:1]).startswith(f"ray::{name}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def assert_nothing_is_left_running() -> None:
    wait_until(
        lambda: not any(actors_of(name) for name in ("RolloutWorker", "CriticRank", "PolicyRank")),
        "actors to end",
        60,
    )


def assert_same_beginning(run: Path, undisturbed: PPOOutcome, iterations: int) -> None:
    """Checks that every step is there once, with the numbers of the undisturbed run."""
    history = history_of(run)
    assert [record["step"] for record in history] == list(range(1, iterations + 1))
    expected = history_of(undisturbed.directory)[:iterations]
    history += history_of(run, "validation")[:1]
    expected += history_of(undisturbed.directory, "validation")[:1]
    for record, other in zip(history, expected, strict=True):
        # What a scorer computes in one batch depends on who asked at the same time; its last digits do too.
        assert record.pop("reward_critic") == pytest.approx(other.pop("reward_critic"), abs=1e-5)
        assert record == other
    assert [record["step"] for record in history_of(run, "validation")] == [0, iterations]


class Interrupted:
    """Rollout workers with an event between their first and later tasks."""

    def __init__(self, workers: RolloutWorkers, happens: Callable[[], object]) -> None:
        self._workers, self._happens = workers, happens

    def run(self, tasks, weights, timeout_s, progress):
        first, _ = self._workers.run(tasks[:1], weights, timeout_s, progress)
        self._happens()
        others, timings = self._workers.run(tasks[1:], weights, timeout_s, progress)
        return [*first, *others], timings


class Observed(PPOTrainer):
    """Records the versions that scored, and publishes another reward model in the middle of its third iteration."""

    def __init__(self, publish: Callable[[], object], *arguments) -> None:
        super().__init__(*arguments)
        self._publish = publish
        self.versions: list[set[str]] = []

    def _roll_out(self, prompts, rows, seeds):
        workers = self._workers
        if len(self.versions) == 3:  # behind the first evaluation
            self._workers = Interrupted(workers, self._publish)
        rollouts, timings = super()._roll_out(prompts, rows, seeds)
        self._workers = workers
        self.versions.append({rollout.model_version.split("#")[0] for rollout in rollouts})
        return rollouts, timings


class Switchable(HandleTransport):
    """A connection to the pool that fails while a file exists."""

    def __init__(self, broken: Path) -> None:
        super().__init__("scorers")
        self._broken = broken

    def __reduce__(self):
        return Switchable, (self._broken,)

    async def ask(self, *arguments):
        if self._broken.exists():
            raise ScorerFailed("a component is broken")
        return await super().ask(*arguments)


class BreaksAt(PPOTrainer):
    """A run whose scorers are broken from some iteration on: in its rollouts, or in the evaluation behind it."""

    def __init__(self, broken: Path, iteration: int, of_evaluation: bool, *arguments) -> None:
        super().__init__(*arguments)
        self._at = broken, iteration, of_evaluation

    def _roll_out(self, prompts, rows, seeds):
        broken, iteration, of_evaluation = self._at
        if self._iteration == iteration and (prompts is self._held_out) == of_evaluation:
            broken.touch()
        return super()._roll_out(prompts, rows, seeds)
