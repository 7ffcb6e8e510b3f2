"""Small random models of every family that is tested with prefix trees, and of one without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.model.backbone import PADDED_FAMILIES
from rlhf_critic.model.hf_config import silence_dropout
from rlhf_critic.model.prefix_attention import PREFIX_TREE_FAMILIES
from tests.helpers import save_tiny_tokenizer

VOCABULARY = 64
WINDOW = 6  # short enough for the tests' sequences to exceed
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 1}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4}
_MLP = {"intermediate_size": 48}
_GROUPED = {**_SHAPE, **_MLP, "num_key_value_heads": 2}


def family_configs() -> dict[str, PreTrainedConfig]:
    """Returns a new config of every family; some families have two variants."""
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (LlamaConfig, _GROUPED),
        "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
        "mistral-window": (MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
        "qwen2": (Qwen2Config, _GROUPED),
        "qwen2-window": (
            Qwen2Config,
            {**_GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        ),
        "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 8}),
        "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
        "phi3": (Phi3Config, _GROUPED),
        "phi3-window": (Phi3Config, {**_GROUPED, "sliding_window": WINDOW}),
        "gpt2": (GPT2Config, {**_GPT2, "n_positions": 256}),
        "gpt_neox": (GPTNeoXConfig, {**_SHAPE, **_MLP}),
        "gpt_neox-sequential": (GPTNeoXConfig, {**_SHAPE, **_MLP, "use_parallel_residual": False}),
        "opt": (OPTConfig, {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 16}),
        "opt-post-norm": (OPTConfig, {**_SHAPE, "ffn_dim": 48, "do_layer_norm_before": False}),
        "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    }
    return {name: config_class(**_TOKENS, **options) for name, (config_class, options) in made.items()}


def random_model(config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """Builds a model with larger weights than usual, so that values differ enough to compare."""
    silence_dropout(config)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def kernels_of(config: PreTrainedConfig) -> list[str]:
    """Returns the attention kernels that transformers has for a family."""
    return ["eager"] if config.model_type in {"gemma2", "bloom"} else ["sdpa", "eager"]


BOS = 0  # of the small tokenizer
EOS = 1
NAMES = sorted({*PREFIX_TREE_FAMILIES, *PADDED_FAMILIES})


def config_of(name: str) -> PreTrainedConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "falcon":  # fused projections, one key head, tied output layer
        return FalconConfig(**shape)
    if name == "stablelm":  # rotates a part of each head
        return StableLmConfig(**shape, intermediate_size=48, num_key_value_heads=2)
    return family_configs()[name]


def save_base_model(name: str, directory: Path) -> str:
    """Saves a causal language model with dropout and its tokenizer; OPT's tokenizer adds a leading BOS."""
    save_tiny_tokenizer(directory, adds_bos=name == "opt", chat_template=None)
    tokenizer = load_tokenizer(str(directory))
    config = config_of(name)
    config.vocab_size = len(tokenizer) - 1  # without the pad token that loading added
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS, EOS, None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Matrices are large enough for rewards to differ; norms and biases all differ from each other.
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.05))
    model.save_pretrained(directory)
    return str(directory)
