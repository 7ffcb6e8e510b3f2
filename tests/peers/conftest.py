"""Fixtures of contracts with peers: an export to judge, texts with their rewards here, and the peers themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.scoring.items import Conversation
from tests.actors.scorers import make_conversations, rewards_by_engine, save_tiny_critic
from tests.helpers import save_tiny_model
from tests.peers.contract import Contract, turns_of
from tests.peers.install import python_of


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks every test of this folder that runs a peer, so that ``make test`` leaves it out."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "peer" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.peers)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Contract]:
    """Returns the contract with a peer by its name; skips the test if the peer is not installed."""
    marker = request.node.get_closest_marker("xfail")

    def named(name: str) -> Contract:
        python = python_of(name)
        if python is None:
            pytest.skip(f"{name} is not installed: run `python -m tests.peers.install {name}`")
        return Contract(name, python, tmp_path, marker.kwargs["reason"] if marker else None)

    return named


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama whose rotary base is not the default, which other versions must not replace by theirs.

    Its attention heads have 32 numbers each, the smallest size that vLLM computes on a CPU.
    """
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    folder = tmp_path_factory.mktemp("bases") / "llama"
    return save_tiny_model(folder, tie_word_embeddings=False, rope_parameters=rope, hidden_size=128)


@pytest.fixture(scope="session")
def exports(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two critics with different rewards, as `rlhf-critic export` writes them."""
    folder = tmp_path_factory.mktemp("exports")
    for seed in (1, 2):
        critic = save_tiny_critic(base, folder / f"critic-{seed}", seed, f"tiny@{seed}")
        export_critic(critic, folder / f"export-{seed}", auto_map=False)
    return [str(folder / f"export-{seed}") for seed in (1, 2)]


@pytest.fixture(scope="session")
def export(exports: list[str]) -> str:
    """The first of the two critics."""
    return exports[0]


@pytest.fixture(scope="session")
def conversations(export: str) -> list[Conversation]:
    """Ten conversations of different lengths that no peer has to truncate."""
    encoder = load_critic(export).encoder
    made = make_conversations(60, seed=4)
    fitting = [one for one, encoded in zip(made, encoder.encode_batch(made), strict=True) if not encoded.truncated]
    return fitting[:10]


@pytest.fixture(scope="session")
def rewards(export: str, conversations: list[Conversation]) -> np.ndarray:
    """The rewards of the conversations, by this project."""
    return rewards_by_engine(export, conversations)


@pytest.fixture(scope="session")
def messages(conversations: list[Conversation]) -> list[list[dict[str, str]]]:
    """The conversations as turns."""
    return turns_of(conversations)


@pytest.fixture(scope="session")
def texts(export: str, conversations: list[Conversation]) -> list[str]:
    """The conversations as text, by the critic's own template."""
    encoder = load_critic(export).encoder
    return [encoder.render(one.prompt, one.response) for one in conversations]


@pytest.fixture(scope="session")
def pairs(export: str, conversations: list[Conversation]) -> list[tuple[Conversation, Conversation]]:
    """Preferences that no peer has to truncate: each conversation, and its prompt with the response of another one."""
    encoder = load_critic(export).encoder
    made = []
    for one in conversations:
        others = (Conversation(one.prompt, other.response) for other in conversations if other.response != one.response)
        made.append((one, next(other for other in others if not encoder.encode(*other).truncated)))
    return made
