"""Runs a job in this process as ``python -m`` would."""

import sys

from jobs.cli import run_job


def run(main, arguments, monkeypatch, capsys):
    """Runs a command and returns its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    capsys.readouterr()
    try:
        run_job(main)
    except SystemExit as ended:
        return ended.code, *capsys.readouterr()
    return 0, *capsys.readouterr()
