"""Critics that tests of scorers serve, and a pool that serves them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from ray import serve

from actors import pool
from jobs.serve import run_pool
from rlhf_critic.scorer_config import ServeJobConfig
from tests.actors.scorers import save_tiny_critic


@pytest.fixture(scope="session")
def critics(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two critics with different rewards."""
    directory = tmp_path_factory.mktemp("critics")
    return {
        "first": save_tiny_critic(tiny_model, directory / "first", seed=1, version="tiny@1"),
        "second": save_tiny_critic(tiny_model, directory / "second", seed=2, version="tiny@2"),
    }


@pytest.fixture(scope="session")
def free_port() -> int:
    """A port that was free just now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def serving(ray_address: str, free_port: int) -> Iterator[Callable[..., str]]:
    """Runs the pool with some options, or changes the one that runs; returns its URL."""

    def run(checkpoint: str, **options: Any) -> str:
        config = ServeJobConfig(checkpoint=checkpoint, port=free_port, start_timeout_s=200, **options)
        url, _, _ = run_pool(config, lambda _: None)
        return url

    yield run
    if pool.is_running("scorers"):
        pool.stop("scorers")
    serve.shutdown()
