"""Conversion of other systems' reward models to critic directories: mostly a table of their weights' names.

All of them are a transformer and a linear head, read at the last token before the padding. On the same token ids, the
critic's reward is therefore the other system's score. If the source pads with the token that ends its texts (EOS), it
reads the score before that token, so the converted encoding leaves the token out.

Sources of the names: DeepSpeed-Chat (``reward_model.py``, also in an older, misspelt form), trlx
(``examples/summarize_rlhf/reward_model``), Cong Chen's "Reward Modeling Practice" (``modeling_llama_rw.py``, the
article), TRL until 2026 (``modeling_value_head.py``), and the ``*ForSequenceClassification`` and
``*ForTokenClassification`` classes of transformers, which TRL and OpenRLHF train. Knows nothing about how those systems
were trained, nor about their state for resuming.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_critic.checkpoint.adapters import merged_model
from rlhf_critic.checkpoint.critic_directory import CARD_NAME, CriticCard, EncoderCard, OpenedCritic, save_critic
from rlhf_critic.checkpoint.export import add_auto_map
from rlhf_critic.config.model import (
    ARTICLE_TEMPLATE_NAME,
    AUTO_TEMPLATE,
    OPENRLHF_PLAIN_TEMPLATE_NAME,
    OPENRLHF_TEMPLATE_NAME,
    PLAIN_TEMPLATE_NAME,
    TemplateDate,
)
from rlhf_critic.data.encoding import Encoder, leave_out_at_end, load_tokenizer
from rlhf_critic.data.templates import template_name
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_directory
from rlhf_critic.model.factory import HEAD_FILES, HEAD_NAME, check_critic_model, learned_positions, validate_positions
from rlhf_critic.model.hf_config import load_config
from rlhf_critic.model.weights import WeightReader

AUTO_FORMAT = "auto"
NATIVE_FORMAT = "native"
TWO_LABELS_FORMAT = "two-labels"
DEFAULT_MAX_LENGTH = 1024
NO_LIMIT = 10**9  # a tokenizer without a limit has a larger model_max_length
HeadBias: TypeAlias = Literal["refuse", "reward-mean", "keep"]
# Which tokens at the end of a text a system takes for padding: its config's pad token, EOS whatever the config says, or
# none, because it finds the end by the attention mask.
Padding: TypeAlias = Literal["config", "eos", "mask"]
OPENRLHF_FIELDS = ("value_head_prefix", "normalize_reward")  # it adds the first to its last checkpoint only
OPENRLHF_CLASSES = ("RewardModel", "CriticModel")


@dataclass(frozen=True)
class Format:
    """A system's names of weights, and its encoding.

    Attributes:
        backbones: Prefixes of the transformer's weights; a file uses one.
        head: Name of the scalar head.
        chat_template: Name of the template that encodes texts as the system does.
        padding: Tokens at the end of a text that the system takes for padding.
        labels: Number of outputs of the head. The reward of two is the second minus the first: the log-odds of its
            softmax.
        head_file: Whether the head is in a file of its own.
    """

    backbones: tuple[str, ...]
    head: str
    chat_template: str = PLAIN_TEMPLATE_NAME
    padding: Padding = "config"
    labels: int = 1
    head_file: bool = False

    def fits(self, reader: WeightReader) -> bool:
        """Returns whether the weights have these names."""
        keys = reader.names
        has_head_file = any(path.name in HEAD_FILES for path in reader.files)
        has_names = f"{self.head}.weight" in keys and any(key.startswith(self.backbones) for key in keys)
        return has_names and (has_head_file or not self.head_file)

    def native_name(self, key: str) -> str:
        """Returns a key's name in transformers; keys of the backbone lose their prefix, which the loader adds."""
        if key.startswith(f"{self.head}."):
            return f"score.{key.removeprefix(f'{self.head}.')}"
        return key.removeprefix(next((prefix for prefix in self.backbones if key.startswith(prefix)), ""))

    def __str__(self) -> str:
        backbones = " or ".join(f"{prefix}*" for prefix in self.backbones)
        return f"{backbones} and {self.head}.weight" + (f" with {self.labels} outputs" if self.labels > 1 else "")


