"""An error of any kind ends a job at the first attempt, with one message, an exit code, and its name free."""

import sys
from pathlib import Path

import pytest

from jobs import train as train_job
from jobs.run_lock import prepare_run
from tests.helpers import run_command, slow_except, write_preferences
from tests.jobs.command_line import run
from tests.jobs.faults import FAULTS, attempts_file, faulty_loop

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)
START = """
from jobs import train
from jobs.cli import run_job
from tests.jobs.faults import faulty_loop

train._train_loop = faulty_loop
run_job(train.main)
"""


@pytest.fixture
def arguments(tiny_model, tmp_path) -> list[str]:
    """A run of two steps that validates and saves."""
    data = write_preferences(tmp_path / "train.jsonl", 12)
    return [
        *("--model.path", tiny_model, "--data.train", data, "--data.validation-fraction", "0.2"),
        *("--data.cache-dir", str(tmp_path / "cache"), "--run.storage-path", str(tmp_path / "runs")),
        *("--encoding.max-length", "64", "--train.global-batch-size", "4", "--train.max-steps", "2"),
        *("--train.token-budget", "300", "--train.checkpoint-every", "1", "--train.validate-every", "1"),
    ]


def check(name: str, code: int, message: str, storage: Path) -> None:
    """Checks exit code, message, attempts, leftovers, and that the name is free."""
    fault = FAULTS[name]
    assert code == fault.exit_code, message
    ours = [line for line in message.splitlines() if line.startswith(("error: ", "failed: "))]
    assert len(ours) == 1, message
    assert fault.message in ours[0]
    assert "Traceback" not in message
    assert attempts_file(str(storage), name).read_text() == "attempt\n"
    prepare_run(str(storage), name, resume=False)
    assert not (storage / name).exists()


@pytest.mark.parametrize("name", slow_except([], FAULTS))
def test_an_error_of_a_worker_is_told_once(name, arguments, ray_address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_job, "_train_loop", faulty_loop)
    code, _, message = run(train_job.main, [*arguments, "--run.name", name], monkeypatch, capsys)
    check(name, code, message, tmp_path / "runs")


@pytest.mark.slow
def test_one_rank_of_two_fails_and_the_terminal_shows_one_message(arguments, tmp_path):
    """In a Ray of its own, whose log lines come to the terminal. The other rank waits in a collective."""
    options = [*arguments, "--run.name", "save", "--run.num-workers", "2"]
    finished = run_command(["-c", START, *options], cwd=REPOSITORY, env={"RAY_ADDRESS": "local"})
    check("save", finished.returncode, finished.stderr, tmp_path / "runs")
    assert len(finished.stderr.splitlines()) < 20, finished.stderr


def test_debug_shows_the_traceback(tmp_path, monkeypatch, capsys):
    def fail() -> None:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setenv("RLHF_CRITIC_LOG_LEVEL", "INFO")
    for options, lines in (([], 2), (["--debug"], 5)):
        code, _, message = run(fail, options, monkeypatch, capsys)
        assert code == 1
        first, *others = message.strip().splitlines()
        assert first.startswith("failed: ZeroDivisionError at ")
        assert first.endswith("in the middle")
        assert len(others) + 1 >= lines
        assert ("Traceback (most recent call last)" in message) == bool(options)
    assert "--debug" not in sys.argv
