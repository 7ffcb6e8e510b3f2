"""Model factory: builds a critic with padded vocabulary and new head from a pretrained directory or hub id.

`create_hf_model` and `create_critic_model` take the arguments of DeepSpeed-Chat's factories in the same order, so code
written for those runs unchanged. Further arguments are keyword-only. Models are built from their config with the final
vocabulary size and then filled tensor by tensor. Under ZeRO-3 every parameter is partitioned when it is created.
Knows nothing about data, training or critic directories.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.integrations import HfDeepSpeedConfig

from rlhf_critic.config.model import ModelConfig, resolve_dtype
from rlhf_critic.errors import CheckpointError
from rlhf_critic.model.backbone import Backbone
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.hf_config import keep_layers, load_config, padded, silence_dropout, validate_tokenizer
from rlhf_critic.model.lora import add_adapters
from rlhf_critic.model.weights import (
    WeightReader,
    cached_file_of,
    full_shape,
    gathered,
    is_writer,
    load_weights,
    match_weights,
)

logger = logging.getLogger(__name__)

HeadInit = Literal["normal", "zero"]
HEAD_NAME = "score.weight"
# Output layer of causal language models, which a critic does not use. GPT-NeoX files have the second name.
OUTPUT_LAYERS = ("lm_head.", "embed_out.")
# Masks and rotations that older versions of transformers saved with the weights. They are computed today.
OLD_BUFFERS = re.compile(r"\b(?:(?:attn|attention)\.(?:bias|masked_bias|embed_positions)|rotary_emb\.inv_freq)$")
# Heads of other systems' reward models, and the files in which LLaMA-Factory saves one beside a model.
FOREIGN_HEADS = ("v_head.", "value_head.", "reward_head.")
HEAD_FILES = ("value_head.safetensors", "value_head.bin")
# Routers that sample experts in training, where rollouts of one prompt would not share its computation.
SAMPLING_ROUTERS = {"PhimoeTopKRouter"}
DTYPE_OF = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        tokenizer: The tokenizer, which determines the number of embedding rows and the pad and EOS ids.
        ds_config: DeepSpeed's configuration. At ZeRO stage 3 the model is partitioned from the start, and
            ``torch.distributed`` must be initialised. Other stages change nothing.
        rlhf_training: Whether the weights are those of a trained critic. If so, a missing head is an error. Otherwise a
            model without a ``score`` head gets a new one.
        disable_dropout: Whether to set every dropout probability of the config to 0.
        num_layers: Number of first layers of the body to keep; None keeps all.
        head_init: Initialisation of a new head: ``normal`` is N(0, 1 / sqrt(d + 1)), as in OpenAI's
            lm-human-preferences; ``zero`` is zero.
        dtype: Dtype of the parameters. Default: that of ``ds_config`` (bf16, fp16), else fp32.
        attn_implementation: Attention implementation for transformers; with None transformers chooses.
        weights: Reader of the weights, under the names of ``model_class``. Default: ``model_name_or_path``.

    Returns:
        The model in training mode, on the device chosen by DeepSpeed (ZeRO-3) or the CPU.

    Raises:
        CheckpointError: Config or weights are missing or do not fit, or the options do not fit the model.
    """
    ds_config = ds_config or {}
    # Sampled now, because construction advances the global generator by an amount that depends on the ZeRO stage.
    head_seed = int(torch.randint(2**62, ()))
    dtype = dtype or _dtype_of(ds_config)
    model = _construct(
        model_class, model_name_or_path, tokenizer, ds_config, disable_dropout, num_layers, dtype, attn_implementation
    )
    reader = weights or _base_weights(model_name_or_path, model, rlhf_training)
    missing = load_weights(model, reader, **_tolerances(model, rlhf_training, num_layers))
    if HEAD_NAME in missing:
        init_head(model.score.weight, head_init, head_seed)
    if disable_dropout:
        stop_sampling_experts(model)
    return model.train()


def stop_sampling_experts(model: PreTrainedModel) -> None:
    """Makes routers that sample experts in training (Phi-MoE's, arXiv:2409.12136) choose as they do in inference."""
    for module in model.modules():
        if type(module).__name__ in SAMPLING_ROUTERS:
            module.register_forward_pre_hook(_leave_training_mode)


def _leave_training_mode(router: nn.Module, _: object) -> None:
    router.training = False


def check_critic_model(
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    num_layers: int | None = None,
    weights: WeightReader | None = None,
) -> PreTrainedModel:
    """Checks that a critic can be built from a base model, using its config and the shapes in its files.

    Returns:
        The model without weights, on the meta device.

    Raises:
        CheckpointError: See `create_hf_model`.
    """
    with torch.device("meta"):
        model = _construct(
            AutoModelForSequenceClassification, model_name_or_path, tokenizer, {}, True, num_layers, torch.float32, None
        )
    reader = weights or _base_weights(model_name_or_path, model, False)
    match_weights(model, reader, **_tolerances(model, False, num_layers))
    return model