# DeepSpeed-Chat's names come before trlx's, which have the same head.
FORMATS = {
    "deepspeed-chat": Format(("rwtransformer.", "rwtranrsformer."), "v_head", padding="eos"),
    "trlx": Format(("transformer.",), "v_head", padding="eos"),
    "article": Format(("model.", "transformer."), "value_head", ARTICLE_TEMPLATE_NAME),
    "openrlhf-critic": Format(("",), "value_head", OPENRLHF_TEMPLATE_NAME),
    "llama-factory": Format(("",), "v_head.summary", AUTO_TEMPLATE, padding="mask", head_file=True),
    "trl-value-head": Format(("",), "v_head.summary", AUTO_TEMPLATE, padding="mask"),
    NATIVE_FORMAT: Format(("",), "score", AUTO_TEMPLATE),
    TWO_LABELS_FORMAT: Format(("",), "score", AUTO_TEMPLATE, padding="mask", labels=2),
}


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    source_format: str = AUTO_FORMAT,
    *,
    name: str = "",
    base: str | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    template_date: TemplateDate | None = None,
    head_bias: HeadBias = "refuse",
    auto_map: bool = False,
) -> CriticCard:
    """Converts another system's checkpoint to a critic directory, atomically, and returns the critic's card.

    ``out`` must not exist. A directory of peft's adapters is merged into ``base`` first, in memory and in a temporary
    directory. With ``auto_map``, a modeling file is added. See `open_foreign` for the other arguments.

    Raises:
        CheckpointError: See `open_foreign` and `rlhf_critic.checkpoint.adapters.merged_model`; or ``out`` exists.
        ConfigError: The source has adapters, and peft is missing.
        EncodingError: The tokenizer or template cannot be used.
    """
    with merged_model(source, base) as (model, base_of_model), atomic_directory(out) as building:
        opened = open_foreign(
            model,
            source_format,
            name=name,
            base=base_of_model,
            max_length=max_length,
            chat_template=chat_template,
            template_date=template_date,
            head_bias=head_bias,
        )
        save_critic(building, opened.build(), opened.encoder, opened.card)
        if auto_map:
            add_auto_map(building)
    return opened.card


