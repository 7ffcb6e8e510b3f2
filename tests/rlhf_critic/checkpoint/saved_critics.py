"""Critics as a training job saves them."""

from pathlib import Path

import torch

from rlhf_critic.checkpoint.critic_directory import (
    CriticCard,
    EncoderCard,
    save_critic,
)
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.model.factory import create_critic_model

MAX_LENGTH = 40


def save(source: str, directory: Path, dtype: torch.dtype | None = None) -> Path:
    """Saves a critic with a new head as a training job does; returns its directory."""
    encoder = Encoder(load_tokenizer(source), MAX_LENGTH)
    torch.manual_seed(3)
    critic = create_critic_model(source, encoder.tokenizer, None, disable_dropout=True, dtype=dtype)
    card = CriticCard(
        version="test@1", encoder=EncoderCard(fingerprint=encoder.fingerprint, max_length=MAX_LENGTH), reward_mean=0.5
    )
    save_critic(directory, critic, encoder, card)
    return directory
