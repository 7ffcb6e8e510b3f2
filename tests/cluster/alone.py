"""Runs a scenario with a separate Ray in separate namespaces, isolated from all other processes, ports and Rays.

A scenario is a module with ``observe(directory) -> dict``. It acts like a user and returns its observations, which
tests check. So slow operations happen once for many tests. When its process ends, everything that it started ends too.
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
# Namespaces of processes (the first is the shell, which reaps orphans), network, name and mounts; works without root.
UNSHARE = "unshare --map-root-user --pid --fork --kill-child --net --uts --mount --mount-proc".split()
# The loopback of a new network is down, and Ray resolves its host name. Ray records its address at a fixed place.
PREPARE = """
ip link set lo up && hostname localhost && mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray || exit 1
"$@"
exit $?
"""
SHOWN_CHARACTERS = 8000


def observe_alone(scenario: str, directory: Path, timeout_s: float) -> dict[str, Any]:
    """Runs a scenario; skips the test if the system provides no namespaces.

    Args:
        scenario: Name of the module, such as ``tests.cluster.scenarios.autoscaling``.
        directory: Empty directory for the files of the scenario and of Ray.
        timeout_s: Timeout after which the scenario is ended and the test fails.

    Returns:
        Observations of the scenario.
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
    os._exit(0)  # the end of the first process ends all others, so an orderly shutdown of Ray is unnecessary