def open_foreign(
    source: str | Path,
    source_format: str = AUTO_FORMAT,
    *,
    name: str = "",
    base: str | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    template_date: TemplateDate | None = None,
    head_bias: HeadBias = "refuse",
    safetensors_only: bool = False,
) -> OpenedCritic:
    """Opens another system's checkpoint as a critic, in memory. `convert_checkpoint` saves what this opens.

    The critic keeps the dtype of the weights. If OpenRLHF wrote the scores' mean and standard deviation into
    ``config.json``, they become the card's ``reward_mean`` and ``reward_std``.

    Args:
        source: A directory with weights. ``base`` provides the config and the tokenizer if it lacks them.
        source_format: A key of `FORMATS`, or ``auto`` to detect the format.
        name: Name of the model in the critic's version. Default: that of the directory.
        base: The base model, a directory or hub id.
        max_length: Maximum length of the encoder in tokens. Default: the native model's own limit, and 1024 for the
            other formats, or the number of learned positions if less.
        chat_template: See `rlhf_critic.data.encoding.load_tokenizer`. Default: that of the format, and ``openrlhf`` for
            models of OpenRLHF. A token at the end of texts that the source takes for padding is ignored; see
            `rlhf_critic.data.encoding.leave_out_at_end`.
        template_date: See `rlhf_critic.data.encoding.load_tokenizer`; None is ``fixed``.
        head_bias: Treatment of a head bias that is not 0, which a critic's head cannot have. ``refuse`` raises.
            ``reward-mean`` records it in the card: ``training["head_bias"]`` is the bias, and ``reward_mean`` is the
            mean that the source measured (0 if none) minus the bias. The source's score is then
            ``reward + training["head_bias"]``, which is ``reward - reward_mean`` if no mean was measured. ``keep``
            adds it to every reward, as long as the critic is in memory: it cannot be saved.
        safetensors_only: Whether to reject weights in pickle files.

    Raises:
        CheckpointError: The weights are damaged, have no known format, do not match the config, or have a bias that is
            rejected; or the config or tokenizer is missing.
        EncodingError: The tokenizer or template cannot be used.
    """
    source = Path(source)
    reader = open_weights(source, safetensors_only=safetensors_only)
    is_detected = source_format == AUTO_FORMAT
    source_format = detect_format(reader, source_format)
    labels = FORMATS[source_format].labels
    reader.rename(FORMATS[source_format].native_name)
    if labels == 2:
        _subtract_labels(reader)
    bias = _pop_head_bias(reader, head_bias)

    # DeepSpeed-Chat saves the vocabulary only. A tokenizer loads from that, but with another BOS, EOS and pad token.
    of_tokenizer = _directory_with(source, "tokenizer_config.json", "tokenizer", base)
    config = _directory_with(source, "config.json", "config", base)
    source_config = load_config(config)
    if is_detected and source_format == "article" and is_of_openrlhf(source_config):  # the names are the same
        source_format = "openrlhf-critic"
    if chat_template is None:
        of_openrlhf = is_of_openrlhf(source_config)
        chat_template = OPENRLHF_TEMPLATE_NAME if of_openrlhf else FORMATS[source_format].chat_template
    tokenizer = load_tokenizer(of_tokenizer, chat_template, template_date=template_date or "fixed")
    chosen_template = template_name(chat_template, tokenizer)
    padding = FORMATS[source_format].padding
    if chat_template in (OPENRLHF_TEMPLATE_NAME, OPENRLHF_PLAIN_TEMPLATE_NAME):
        padding = "mask"
    pad_token_id = tokenizer.eos_token_id if padding == "eos" else ignored_end_of(source_config)
    ignored_end_id = leave_out_at_end(tokenizer, None if padding == "mask" else pad_token_id)
    model = check_critic_model(config, tokenizer, weights=reader)
    if max_length is None:
        is_native = source_format in (NATIVE_FORMAT, TWO_LABELS_FORMAT)
        max_length = _own_limit(tokenizer, model) if is_native else DEFAULT_MAX_LENGTH
        max_length = min(max_length, learned_positions(model) or max_length)
    validate_positions(model, max_length)
    encoder = Encoder(tokenizer, max_length, ignored_end_id=ignored_end_id)
    mean, std = (_statistic(source, model.config, name) for name in ("mean", "std"))
    reference = None if mean is None else "from the source's config.json, chosen by the system that trained it"
    if bias and head_bias != "keep":
        reference = reference or "none: reward_mean is the reward of a text that the source scores 0"
        mean = (mean or 0.0) - bias
    card = CriticCard(
        version=f"{name or source.resolve().name}@{source_format}",
        encoder=EncoderCard.of(encoder),
        reward_mean=mean,
        reward_std=std,
        reward_reference=reference,
        training={
            "converted_from": source_format,
            "chat_template": chosen_template,
            **({"head_bias": bias} if bias else {}),
        },
    )
    return OpenedCritic(config, card, encoder, reader, _dtype_of(reader), bias if head_bias == "keep" else 0.0)


def open_weights(source: Path, *, safetensors_only: bool = False) -> WeightReader:
    """Opens the weights of another system's checkpoint, with those of a head in a file of its own.

    Raises:
        CheckpointError: There are no weights, or a file is damaged.
    """
    reader = WeightReader(str(source), safetensors_only=safetensors_only)
    any(reader.add_if_there(name) for name in HEAD_FILES)
    return reader


def is_of_openrlhf(config: PreTrainedConfig) -> bool:
    """Returns whether OpenRLHF saved a model. It reads scores at the last token, even if it pads with that token."""
    names_class = any(name in OPENRLHF_CLASSES for name in config.architectures or [])
    return names_class or any(hasattr(config, field) for field in OPENRLHF_FIELDS)


def ignored_end_of(config: PreTrainedConfig) -> int | None:
    """Returns the pad token of a sequence-classification model, before which it reads its score; None if it has none.

    A model of OpenRLHF has none in this sense.
    """
    return None if is_of_openrlhf(config) else getattr(config.get_text_config(), "pad_token_id", None)


