"""Fixtures that tests share: a small tokenizer and models made on the spot, one Ray, and groups of ranks on it."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    DS_ACCELERATOR="cpu",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    TOKENIZERS_PARALLELISM="false",
)

import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve

from actors.serving import control
from jobs.serve import run_pool
from rlhf_critic.config.serve import ServeJobConfig
from tests.actors.scorers import save_tiny_critic
from tests.helpers import RankGroup, save_tiny_model, save_tiny_tokenizer, write_preferences

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama: untied embeddings, a tokenizer without pad token, a vocabulary that is no multiple of 8."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "untied", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with tied embeddings and a tokenizer whose pad token is its EOS token."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True, pad_is_eos=True)


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Callable[..., str]:
    """Makes tokenizer directories with given peculiarities."""
    return lambda **peculiarities: save_tiny_tokenizer(tmp_path / "tokenizer", **peculiarities)


@pytest.fixture(scope="session")
def preference_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ninety preferences of very different lengths in which politeness wins."""
    return write_preferences(tmp_path_factory.mktemp("data") / "train.jsonl", 90)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One Ray for the whole session, with the Jobs API; it offers more CPUs than there are, for placement only."""
    context = ray.init("local", num_cpus=6, include_dashboard=True, logging_level="ERROR", log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def ranks(ray_address: str) -> Iterator[Callable[[int], RankGroup]]:
    """Groups of Ray actors that are the ranks of one process group; made once for each world size."""
    groups: dict[int, RankGroup] = {}

    def group(world_size: int) -> RankGroup:
        if world_size not in groups:
            groups[world_size] = RankGroup(world_size)
        return groups[world_size]

    yield group
    for made in groups.values():
        made.shutdown()


@pytest.fixture(scope="session")
def critics(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two critics with different rewards."""
    directory = tmp_path_factory.mktemp("critics")
    return {
        "first": save_tiny_critic(tiny_model, directory / "first", seed=1, version="tiny@1"),
        "second": save_tiny_critic(tiny_model, directory / "second", seed=2, version="tiny@2"),
    }


@pytest.fixture(scope="session")
def serve_port(ray_address: str) -> Iterator[int]:
    """Where Ray Serve listens, once a pool was started."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def serving(serve_port: int) -> Iterator[Callable[..., str]]:
    """Runs the pool with some options, or changes the one that runs; returns its URL. A module's tests share one."""

    def run(checkpoint: str, **options: Any) -> str:
        config = ServeJobConfig(checkpoint=checkpoint, port=serve_port, start_timeout_s=200, **options)
        url, _, _ = run_pool(config, lambda _: None)
        return url

    yield run
    if control.is_running("scorers"):
        control.stop("scorers")
