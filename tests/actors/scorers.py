"""What tests of scorers share: critics on disk, texts, and the rewards that every way of asking must give."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_critic.checkpoint import CriticCard, EncoderCard, load_critic, save_critic
from rlhf_critic.critic import score_sequences
from rlhf_critic.encoding import Encoder, load_tokenizer
from rlhf_critic.factory import create_critic_model
from rlhf_critic.scoring import Conversation
from tests.helpers import WORDS

MAX_LENGTH = 64


def save_tiny_critic(model: str, directory: Path, seed: int = 0, version: str = "tiny@1") -> str:
    """A critic with a head of its own and a known scale."""
    encoder = Encoder(load_tokenizer(model), MAX_LENGTH)
    torch.manual_seed(seed)
    critic = create_critic_model(model, encoder.tokenizer, None)
    card = CriticCard(
        version=version,
        encoder=EncoderCard(fingerprint=encoder.fingerprint, max_length=MAX_LENGTH),
        reward_mean=0.25,
        reward_std=2.0,
        reward_reference="made up",
    )
    save_critic(directory, critic, encoder, card)
    return str(directory)


def make_conversations(count: int, seed: int = 0, prompts: int = 5) -> list[Conversation]:
    """Conversations of which some share their prompt, and some are longer than the critic reads."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    asked = [words(40) for _ in range(prompts)]
    return [Conversation(rng.choice(asked), words(20)) for _ in range(count)]


def rewards_by_engine(critic: str, items: list[Conversation]) -> NDArray[np.float32]:
    """What training's own forward pass gives, one item at a time."""
    loaded = load_critic(critic)
    sequences = [one.ids for one in loaded.encoder.encode_batch(items)]
    return np.concatenate([score_sequences(loaded.critic, [ids], token_budget=4096) for ids in sequences])
