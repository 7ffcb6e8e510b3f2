"""The history of a run is complete when it is saved, and a failed write is reported then and only then."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.runtime.run_logger import RunLogger, validate_wandb
from actors.runtime.storage import HistoryDirectory, resolve_run
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.training.metrics_log import read_metrics
from tests.actors.groups import remote_file_system

FULL = Path("/dev/full")


def run_logger(directory: HistoryDirectory, step: int = 0, wandb_project: str | None = None) -> RunLogger:
    return RunLogger(directory, step, "run", wandb_project, {"train": {"seed": 3}})


@pytest.fixture
def history(tmp_path) -> RunLogger:
    return run_logger(HistoryDirectory(*resolve_run(str(tmp_path), "run")))


def test_the_history_is_there_when_it_is_saved(history, tmp_path):
    with history:
        for number in (1, 2):
            history.write("train", number, {"loss": 0.5})
        history.save()
        records = read_metrics(tmp_path / "run" / "history")
    assert [record["step"] for record in records] == [1, 2]
    assert list((tmp_path / "run" / "history" / "tensorboard").iterdir())


def test_a_remote_history_is_stored_at_each_save_and_continued_from_the_step_that_is_resumed(tmp_path):
    stored = tmp_path / "bucket" / "run" / "history"
    for resumed_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with run_logger(HistoryDirectory(remote_file_system(tmp_path), "bucket/run"), resumed_step) as history:
            for step in steps:
                history.write("train", step, {"loss": step / 2})
            history.save()
            assert read_metrics(stored)[-1]["step"] == steps[-1]
    assert [record["step"] for record in read_metrics(stored)] == [1, 2, 3, 4]
    assert list((stored / "tensorboard").iterdir())


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_disturbs_no_step_and_fails_the_next_save(history):
    history._log._file.close()
    history._log._file = FULL.open("w")
    with pytest.raises(CheckpointError, match=r"No space left.*continue with --resume"), history:
        for number in (1, 2):
            history.write("train", number, {"loss": 0.5})
        history.save()


def test_wandb_gets_the_numbers_of_the_run_of_this_name(tmp_path, monkeypatch):
    """The package is not among the test dependencies; this stands in for the four calls that are used."""
    started, logged, finished = [], [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: finished.append(True))
    fake = SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with run_logger(HistoryDirectory(*resolve_run(str(tmp_path), "run")), wandb_project="critics") as history:
        history.write("validation", 5, {"accuracy": 0.75})
    assert started == [
        {"project": "critics", "name": "run", "id": "run", "resume": "allow", "config": {"train": {"seed": 3}}}
    ]
    assert logged == [(5, {"validation/accuracy": 0.75})]
    assert finished == [True]


def test_without_a_key_one_message_names_the_option_before_anything_is_written(monkeypatch):
    """W&B would ask at a terminal, or fail in a worker, which is retried."""
    asked = []

    def login(*, prompt=True, verify=None):
        asked.append((prompt, verify))
        return False

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login, __spec__=ModuleSpec("wandb", None)))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match=r"run\.wandb_project: .*no API key.*WANDB_API_KEY.*WANDB_MODE=offline"):
        validate_wandb("critics")
    assert asked == [(False, False)], "neither a question nor a request"
    validate_wandb(None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    validate_wandb("critics")
    assert len(asked) == 1


def test_a_start_that_wandb_refuses_is_one_message(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(ConfigError, match=r"did not start: api_key not configured.*leave the option out"):
        run_logger(HistoryDirectory(*resolve_run(str(tmp_path), "run")), wandb_project="critics")
