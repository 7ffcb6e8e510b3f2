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

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch

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
    context = ray.init(num_cpus=6, include_dashboard=True, logging_level="ERROR", log_to_driver=False)
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