def _base_weights(model_name_or_path: str, model: PreTrainedModel, rlhf_training: bool) -> WeightReader:
    """Opens the weights of a base model, and checks that no trained head in them would be ignored.

    Raises:
        CheckpointError: There is one: in a file of its own, under another system's name, or with two outputs.
    """
    reader = WeightReader(model_name_or_path)
    if rlhf_training or not hasattr(model, "score"):
        return reader
    found, source_format = None, ""
    if any(cached_file_of(model_name_or_path, name) for name in HEAD_FILES):
        found = "a trained head in a file of its own"
    elif foreign := next((name for name in reader.names if name.startswith(FOREIGN_HEADS)), None):
        found = f"a trained head ({foreign})"
    elif HEAD_NAME in reader.names and reader.shape(HEAD_NAME)[:1] == (2,):
        found, source_format = f"a trained head with two outputs ({HEAD_NAME})", " --from two-labels"
    if found:
        raise CheckpointError(
            f"{model_name_or_path}: has {found}, which training would ignore. Import it with rlhf-critic export "
            f"{model_name_or_path} OUT{source_format}, and train from OUT; or give the model that it was trained from"
        )
    return reader


def critic_without_weights(config: PreTrainedConfig, options: ModelConfig) -> Critic:
    """Builds the critic that training would build from this config, on the meta device, as it is trained.

    Args:
        config: Config of the base model; it is changed.
        options: Options of the model. ``path`` is ignored. A dtype of auto is that of a CPU.

    Raises:
        CheckpointError: transformers has no critic for this model type, or the options do not fit.
        ConfigError: See `rlhf_critic.model.lora.add_adapters`.
    """
    config.num_labels = 1
    dtype = DTYPE_OF[resolve_dtype(options.dtype, on_gpu=False)]
    if options.num_layers is not None:
        keep_layers(config, options.num_layers)
    if options.disable_dropout:
        silence_dropout(config)
    text_config = config.get_text_config()
    text_config.vocab_size = padded(text_config.vocab_size)
    if getattr(text_config, "pad_token_id", None) is None:
        config.pad_token_id = text_config.pad_token_id = 0
    attention = None if options.attn_implementation == "auto" else options.attn_implementation
    with torch.device("meta"):
        name = getattr(config, "name_or_path", "") or config.model_type
        model = _build(AutoModelForSequenceClassification, name, config, {}, dtype, attention)
        critic = Critic(model, prefix_tree=options.prefix_tree)
        limit_training(critic, options, seed=0)
    return critic.to(dtype)  # peft leaves adapters in fp32 on the meta device


def _construct(
    model_class: Any,
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any],
    disable_dropout: bool,
    num_layers: int | None,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """Builds the model with its final vocabulary and without its weights."""
    config = load_config(model_name_or_path)
    config.num_labels = 1
    if num_layers is not None:
        keep_layers(config, num_layers)
    if disable_dropout:
        silence_dropout(config)
    text_config = config.get_text_config()
    validate_tokenizer(model_name_or_path, tokenizer, text_config.vocab_size)
    text_config.vocab_size = padded(max(len(tokenizer), text_config.vocab_size))  # rows are never removed
    config.pad_token_id = text_config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = text_config.eos_token_id = tokenizer.eos_token_id
    return _build(model_class, model_name_or_path, config, ds_config, dtype, attn_implementation)


