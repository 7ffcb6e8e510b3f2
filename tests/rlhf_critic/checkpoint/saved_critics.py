"""Critics as a training job saves them."""

import json
from pathlib import Path

import torch

from rlhf_critic.checkpoint.critic_directory import (
    CriticCard,
    EncoderCard,
    save_critic,
)
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.model.factory import create_critic_model
from tests.helpers import save_tiny_tokenizer

MAX_LENGTH = 40
# Classes of tokenizers that transformers 5 saves for families, each with rules of its own in transformers 4.
TOKENIZER_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")


def save_tokenizer_of_class(name: str, directory: Path) -> Encoder:
    """Saves a tokenizer of a family's class, which adds BOS to texts; returns the encoder that is made of it."""
    save_tiny_tokenizer(directory, adds_bos=True)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": name}))
    tokenizer = load_tokenizer(str(directory), "plain")
    assert type(tokenizer).__name__ == name
    return Encoder(tokenizer, MAX_LENGTH)


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
