"""Builds models: from a pretrained directory or hub id to a critic whose vocabulary is padded and whose head is new.

`create_hf_model` and `create_critic_model` take the arguments of DeepSpeed-Chat's factories in the same order, so code
written against those runs unchanged; what they lack is keyword-only. Models are built from their config with the final
vocabulary size and then filled tensor by tensor. Under ZeRO-3 every parameter is partitioned the moment it is made.
Knows nothing of data, training or critic directories.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations import HfDeepSpeedConfig

from rlhf_critic.config.model import ModelConfig
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.backbone import Backbone
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.lora import add_adapters
from rlhf_critic.model.weights import WeightReader, full_shape, gathered, is_writer, load_weights, match_weights

VOCABULARY_MULTIPLE = 8
HeadInit = Literal["normal", "zero"]
HEAD_NAME = "score.weight"
# The output layer of causal language models, which a critic has no use for; GPT-NeoX files have the second name.
OUTPUT_LAYERS = ("lm_head.", "embed_out.")
# Masks and rotations that older versions of transformers saved beside the weights, and that are computed today.
OLD_BUFFERS = re.compile(r"\b(?:(?:attn|attention)\.(?:bias|masked_bias|embed_positions)|rotary_emb\.inv_freq)$")
# Every spelling of dropout in the configs of transformers' decoder families, e.g. attn_pdrop, attention_dropout,
# hidden_dropout, hidden_dropout_prob, classifier_dropout, dropout, layerdrop.
DROPOUT_FIELD = re.compile(r"(^|_)(p?drop|dropout)(_prob|_rate|_p)?$|^layerdrop$")
DTYPE_OF = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def padded_vocabulary_size(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """The least multiple of 8 that holds both the tokenizer's ids and the rows the model has; never fewer rows."""
    rows = max(len(tokenizer), config.get_text_config().vocab_size)
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def create_hf_model(
    model_class: Any,
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any] | None = None,
    rlhf_training: bool = False,
    disable_dropout: bool = False,
    *,
    num_layers: int | None = None,
    head_init: HeadInit = "normal",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    weights: WeightReader | None = None,
) -> PreTrainedModel:
    """Builds a Hugging Face model with padded vocabulary and loads its weights.

    Args:
        model_class: An ``AutoModel*`` class or a concrete model class.
        model_name_or_path: A directory or hub id with a config and weights (safetensors or a legacy ``.bin``).
        tokenizer: Decides how many rows the embedding needs, and the pad and EOS ids.
        ds_config: DeepSpeed's configuration. At ZeRO stage 3 the model is partitioned from the start, and
            ``torch.distributed`` must be initialised; other stages change nothing.
        rlhf_training: Whether the weights are a trained critic's: then a missing head is an error. Otherwise a model
            without a ``score`` head gets a new one.
        disable_dropout: Sets every dropout probability of the config to 0.
        num_layers: Keep only the first layers of the body.
        head_init: A new head is drawn from N(0, 1 / sqrt(d + 1)), as in OpenAI's lm-human-preferences, or is zero.
        dtype: Of parameters. Default: as ``ds_config`` says (bf16, fp16), else fp32.
        attn_implementation: Passed to transformers, which chooses by itself where it is None.
        weights: Where the weights are read, under the names of ``model_class``. Default: ``model_name_or_path``.

    Returns:
        The model, in training mode, on the device DeepSpeed gives it (ZeRO-3) or the CPU.

    Raises:
        CheckpointError: There is no config or no weights, they do not fit, or the options do not fit the model.
    """
    ds_config = ds_config or {}
    # Drawn now: how many numbers construction takes from the global generator depends on the ZeRO stage.
    head_seed = int(torch.randint(2**62, ()))
    model = _construct(
        model_class,
        model_name_or_path,
        tokenizer,
        ds_config,
        disable_dropout=disable_dropout,
        num_layers=num_layers,
        dtype=dtype or _dtype_of(ds_config),
        attn_implementation=attn_implementation,
    )
    reader = weights or WeightReader(model_name_or_path)
    _rename_output_layer(model, reader)
    missing = load_weights(model, reader, **_tolerances(model, rlhf_training, num_layers))
    if HEAD_NAME in missing:
        init_head(model.score.weight, head_init, head_seed)
    return model.train()


