"""Models with random weights in the shapes of public ones, and batches of token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from benchmarks.workloads import PROFILES, Lengths, Profile, draw_prompts
from rlhf_critic.model.critic import Critic

IntArray = NDArray[np.int64]
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 1}
VOCABULARY = 49152  # ids of `benchmarks.workloads`

# Width, layers, heads, groups of keys, width of the MLP: Qwen3 0.6B, 1.7B and 4B.
QWEN3 = {"0.6B": (1024, 28, 16, 8, 3072), "1.7B": (2048, 28, 16, 8, 6144), "4B": (2560, 36, 32, 8, 9728)}
FIXED = {
    "512+256": Profile(Lengths(512, 0.0, 512, 512), Lengths(256, 0.0, 256, 256)),
    "1024+256": Profile(Lengths(1024, 0.0, 1024, 1024), Lengths(256, 0.0, 256, 256)),
}
ALL_PROFILES = {**FIXED, **PROFILES}


def qwen3_config(name: str, tiny: bool) -> PreTrainedConfig:
    """Returns the config of a Qwen3 of this size."""
    hidden, layers, heads, groups, inner = (64, 2, 4, 2, 96) if tiny else QWEN3[name]
    return Qwen3Config(
        vocab_size=VOCABULARY if tiny else 151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        head_dim=16 if tiny else 128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        **TOKENS,
    )


def family_configs(tiny: bool) -> dict[str, PreTrainedConfig]:
    """Returns small configs of the families whose whole critics are compared."""
    width, layers, heads, head, inner = (32, 2, 4, 8, 48) if tiny else (512, 4, 8, 64, 1376)
    common = {
        "vocab_size": 1024,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 16384,
        **TOKENS,
    }
    grouped = {**common, "num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**grouped),
        "qwen3": Qwen3Config(**grouped, head_dim=2 * head),
        "gpt_neox": GPTNeoXConfig(**common),
        "mistral-window": MistralConfig(**grouped, sliding_window=6 if tiny else 200),
    }


def build_model(config: PreTrainedConfig, device: torch.device, *dtypes: torch.dtype) -> PreTrainedModel:
    """Builds a sequence-classification model with random weights, the same for the same config.

    Args:
        config: The config.
        device: Device of the weights.
        *dtypes: Dtypes to which the weights are rounded, one after the other. Buffers keep theirs.
    """
    torch.manual_seed(0)
    with device:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        model.score.weight.normal_(0.0, config.hidden_size**-0.5)
    for parameter in model.parameters():
        for dtype in dtypes:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtypes[-1]
    return model


def build_critic(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, prefix_tree: bool = True
) -> Critic:
    """Builds a critic with random weights."""
    return Critic(build_model(config, device, dtype), prefix_tree=prefix_tree)


def trees(tiny: bool) -> dict[str, list[IntArray]]:
    """Returns sequences that make different trees."""
    rng = np.random.default_rng(0)
    scale = 16 if tiny else 1

    def ids(length: int) -> IntArray:
        return rng.integers(3, 1024, length)

    prompt, short = ids(512 // scale), ids(64 // scale)
    turn = np.concatenate([prompt, ids(96 // scale)])
    return {
        "pair": [np.concatenate([prompt, ids(256 // scale)]) for _ in range(2)],
        "eight": [np.concatenate([prompt[: 300 // scale], ids(int(rng.integers(5, 200 // scale)))]) for _ in range(8)],
        # Branches below branches, a sequence that begins another one, and one that comes twice.
        "turns": [prompt, turn, *(np.concatenate([turn, ids(n)]) for n in (1, 3, 130 // scale)), turn],
        "short runs": [np.concatenate([short, ids(int(rng.integers(1, 8)))]) for _ in range(20 if tiny else 1000)],
    }


def long_tree(tiny: bool) -> list[IntArray]:
    """Returns 64 responses of 1,024 tokens to a prompt of 8,192 tokens."""
    rng = np.random.default_rng(1)
    prompt_length, length, responses = (64, 8, 4) if tiny else (8192, 1024, 64)
    prompt = rng.integers(3, 1024, prompt_length)
    return [np.concatenate([prompt, rng.integers(3, 1024, length)]) for _ in range(responses)]


@dataclass(frozen=True)
class Pairs:
    """Pairs of sequences, and what they cost.

    Attributes:
        units: Chosen and rejected sequence of each pair.
        tokens: Tokens of all sequences.
    """

    units: list[list[IntArray]]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(ids) for unit in self.units for ids in unit)


def draw_pairs(profile: str, pairs: int, tiny: bool, responses: int = 2) -> Pairs:
    """Samples pairs with the lengths of a profile; a tiny one keeps the first 24 tokens."""
    drawn = draw_prompts(ALL_PROFILES[profile], pairs, responses)
    return Pairs([[ids[-24:] if tiny else ids for ids in unit] for unit in drawn])
