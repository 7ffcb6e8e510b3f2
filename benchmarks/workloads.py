"""Workloads of the benchmarks: length profiles, random token ids, and a model with the shape of SmolLM2-135M.

Everything is drawn from a seed, so every process makes the same. Knows nothing of who is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 49152
FIRST_ORDINARY_ID = 16  # lower ids are special tokens

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """Log-normal distribution of lengths in tokens, clipped."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        """Samples one length."""
        return int(np.clip(np.round(rng.lognormal(np.log(self.median), self.sigma)), self.low, self.high))


@dataclass(frozen=True)
class Profile:
    """Lengths of prompts and responses."""

    prompt: Lengths
    response: Lengths


PROFILES = {
    "hh": Profile(Lengths(120, 0.8, 8, 380), Lengths(55, 0.7, 4, 130)),
    "tldr": Profile(Lengths(330, 0.35, 60, 500), Lengths(35, 0.35, 8, 64)),
    "chat": Profile(Lengths(40, 0.8, 8, 300), Lengths(280, 0.6, 10, 500)),
}


def draw_prompts(profile: Profile, prompts: int, responses: int, seed: int = 0) -> list[list[IntArray]]:
    """Samples token ids of responses, each with its prompt, per prompt. All prompts start with the same token."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> IntArray:
        return rng.integers(FIRST_ORDINARY_ID, VOCABULARY, length)

    drawn = []
    for _ in range(prompts):
        prompt = np.append([1], tokens(profile.prompt.draw(rng) - 1))
        drawn.append([np.concatenate([prompt, tokens(profile.response.draw(rng))]) for _ in range(responses)])
    return drawn


def text_of(ids: IntArray) -> str:
    """Returns a text that the tokenizer of `save_model` encodes as these ids."""
    return " ".join(f"<{token}>" for token in ids)


def head_weight() -> torch.Tensor:
    """Returns the common head of all contenders, ``[1, D]``."""
    return torch.randn(1, 576, generator=torch.Generator().manual_seed(0)) / 24


def save_model(directory: Path, layers: int) -> int:
    """Writes a random model of SmolLM2-135M's shape, cut to some layers, and a tokenizer for it.

    Returns:
        Parameters outside the embedding.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def save_tokenizer(directory: Path) -> None:
    """Writes a tokenizer with one token for each word ``<0>``, ``<1>`` and so on."""
    vocabulary = {f"<{index}>": index for index in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<0>",
        bos_token="<1>",
        eos_token="<2>",
        pad_token="<3>",
    )
    tokenizer.save_pretrained(directory)
