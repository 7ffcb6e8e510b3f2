"""An error of this project is one message and an exit code; a bug keeps its traceback."""

import errno

import pytest

from jobs import export
from jobs.cli import run_job
from rlhf_critic.errors import DataError


def fail(error: Exception):
    def main() -> None:
        raise error

    return main


def test_our_errors_exit_with_2_and_one_message(capsys):
    with pytest.raises(SystemExit) as exited:
        run_job(fail(DataError("prefs.jsonl:3: field 'chosen': Field required")))
    assert exited.value.code == 2
    assert capsys.readouterr().err == "error: prefs.jsonl:3: field 'chosen': Field required\n"


def test_expected_failures_exit_with_1_and_bugs_are_not_hidden(capsys):
    with pytest.raises(SystemExit) as exited:
        run_job(fail(TimeoutError("waited 3 s for workers")), TimeoutError)
    assert exited.value.code == 1
    assert "waited 3 s for workers" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run_job(fail(ZeroDivisionError()))


def test_a_full_disk_is_no_bug_and_another_error_of_the_system_may_be(capsys):
    with pytest.raises(SystemExit) as exited:
        run_job(fail(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")))
    assert exited.value.code == 1
    assert "No space left on device: 'metrics.jsonl'. Free some space" in capsys.readouterr().err
    with pytest.raises(PermissionError):
        run_job(fail(PermissionError(errno.EACCES, "Permission denied")))


def test_a_command_refuses_what_is_no_critic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exited:
        run_job(export.main)
    assert exited.value.code == 2
    assert "no weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
