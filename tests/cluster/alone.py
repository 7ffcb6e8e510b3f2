"""Runs a scenario with a Ray of its own, in namespaces of its own: it sees no other process, port or Ray, nor they it.

A scenario is a module with ``observe(directory) -> dict``: it does what users do, and tells what it saw; tests judge
it. So slow things happen once, for many tests. With its process all it started ends, however it ends.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
RESULT_NAME = "observed.json"
# Of processes (the first is the shell, which buries orphans), network, name and mounts; for ordinary users, too.
UNSHARE = "unshare --map-root-user --pid --fork --kill-child --net --uts --mount --mount-proc".split()
# A new network's loopback is down, and Ray looks its host's name up. Where it is, it tells at a fixed place.
PREPARE = """
ip link set lo up && hostname localhost && mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray || exit 1
"$@"
exit $?
"""
SHOWN_CHARACTERS = 8000


def observe_alone(scenario: str, directory: Path, timeout_s: float) -> dict[str, Any]:
    """Runs a scenario; skips the test where the system gives no namespaces.

    Args:
        scenario: The module's name, such as ``tests.cluster.scenarios.autoscaling``.
        directory: An empty one, for its files and Ray's.
        timeout_s: After which it is ended, and the test fails.

    Returns:
        What it saw.
    """
    of_ray = directory / "ray"
    of_ray.mkdir()
    _require_namespaces(of_ray)
    log = directory / "log.txt"
    command = [sys.executable, "-m", __name__, scenario, str(directory)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_raylet_start_wait_time_s": "120",  # on a machine that has other things to do
        "OMP_NUM_THREADS": "1",  # many processes share few cores
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("w") as output:
        try:
            code: int | str = subprocess.run(
                [*UNSHARE, "sh", "-c", PREPARE, str(of_ray), *command],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"no end within {timeout_s:g} s"
    if code != 0:
        pytest.fail(f"{scenario} ended with {code}:\n{log.read_text(errors='replace')[-SHOWN_CHARACTERS:]}")
    seen: dict[str, Any] = json.loads((directory / RESULT_NAME).read_text())
    return seen


def _require_namespaces(of_ray: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs Linux namespaces: there is no unshare command here")
    tried = subprocess.run(
        [*UNSHARE, "sh", "-c", PREPARE, str(of_ray), "true"], capture_output=True, text=True, timeout=60, check=False
    )
    if tried.returncode != 0:
        pytest.skip(f"needs Linux namespaces, which are refused here: {tried.stderr.strip()}")


if __name__ == "__main__":
    name, where = sys.argv[1], Path(sys.argv[2])
    observed = importlib.import_module(name).observe(where)
    (where / RESULT_NAME).write_text(json.dumps(observed, indent=2))
    sys.stdout.flush()
    os._exit(0)  # the end of the first process ends all others; taking Ray apart in order would be for nothing
