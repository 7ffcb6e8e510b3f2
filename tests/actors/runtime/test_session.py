"""A job joins the Ray that was meant, and never one that has ended."""

from __future__ import annotations

import socket

import pytest
from ray._private import utils

from actors.runtime.session import address_to_join
from tests.helpers import run_command


@pytest.fixture
def ray_start_said(tmp_path, monkeypatch):
    """Writes the address that ``ray start`` leaves behind, alive or not."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return utils.write_ray_address


def test_a_ray_that_has_gone_is_not_joined(ray_start_said):
    assert address_to_join() is None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        ray_start_said(address)
        assert address_to_join() == address
    assert address_to_join() is None


def test_the_environment_has_the_last_word(ray_start_said, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ray_start_said(f"127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("RAY_ADDRESS", "192.0.2.77:6379")
        assert address_to_join() == "192.0.2.77:6379"
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert address_to_join() is None


START = """
from actors.runtime.session import init_ray
from jobs.cli import run_job
run_job(lambda: init_ray(address="local"))
"""


@pytest.mark.parametrize(
    ("variable", "advice"),
    [("TMPDIR", "too long, because a path of Ray's sockets"), ("HOME", "Ray could not start: [Errno")],
)
def test_a_place_that_ray_cannot_use_is_named_before_anything_starts(variable, advice, tmp_path):
    place = tmp_path / ("x" * 100)
    place.mkdir()
    if variable == "HOME":
        place = place / "file"
        place.write_text("not a directory")
    done = run_command(["-c", START], cwd=".", env={variable: str(place), "RAY_ADDRESS": "local"}, timeout=60)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert advice in line
    assert str(place) in line
    assert variable in line
    assert "Traceback" not in done.stderr
