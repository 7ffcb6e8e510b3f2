"""One contract with a peer: runs its own code in its environment, compares numbers and keeps the result.

A runner in ``tests/peers/runners`` imports the peer. It reads a request as JSON and writes its answer as JSON. Results
go to ``tests/peers/results.json``, from which docs/compatibility.md is generated.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from rlhf_critic.scoring.items import Conversation
from tests.peers.install import PEERS

RUNNERS = Path(__file__).with_name("runners")
RESULTS = Path(__file__).with_name("results.json")
TOLERANCE = 1e-5
TIMEOUT_S = 1500  # on a busy machine; an import of torch alone takes a minute there


def turns_of(conversations: list[Conversation]) -> list[list[dict[str, str]]]:
    """Returns conversations as turns."""
    return [
        [{"role": "user", "content": str(one.prompt)}, {"role": "assistant", "content": one.response}]
        for one in conversations
    ]


class Contract:
    """Runs a peer and records what was compared.

    Args:
        name: Key of `tests.peers.install.PEERS`.
        python: Interpreter of the peer's environment.
        folder: Folder for requests and answers.
        differs: Reason why the numbers are expected to differ today, if they are.
    """

    def __init__(self, name: str, python: Path, folder: Path, differs: str | None) -> None:
        self.name, self.python, self._folder, self._differs = name, python, folder, differs

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a peer's process: none of this project's path, no network, one thread."""
        kept = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
        return {**kept, **quiet, "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(self, runner: str, request: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Runs a runner with a request; returns its answer."""
        asked, answered = self._folder / "request.json", self._folder / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        answered.unlink(missing_ok=True)
        command = [self.python, RUNNERS / f"{runner}.py", asked, answered]
        done = subprocess.run(
            command,
            check=False,
            env=self.environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode != 0:
            shown = (done.stdout[-1500:] + done.stderr[-4000:]).strip()
            raise AssertionError(f"{runner} of {self.name} ended with {done.returncode}:\n{shown}")
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return answer

    @contextmanager
    def serve(self, arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Runs a server of the peer until the block ends."""
        with log.open("wb") as output:
            server = subprocess.Popen(
                [self.python, *arguments], env=self.environment, cwd=self._folder, stdout=output, stderr=output
            )
            try:
                yield server
            finally:
                server.terminate()
                try:
                    server.wait(30)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()

    def compare(self, what: str, theirs: Any, ours: Any, tolerance: float = TOLERANCE) -> None:
        """Records the largest difference of two arrays under a name, and fails if it exceeds the tolerance."""
        theirs, ours = np.asarray(theirs, dtype=np.float64), np.asarray(ours, dtype=np.float64)
        assert theirs.shape == ours.shape, f"{what}: {theirs.shape} numbers of {self.name}, {ours.shape} of ours"
        assert ours.size and np.ptp(ours) > 0.01 if ours.size > 1 else True, f"{what}: numbers that show nothing"
        largest = float(np.abs(theirs - ours).max())
        self.record(what, largest, ours.size)
        assert largest <= tolerance, f"{what}: {self.name} differs by {largest:.3g}\n{theirs}\n{ours}"

    def record(self, what: str, largest: float | None, numbers: int) -> None:
        """Keeps a result; ``largest`` is None if there was nothing to compare because the peer refused."""
        result = {
            "version": self.version(),
            "date": datetime.date.today().isoformat(),
            "largest_difference": largest,
            "numbers": numbers,
            "expected_to_differ": self._differs,
        }
        with FileLock(f"{RESULTS}.lock"):
            results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
            results.setdefault(self.name, {})[what] = result
            RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def version(self) -> str:
        """Returns the version of the peer's package in its environment."""
        code = f"import importlib.metadata as m; print(m.version({PEERS[self.name].package!r}))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