def check_critic_model(
    model_name_or_path: str, tokenizer: PreTrainedTokenizerBase, num_layers: int | None = None
) -> PreTrainedModel:
    """Checks that a critic can be made of a base model, from its config and the shapes in its files.

    Returns:
        The model without weights, on the meta device.

    Raises:
        CheckpointError: See `create_hf_model`.
    """
    with torch.device("meta"):
        model = _construct(
            AutoModelForSequenceClassification,
            model_name_or_path,
            tokenizer,
            {},
            disable_dropout=True,
            num_layers=num_layers,
            dtype=torch.float32,
            attn_implementation=None,
        )
    match_weights(model, WeightReader(model_name_or_path), **_tolerances(model, False, num_layers))
    return model


def critic_without_weights(config: PreTrainedConfig, options: ModelConfig) -> Critic:
    """The critic that training would make of a base model with this config, on the meta device, as it is trained.

    Args:
        config: Of the base model; it is changed.
        options: Which of it is used and trained. ``path`` is not looked at.

    Raises:
        CheckpointError: transformers makes no critic of it, or the options do not fit it.
        ConfigError: See `rlhf_critic.model.lora.add_adapters`.
    """
    config.num_labels = 1
    if options.num_layers is not None:
        keep_layers(config, options.num_layers)
    if options.disable_dropout:
        silence_dropout(config)
    text_config = config.get_text_config()
    rows = text_config.vocab_size
    text_config.vocab_size = -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if getattr(text_config, "pad_token_id", None) is None:
        config.pad_token_id = text_config.pad_token_id = 0
    attention = None if options.attn_implementation == "auto" else options.attn_implementation
    with torch.device("meta"):
        name = getattr(config, "name_or_path", "") or config.model_type
        model = _build(
            AutoModelForSequenceClassification, name, config, {}, dtype=DTYPE_OF[options.dtype], attention=attention
        )
        critic = Critic(model, prefix_tree=options.prefix_tree)
        limit_training(critic, options, seed=0)
    return critic.to(DTYPE_OF[options.dtype])  # peft leaves adapters in fp32 on the meta device


def _construct(
    model_class: Any,
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any],
    *,
    disable_dropout: bool,
    num_layers: int | None,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """The model with its final vocabulary and without its weights."""
    config = load_config(model_name_or_path)
    config.num_labels = 1
    if num_layers is not None:
        keep_layers(config, num_layers)
    if disable_dropout:
        silence_dropout(config)
    text_config = config.get_text_config()
    _refuse_other_tokenizer(model_name_or_path, tokenizer, text_config.vocab_size)
    text_config.vocab_size = padded_vocabulary_size(tokenizer, config)
    config.pad_token_id = text_config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = text_config.eos_token_id = tokenizer.eos_token_id
    return _build(model_class, model_name_or_path, config, ds_config, dtype=dtype, attention=attn_implementation)


def _build(
    model_class: Any,
    name: str,
    config: PreTrainedConfig,
    ds_config: dict[str, Any],
    *,
    dtype: torch.dtype,
    attention: str | None,
) -> PreTrainedModel:
    """The model of a config without its weights; ``name`` is for errors."""
    construct = getattr(model_class, "from_config", None) or model_class._from_config
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with _zero3_construction(ds_config), no_init_weights():
            model = construct(config, dtype=dtype, **options)
    except ValueError as error:  # whose further lines list every class there is
        raise CheckpointError(
            f"{name}: transformers makes no {model_class.__name__} of model type "
            f"{config.model_type!r} with these options: {str(error).splitlines()[0]} Choose a model of a family that "
            "has this class, or another --model.attn-implementation."
        ) from error
    model.tie_weights()  # part of what the block above leaves out
    return model