def _build(
    model_class: Any, name: str, config: PreTrainedConfig, ds_config: Any, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """Builds the model of a config without its weights; ``name`` is for errors."""
    construct = getattr(model_class, "from_config", None) or model_class._from_config
    options = {} if attention is None else {"attn_implementation": attention}
    # As long as this object lives, transformers partitions what it constructs. It keeps only a weak reference to it.
    at_stage_3 = ds_config.get("zero_optimization", {}).get("stage") == 3
    partitioning = HfDeepSpeedConfig(ds_config) if at_stage_3 else None
    try:
        with no_init_weights():
            model = construct(config, dtype=dtype, **options)
    except ValueError as error:  # its further lines list every class of transformers
        raise CheckpointError(
            f"{name}: transformers cannot build {model_class.__name__} for model type "
            f"{config.model_type!r} with these options: {str(error).splitlines()[0]} Choose a model of a family that "
            "has this class, or another --model.attn-implementation."
        ) from error
    del partitioning
    if model_class is AutoModelForSequenceClassification and not hasattr(model, "score"):
        raise CheckpointError(
            f"{name}: {type(model).__name__} (model type {config.model_type!r}) has no 'score' head, which critics "
            "need: it is an encoder, or has a head of its own. Choose a model of a decoder family, such as Llama, Qwen "
            "or GPT-2"
        )
    model.tie_weights()  # the block above skips it
    return model


def _tolerances(model: PreTrainedModel, rlhf_training: bool, num_layers: int | None) -> dict[str, Any]:
    """Returns the accepted differences between file and model, for `match_weights`."""
    ignored = [OLD_BUFFERS, *map(re.compile, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]

    def may_be_unexpected(key: str) -> bool:
        number = re.search(r"(?:^|\.)(\d+)\.", key)  # of the layer: the first integer in the name
        is_cut_off = num_layers is not None and number is not None and int(number[1]) >= num_layers
        return key.startswith(OUTPUT_LAYERS) or is_cut_off or any(pattern.search(key) for pattern in ignored)

    return {
        "prefix": f"{model.base_model_prefix}.",
        "may_be_missing": lambda name: name == HEAD_NAME and not rlhf_training,
        "may_be_unexpected": may_be_unexpected,
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
    head_bias: float = 0.0,
) -> Critic:
    """Builds a `Critic` around the family's sequence-classification model.

    See `create_hf_model` for the arguments, and `Critic` for ``num_padding_at_beginning``, ``prefix_tree`` and
    ``head_bias``.

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
    return Critic(model, num_padding_at_beginning, prefix_tree=prefix_tree, head_bias=head_bias)


def learned_positions(model: PreTrainedModel) -> int | None:
    """Returns the number of learned positions, the maximum length of a sequence; None if positions are computed."""
    tokens = model.get_input_embeddings()
    learned = any(isinstance(module, nn.Embedding) and module is not tokens for module in model.modules())
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) if learned else None


def validate_positions(model: PreTrainedModel, max_length: int) -> None:
    """Checks that a model has a position for every token of the longest sequence.

    Raises:
        CheckpointError: The model has learned fewer positions.
    """
    maximum = learned_positions(model)
    intended = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if maximum is None and intended is not None and max_length > intended:
        logger.warning(
            "encoding.max_length=%d is above the %d positions that the model was made for; longer texts may get "
            "meaningless scores",
            max_length,
            intended,
        )
    if maximum is not None and max_length > maximum:
        raise CheckpointError(
            f"encoding.max_length is {max_length}, but the model has learned {maximum} positions: choose a max_length "
            f"of at most {maximum}"
        )


def limit_training(critic: Critic, options: ModelConfig, seed: int) -> None:
    """Adds adapters and freezes layers in place, according to the options.

    Raises:
        CheckpointError: The model has fewer layers than should be frozen.
        ConfigError: See `rlhf_critic.model.lora.add_adapters`.
    """
    if options.lora_rank:
        add_adapters(critic.model, options, seed)
    if options.freeze_layers:  # after the adapters, so that those of frozen layers are frozen too
        freeze_first_layers(critic, options.freeze_layers)


def freeze_first_layers(backbone: Backbone, number: int) -> None:
    """Freezes the embeddings and the first layers of a model's body.

    Raises:
        CheckpointError: The body has fewer layers.
    """
    body = backbone.model.base_model
    available = backbone.model.config.get_text_config().num_hidden_layers
    stacks = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == available]
    if number > available or not stacks:
        raise CheckpointError(f"model.freeze_layers is {number}, but the model has {available} layers")
    embeddings = [module for module in body.modules() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *stacks[0][:number]):
        module.requires_grad_(False)


def init_head(weight_1D: nn.Parameter, how: HeadInit, seed: int) -> None:
    """Initialises a scalar head in place, identically on all ranks under ZeRO-3.

    ``normal`` is N(0, 1 / sqrt(d + 1)), Ziegler et al., "Fine-tuning language models from human preferences" (2019).
    ``zero`` gives every text the initial reward 0.
    """
    with torch.no_grad(), gathered(weight_1D, modify=True):
        if is_writer(weight_1D):
            normal_1D = torch.randn(weight_1D.shape, generator=torch.Generator().manual_seed(seed))
            deviation = (weight_1D.shape[-1] + 1) ** -0.5
            weight_1D.copy_(normal_1D * deviation) if how == "normal" else weight_1D.zero_()


def _vocabulary_names(model: PreTrainedModel) -> set[str]:
    """Returns the names of the tensors that have a row for each token id."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if module in (embedding, output)
        for parameter, tensor in module.named_parameters(recurse=False)
        if full_shape(tensor)[0] == model.config.get_text_config().vocab_size
    }


def _dtype_of(ds_config: dict[str, Any]) -> torch.dtype:
    if ds_config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if ds_config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32
