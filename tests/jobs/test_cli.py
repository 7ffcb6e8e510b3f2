"""An error of any kind is one message and an exit code; its traceback is shown on request."""

import errno
import re

import pytest

from jobs import export
from jobs.cli import run_job
from rlhf_critic.errors import DataError
from tests.helpers import run_command


def fail(error: Exception):
    def main() -> None:
        raise error

    return main


def test_our_errors_exit_with_2_and_one_message(capsys):
    with pytest.raises(SystemExit) as exited:
        run_job(fail(DataError("prefs.jsonl:3: field 'chosen': Field required")))
    assert exited.value.code == 2
    assert capsys.readouterr().err == "error: prefs.jsonl:3: field 'chosen': Field required\n"


def test_a_fault_exits_with_1_one_message_and_a_word_on_its_traceback(capsys):
    with pytest.raises(SystemExit) as exited:
        run_job(fail(TimeoutError("waited 3 s for workers")))
    assert exited.value.code == 1
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"failed: TimeoutError at \S*test_cli.py:\d+: waited 3 s for workers", first)
    assert second == "--debug shows the traceback"


def test_settings_of_the_user_exit_with_2(capsys):
    for error, message in (
        (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), "'metrics.jsonl'; checkpoints written"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/mnt/x"),
            "/mnt/x: Permission denied; check that the path",
        ),
    ):
        with pytest.raises(SystemExit) as exited:
            run_job(fail(error))
        assert exited.value.code == 2
        assert message in capsys.readouterr().err


def test_an_ascii_terminal_shows_a_text_with_replacements():
    """The console of a minimal container, or a pipe on Windows, has no character for most texts."""
    script = "from jobs.cli import run_job; run_job(lambda: print('\\N{SNOWMAN} snow \\ud83d'))"
    for encoding in ("ascii", "latin-1"):
        done = run_command(["-c", script], cwd=".", env={"PYTHONIOENCODING": encoding})
        assert (done.returncode, done.stdout) == (0, "? snow ?\n"), done.stderr


def test_a_command_refuses_what_is_no_critic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exited:
        run_job(export.main)
    assert exited.value.code == 2
    assert "no weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