def _rename_output_layer(model: PreTrainedModel, reader: WeightReader) -> None:
    """Calls the output layer in GPT-NeoX's files what transformers 5 calls it in its model."""
    if hasattr(model, "lm_head"):
        reader.rename(lambda key: re.sub(r"^embed_out\.", "lm_head.", key))


def _tolerances(model: PreTrainedModel, rlhf_training: bool, num_layers: int | None) -> dict[str, Any]:
    """In what a file may differ from the model that takes its weights; see `rlhf_critic.model.weights.match_weights`."""
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    return {
        "prefix": f"{model.base_model_prefix}.",
        "may_be_missing": lambda name: name == HEAD_NAME and not rlhf_training,
        "may_be_unexpected": lambda key: (
            key.startswith(OUTPUT_LAYERS)
            or OLD_BUFFERS.search(key) is not None
            or (num_layers is not None and _layer_number(key) >= num_layers)
            or any(pattern.search(key) for pattern in ignored)
        ),
        "may_have_fewer_rows": _vocabulary_names(model).__contains__,
    }


def create_critic_model(
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any] | None,
    num_padding_at_beginning: int = 0,
    rlhf_training: bool = False,
    disable_dropout: bool = False,
    *,
    num_layers: int | None = None,
    head_init: HeadInit = "normal",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    prefix_tree: bool = True,
    weights: WeightReader | None = None,
) -> Critic:
    """Builds a `Critic` around the family's sequence-classification model; the arguments are `create_hf_model`'s.

    Args:
        model_name_or_path: A base model (the head is new) or, with ``rlhf_training``, a trained critic.
        tokenizer: See `create_hf_model`.
        ds_config: See `create_hf_model`.
        num_padding_at_beginning: See `Critic`.
        rlhf_training: See `create_hf_model`.
        disable_dropout: See `create_hf_model`.
        num_layers: See `create_hf_model`.
        head_init: See `create_hf_model`.
        dtype: See `create_hf_model`.
        attn_implementation: See `create_hf_model`.
        prefix_tree: See `Critic`.
        weights: See `create_hf_model`.

    Raises:
        CheckpointError: See `create_hf_model`.
    """
    model = create_hf_model(
        AutoModelForSequenceClassification,
        model_name_or_path,
        tokenizer,
        ds_config,
        rlhf_training,
        disable_dropout,
        num_layers=num_layers,
        head_init=head_init,
        dtype=dtype,
        attn_implementation=attn_implementation,
        weights=weights,
    )
    return Critic(model, num_padding_at_beginning, prefix_tree=prefix_tree)


