"""Hugging Face configs: loads them and changes vocabulary, layers and dropout. Knows nothing about weights."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rlhf_critic.errors import CheckpointError

# Every spelling of dropout in the configs of transformers' decoder families, e.g. attn_pdrop, attention_dropout,
# hidden_dropout, hidden_dropout_prob, classifier_dropout, dropout, layerdrop.
DROPOUT_FIELD = re.compile(r"(^|_)(p?drop|dropout)(_prob|_rate|_p)?$|^layerdrop$")
# Random factors of hidden states in training, by model type. Phi-MoE's router_jitter_noise is a threshold, also in
# inference.
TRAINING_NOISE = {"minimax": "router_jitter_noise", "mixtral": "router_jitter_noise", "phimoe": "input_jitter_noise"}
# Files of directories that are no models, with their kind and what makes a model of them.
MODEL_MAKERS = {
    "adapter_config.json": (
        "adapters of peft",
        "merge them into their base model with rlhf-critic export ADAPTERS OUT --base BASE_MODEL",
    ),
    "zero_to_fp32.py": (
        "a checkpoint of DeepSpeed",
        "run the script zero_to_fp32.py in it with --safe_serialization, and add the model's config and tokenizer",
    ),
    "global_step*/*_model_states.pt": (
        "a checkpoint of DeepSpeed",
        "make a model of it with DeepSpeed's script zero_to_fp32.py",
    ),
    "model_world_size_*_rank_*.pt": ("FSDP shards of verl", "make a model of them with python -m verl.model_merger"),
    "*.distcp": (
        "a distributed checkpoint of torch",
        "make a model of it with accelerate merge-weights, and add the model's config and tokenizer",
    ),
}


def load_config(model_name_or_path: str) -> PreTrainedConfig:
    """Loads a model's config without running code that comes with it.

    Raises:
        CheckpointError: There is no config, or it cannot be read without running code.
    """
    try:
        # With the default (None) transformers would ask at the terminal whether to run the code.
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    # transformers checks the types of some configs and trips over wrong ones in others.
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        reject_other_kinds(model_name_or_path)
        why = " ".join(str(error).split())
        raise CheckpointError(f"{model_name_or_path}: no model config could be loaded: {why}") from error
    if hasattr(config, "auto_map"):
        del config.auto_map  # otherwise building a model from this config would ask
    return config


def reject_other_kinds(name_or_path: str) -> None:
    """Checks that what is no complete model is not something from which one can be made.

    Raises:
        CheckpointError: It is, such as adapters of peft. Names the tool that makes the model.
    """
    for pattern, (kind, advice) in MODEL_MAKERS.items():
        if any(Path(name_or_path).glob(pattern)):
            raise CheckpointError(f"{name_or_path}: has {kind} and no complete model: {advice}")


def padded(rows: int) -> int:
    """Rounds a number of vocabulary rows up to a multiple of 8."""
    return -(-rows // 8) * 8


def keep_layers(config: PreTrainedConfig, num_layers: int) -> None:
    """Reduces a config to its first layers, and per-layer lists (``layer_types``) with it.

    Raises:
        CheckpointError: The model has fewer layers.
    """
    text_config = config.get_text_config()
    available = text_config.num_hidden_layers
    if not 1 <= num_layers <= available:
        raise CheckpointError(
            f"num_layers is {num_layers}, but the model has {available} layers: choose 1 to {available}"
        )
    for name, value in list(vars(text_config).items()):
        if isinstance(value, list) and len(value) == available:
            setattr(text_config, name, value[:num_layers])
    text_config.num_hidden_layers = num_layers


def silence_dropout(config: PreTrainedConfig) -> None:
    """Sets every dropout probability and every noise of training in a config to 0, whatever the family calls it."""
    noise = TRAINING_NOISE.get(config.model_type)
    for name, value in vars(config).items():
        if (DROPOUT_FIELD.search(name) or name == noise) and isinstance(value, (int, float)):
            setattr(config, name, type(value)(0))  # 0 where a config takes integers only, such as MPT's
        elif isinstance(value, PreTrainedConfig):
            silence_dropout(value)


def validate_tokenizer(name_or_path: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Checks that the embedding has a row for every token id. The pad token, which is never read, needs none.

    Raises:
        CheckpointError: A token id has no row.
    """
    highest = max(index for token, index in tokenizer.get_vocab().items() if token != tokenizer.pad_token)
    if highest >= rows:
        raise CheckpointError(
            f"{name_or_path}: the tokenizer is bigger than the embedding: it has ids up to {highest}, the model "
            f"rows for {rows}. Use the model's own tokenizer; if tokens were added to it, call "
            "resize_token_embeddings and train them"
        )
