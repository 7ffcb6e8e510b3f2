"""docs/tutorial.md as a reader types it: every command and file, on a tiny model and few words."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.docs.pages import FENCE, TOP
from tests.helpers import run_command, wait_until, write_preferences

TEXT = (TOP / "docs" / "tutorial.md").read_text(encoding="utf-8")
SAVED_AS = re.compile(r"saved\s+as `([\w.]+)`")
OF_THE_READER = {"make", "source"}  # these install; the tests run in what is installed
ENVIRONMENT = {"PYTHONPATH": str(TOP), "COLUMNS": "100", "PYTHONSAFEPATH": ""}


def steps() -> Iterator[tuple[str, str]]:
    """The files (name, text) and commands ("", line) of the page, in its order."""
    before = 0
    for found in FENCE.finditer(TEXT):
        _, language, content = found.groups()
        if language == "python":
            yield SAVED_AS.findall(TEXT[before : found.start()])[-1], content
        elif language == "bash":
            yield from (("", line) for line in content.replace("\\\n", " ").splitlines())
        before = found.start()


@contextmanager
def server(arguments: list[str], folder: Path, port: int) -> Iterator[None]:
    """Runs ``rlhf-critic serve`` until the block ends, and ends it as Ctrl-C does."""
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.main", *arguments, "--port", str(port)],
            cwd=folder,
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "serve.log").read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, "the pool answers", timeout=200)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_works_as_it_is_written(tiny_model, tmp_path):
    data = tmp_path / ".cache" / "quickstart"
    data.mkdir(parents=True)
    (data / "model").symlink_to(tiny_model)
    write_preferences(data / "train.jsonl", 800)
    write_preferences(data / "validation.jsonl", 200, seed=1)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    outputs: list[str] = []
    running = None
    try:
        for name, text in steps():
            here = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("--model.num-layers 4", "")
            if name:
                (tmp_path / name).write_text(here, encoding="utf-8")
                continue
            program, *arguments = shlex.split(here)
            if program in OF_THE_READER:
                continue
            if arguments[0] == "serve":
                running = server(arguments, tmp_path, port)
                running.__enter__()
            elif program == "curl":
                done = subprocess.run([program, "-sS", *arguments], capture_output=True, text=True, check=True)
                outputs.append(done.stdout)
            else:
                start = ["-m", "jobs.main"] if program == "rlhf-critic" else []
                done = run_command([*start, *arguments], tmp_path, ENVIRONMENT, timeout=400)
                assert done.returncode == 0, done.stdout + done.stderr
                outputs.append(done.stdout)
    finally:
        if running:
            running.__exit__(None, None, None)
    over_http, over_client = outputs[-2:]
    assert len(re.findall(r"-?\d+\.\d+", over_client)) == 2
    assert '"rewards"' in over_http
    assert (tmp_path / "report" / "report.html").exists()