def silence_dropout(config: PreTrainedConfig) -> None:
    """Sets every dropout probability in a config, whatever its family calls it, to 0."""
    for name, value in vars(config).items():
        if DROPOUT_FIELD.search(name) and isinstance(value, (int, float)):
            setattr(config, name, 0.0)
        elif isinstance(value, PreTrainedConfig):
            silence_dropout(value)


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has learned, which no sequence may exceed; None where positions are computed."""
    tokens = model.get_input_embeddings()
    learned = any(isinstance(module, nn.Embedding) and module is not tokens for module in model.modules())
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) if learned else None


def validate_positions(model: PreTrainedModel, max_length: int) -> None:
    """Checks that a model has a position for every token of the longest sequence.

    Raises:
        CheckpointError: It has learned fewer.
    """
    most = learned_positions(model)
    if most is not None and max_length > most:
        raise CheckpointError(
            f"encoding.max_length is {max_length}, but the model has learned {most} positions: give a max_length of "
            f"{most} or less"
        )


def limit_training(critic: Critic, options: ModelConfig, seed: int) -> None:
    """Adds adapters and takes layers out of training, as the options say, in place.

    Raises:
        CheckpointError: There are fewer layers than should be frozen.
        ConfigError: See `rlhf_critic.model.lora.add_adapters`.
    """
    if options.lora_rank:
        add_adapters(critic.model, options, seed)
    if options.freeze_layers:  # after the adapters, so that those of frozen layers are frozen too
        freeze_first_layers(critic, options.freeze_layers)


def freeze_first_layers(backbone: Backbone, number: int) -> None:
    """Takes the embeddings and the first layers of a model's body out of training.

    Raises:
        CheckpointError: The body has fewer layers.
    """
    body = getattr(backbone.model, backbone.model.base_model_prefix)
    available = backbone.model.config.get_text_config().num_hidden_layers
    stacks = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == available]
    if number > available or not stacks:
        raise CheckpointError(f"model.freeze_layers is {number}, but the model has {available} layers")
    embeddings = [module for module in body.modules() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *stacks[0][:number]):
        module.requires_grad_(False)


def init_head(weight_1D: nn.Parameter, how: HeadInit, seed: int) -> None:
    """Initialises a scalar head in place, under ZeRO-3 on all ranks alike.

    ``normal`` is N(0, 1 / sqrt(d + 1)), Ziegler et al., "Fine-tuning language models from human preferences" (2019);
    ``zero`` gives every text the reward 0 at first.
    """
    with torch.no_grad(), gathered(weight_1D, modify=True):
        if not is_writer(weight_1D):
            return
        if how == "zero":
            weight_1D.zero_()
        else:
            generator = torch.Generator().manual_seed(seed)
            drawn_1D = torch.randn(weight_1D.shape, generator=generator) * (weight_1D.shape[-1] + 1) ** -0.5
            weight_1D.copy_(drawn_1D)


def load_config(model_name_or_path: str) -> PreTrainedConfig:
    """Loads a model's config; code that comes with it is neither run nor asked about.

    Raises:
        CheckpointError: There is none, or it cannot be read without running code.
    """
    try:
        # False and not the default, with which transformers asks at the terminal whether to run the code.
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model_name_or_path}: no model config could be loaded: {error}") from error
    if hasattr(config, "auto_map"):
        del config.auto_map  # or building a model from this config would ask
    return config


def _refuse_other_tokenizer(name_or_path: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuses ids that the embedding has no row for; only the pad token, which is never read, may be such a one."""
    highest = max(index for token, index in tokenizer.get_vocab().items() if token != tokenizer.pad_token)
    if highest >= rows:
        raise CheckpointError(
            f"{name_or_path}: the tokenizer is bigger than the embedding: it has ids up to {highest}, the model "
            f"rows for {rows}. Use the model's own tokenizer; if tokens were added to it, resize_token_embeddings and "
            "train them"
        )


def keep_layers(config: PreTrainedConfig, num_layers: int) -> None:
    """Cuts a config to its first layers; per-layer lists (``layer_types``) are cut with it."""
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


def _layer_number(key: str) -> int:
    """The number of the layer a weight belongs to: the first whole number in its name."""
    numbers = re.findall(r"(?:^|\.)(\d+)\.", key)
    return int(numbers[0]) if numbers else -1


def _vocabulary_names(model: PreTrainedModel) -> set[str]:
    """The names of the tensors that have a row per token id."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    rows_per_token = {id(module) for module in (embedding, output) if module is not None}
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if id(module) in rows_per_token
        for parameter, tensor in module.named_parameters(recurse=False)
        if full_shape(tensor)[0] == model.config.get_text_config().vocab_size
    }


def _dtype_of(ds_config: dict[str, Any]) -> torch.dtype:
    if ds_config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if ds_config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32


@contextmanager
def _zero3_construction(ds_config: dict[str, Any]) -> Iterator[None]:
    """Within the block transformers partitions what it constructs, if ``ds_config`` asks for ZeRO stage 3."""
    if ds_config.get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    # transformers holds this object by a weak reference only: without a name of its own it would be gone at once and
    # the model be built whole on every rank.
    keep_alive = HfDeepSpeedConfig(ds_config)
    yield
    del keep_alive