def detect_format(reader: WeightReader, expected: str = AUTO_FORMAT) -> str:
    """Returns the name of the format that the weights' names match.

    Raises:
        CheckpointError: They match another format than the expected one, or no known format.
    """
    for name, known in FORMATS.items():
        if expected in (AUTO_FORMAT, name) and known.fits(reader):
            return name
    found = ", ".join(sorted({f"{key.split('.')[0]}.*" for key in reader.names})) or "no weights at all"
    wanted = "; ".join(f"{name}: {known}" for name, known in FORMATS.items() if expected in (AUTO_FORMAT, name))
    raise CheckpointError(
        f"{reader.source}: no {CARD_NAME}: not a critic directory, or writing it was interrupted; and the "
        f"names of its weights ({found}) do not match --from {expected} ({wanted}). Use another --from, or, if this "
        "is a base model, train a critic on preferences first: rlhf-critic train"
    )


def _subtract_labels(reader: WeightReader) -> None:
    """Replaces a head with two outputs by the difference, the second minus the first.

    A difference of two linear heads is one, and the sigmoid of it is the second probability of the softmax.
    """
    shape = tuple(reader.shape(HEAD_NAME))
    if len(shape) != 2 or shape[0] != 2:
        raise CheckpointError(
            f"{reader.source}: the head's weight has shape {shape}, but --from {TWO_LABELS_FORMAT} is for two outputs"
        )
    names = [HEAD_NAME, *(name for name in ("score.bias",) if name in reader.names)]
    for name in names:
        first, second = reader.read(name).split(1)
        reader.replace(name, second - first)


def _pop_head_bias(reader: WeightReader, head_bias: HeadBias) -> float:
    """Checks that the head has one output, removes its bias from the weights and returns it (0 if there is none)."""
    head_shape = reader.shape(HEAD_NAME)
    if len(head_shape) != 2 or head_shape[0] != 1:
        raise CheckpointError(
            f"{reader.source}: the head's weight has shape {tuple(head_shape)}, with {head_shape[0]} outputs (labels), "
            "expected 1: use a model that was trained with num_labels=1, or give --from two-labels for one that "
            "tells good (label 1) from bad (label 0), such as a process reward model"
        )
    if "score.bias" not in reader.names:
        return 0.0
    bias_1 = reader.pop("score.bias")
    if bias_1.numel() != 1 or not math.isfinite(bias := float(bias_1)):
        raise CheckpointError(f"{reader.source}: the head's bias is {bias_1.tolist()}, expected one finite number")
    if bias and head_bias == "refuse":
        raise CheckpointError(
            f"{reader.source}: the head has a bias of {bias:g}, and a critic's head has none: its rewards would be "
            f"this model's scores minus {bias:g}, which does not change comparisons. Accept this with --head-bias "
            f"reward-mean, which records it in {CARD_NAME}: reward + training.head_bias is this model's score"
        )
    return bias


def _directory_with(source: Path, file: str, what: str, base: str | None) -> str:
    """Returns the directory or hub id to load the config or tokenizer from: the checkpoint, else the base model."""
    if (source / file).is_file():
        return str(source)
    if base is None:
        raise CheckpointError(
            f"{source}: no {file}, so its {what} is unknown: give the model it was trained from, --base BASE_MODEL"
        )
    return base


def _dtype_of(reader: WeightReader) -> torch.dtype:
    """Returns the smallest dtype that holds every matrix of the file. Configs often name the base model's dtype."""
    dtypes = (reader.dtype(name) for name in reader.names if len(reader.shape(name)) == 2)
    return functools.reduce(torch.promote_types, (dtype for dtype in dtypes if dtype.is_floating_point))


def _own_limit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Returns the longest sequence that a model's tokenizer and config allow, 1024 if they name no limit."""
    limits = (tokenizer.model_max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    known = [int(limit) for limit in limits if limit and limit < NO_LIMIT]
    return min(known, default=DEFAULT_MAX_LENGTH)


def _statistic(source: Path, config: PreTrainedConfig, name: str) -> float | None:
    """Returns the mean or standard deviation of the scores, if OpenRLHF recorded it."""
    value = getattr(config, name, None)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and (not is_number or (name == "std" and value <= 0)):
        raise CheckpointError(f"{source / 'config.json'}: {name}: {value!r} is not valid; fix or remove it")
    return value
