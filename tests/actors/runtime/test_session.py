"""A job joins the Ray that was meant, and never one that has ended."""

from __future__ import annotations

import socket

import pytest
from ray._private import utils

from actors.runtime.session import address_to_join


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
