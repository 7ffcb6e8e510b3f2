"""Conversion of other systems' reward models to critic directories: mostly a table of their weights' names.

All of them are a transformer and a linear head, read at the last token before the padding. On the same token ids, the
critic's reward is therefore the other system's score. If the source pads with the token that ends its texts (EOS), it
reads the score before that token, so the converted encoding leaves the token out.

Sources of the names: DeepSpeed-Chat (``reward_model.py``, also in an older, misspelt form), trlx
(``examples/summarize_rlhf/reward_model``), Cong Chen's "Reward Modeling Practice" (``modeling_llama_rw.py``, the
article), and the ``*ForSequenceClassification`` classes of transformers, which TRL and OpenRLHF train. Knows nothing
about how those systems were trained, nor about their state for resuming.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_critic.checkpoint.critic_directory import CARD_NAME, CriticCard, EncoderCard, OpenedCritic, save_critic
from rlhf_critic.checkpoint.export import add_auto_map
from rlhf_critic.config.model import (
    ARTICLE_TEMPLATE_NAME,
    AUTO_TEMPLATE,
    OPENRLHF_PLAIN_TEMPLATE_NAME,
    OPENRLHF_TEMPLATE_NAME,
    PLAIN_TEMPLATE_NAME,
)
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.templates import without_trailing
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_directory
from rlhf_critic.model.factory import HEAD_NAME, check_critic_model, learned_positions, validate_positions
from rlhf_critic.model.hf_config import load_config
from rlhf_critic.model.weights import WeightReader

logger = logging.getLogger(__name__)

AUTO_FORMAT = "auto"
NATIVE_FORMAT = "native"
DEFAULT_MAX_LENGTH = 1024
# Texts whose ends show whether an encoding ends with a token.
PROBES = (("please explain", " of course"), ("", "no."))
NO_LIMIT = 10**9  # a tokenizer without a limit has a larger model_max_length
HeadBias: TypeAlias = Literal["refuse", "reward-mean", "keep"]


@dataclass(frozen=True)
class Format:
    """A system's names of weights, and its encoding.

    Attributes:
        backbones: Prefixes of the transformer's weights; a file uses one.
        head: Name of the scalar head.
        chat_template: Name of the template that encodes texts as the system does.
        pads_with_eos: Whether the system pads with EOS, whatever the config says.
    """

    backbones: tuple[str, ...]
    head: str
    chat_template: str = PLAIN_TEMPLATE_NAME
    pads_with_eos: bool = False

    def fits(self, keys: Sequence[str]) -> bool:
        """Returns whether the keys of a file have these names."""
        return f"{self.head}.weight" in keys and any(key.startswith(self.backbones) for key in keys)

    def native_name(self, key: str) -> str:
        """Returns a key's name in transformers; keys of the backbone lose their prefix, which the loader adds."""
        for prefix in self.backbones:
            if key.startswith(prefix):
                return key.removeprefix(prefix)
        return re.sub(rf"^{self.head}\.", "score.", key)

    def __str__(self) -> str:
        backbones = " or ".join(f"{prefix}*" for prefix in self.backbones)
        return f"{backbones} and {self.head}.weight"


# DeepSpeed-Chat's names come before trlx's, which have the same head.
FORMATS = {
    "deepspeed-chat": Format(("rwtransformer.", "rwtranrsformer."), "v_head", pads_with_eos=True),
    "trlx": Format(("transformer.",), "v_head", pads_with_eos=True),
    "article": Format(("model.", "transformer."), "value_head", ARTICLE_TEMPLATE_NAME),
    NATIVE_FORMAT: Format(("",), "score", AUTO_TEMPLATE),
}


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    source_format: str = AUTO_FORMAT,
    *,
    base: str | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    head_bias: HeadBias = "refuse",
    auto_map: bool = False,
) -> CriticCard:
    """Converts another system's checkpoint to a critic directory, atomically, and returns the critic's card.

    ``out`` must not exist. With ``auto_map``, a modeling file is added. See `open_foreign` for the other arguments.

    Raises:
        CheckpointError: See `open_foreign`; or ``out`` exists.
        EncodingError: The tokenizer or template cannot be used.
    """
    opened = open_foreign(
        source, source_format, base=base, max_length=max_length, chat_template=chat_template, head_bias=head_bias
    )
    with atomic_directory(out) as building:
        save_critic(building, opened.build(), opened.encoder, opened.card)
        if auto_map:
            add_auto_map(building)
    return opened.card


def open_foreign(
    source: str | Path,
    source_format: str = AUTO_FORMAT,
    *,
    base: str | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    head_bias: HeadBias = "refuse",
    safetensors_only: bool = False,
) -> OpenedCritic:
    """Opens another system's checkpoint as a critic, in memory. `convert_checkpoint` saves what this opens.

    The critic keeps the dtype of the weights. If OpenRLHF wrote the scores' mean and standard deviation into
    ``config.json``, they become the card's ``reward_mean`` and ``reward_std``.

    Args:
        source: A directory with weights. ``base`` provides the config and the tokenizer if it lacks them.
        source_format: A key of `FORMATS`, or ``auto`` to detect the format.
        base: The base model, a directory or hub id.
        max_length: Maximum length of the encoder in tokens. Default: the native model's own limit, and 1024 for the
            other formats, or the number of learned positions if less.
        chat_template: See `rlhf_critic.data.encoding.load_tokenizer`. Default: that of the format, and ``openrlhf`` for
            models of OpenRLHF. A token at the end of texts that the source reads as padding is left out.
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
    reader = WeightReader(str(source), safetensors_only=safetensors_only)
    source_format = detect_format(reader, source_format)
    reader.rename(FORMATS[source_format].native_name)
    bias = _pop_head_bias(reader, head_bias)

    # DeepSpeed-Chat saves the vocabulary only. A tokenizer loads from that, but with another BOS, EOS and pad token.
    of_tokenizer = _directory_with(source, "tokenizer_config.json", "tokenizer", base)
    config = _directory_with(source, "config.json", "config", base)
    source_config = load_config(config)
    reads_end = hasattr(source_config, "value_head_prefix")  # OpenRLHF's scores are read at the last token, EOS or not
    if chat_template is None:
        chat_template = OPENRLHF_TEMPLATE_NAME if reads_end else FORMATS[source_format].chat_template
    tokenizer = load_tokenizer(of_tokenizer, chat_template)
    if not reads_end and chat_template not in (OPENRLHF_TEMPLATE_NAME, OPENRLHF_PLAIN_TEMPLATE_NAME):
        pad = getattr(source_config.get_text_config(), "pad_token_id", None)
        pad = tokenizer.eos_token_id if FORMATS[source_format].pads_with_eos else pad
        _leave_out_padding(source, tokenizer, pad)
    model = check_critic_model(config, tokenizer, weights=reader)
    if max_length is None:
        max_length = _own_limit(tokenizer, model) if source_format == NATIVE_FORMAT else DEFAULT_MAX_LENGTH
        max_length = min(max_length, learned_positions(model) or max_length)
    validate_positions(model, max_length)
    encoder = Encoder(tokenizer, max_length)
    mean, std = (_statistic(source, model.config, name) for name in ("mean", "std"))
    reference = None if mean is None else "from the source's config.json, chosen by the system that trained it"
    if bias and head_bias != "keep":
        reference = reference or "none: reward_mean is the reward of a text that the source scores 0"
        mean = (mean or 0.0) - bias
    card = CriticCard(
        version=f"{source.resolve().name}@{source_format}",
        encoder=EncoderCard.of(encoder),
        reward_mean=mean,
        reward_std=std,
        reward_reference=reference,
        training={"converted_from": source_format, **({"head_bias": bias} if bias else {})},
    )
    return OpenedCritic(config, card, encoder, reader, _dtype_of(reader), bias if head_bias == "keep" else 0.0)


def detect_format(reader: WeightReader, expected: str = AUTO_FORMAT) -> str:
    """Returns the name of the format that the weights' names match.

    Raises:
        CheckpointError: They match another format than the expected one, or no known format.
    """
    for name, known in FORMATS.items():
        if expected in (AUTO_FORMAT, name) and known.fits(reader.names):
            return name
    found = ", ".join(sorted({f"{key.split('.')[0]}.*" for key in reader.names})) or "no weights at all"
    wanted = "; ".join(f"{name}: {known}" for name, known in FORMATS.items() if expected in (AUTO_FORMAT, name))
    raise CheckpointError(
        f"{reader.source}: no {CARD_NAME}: not a critic directory, or writing it was interrupted; and the "
        f"names of its weights ({found}) do not match --from {expected} ({wanted}). Use another --from, or, if this "
        "is a base model, train a critic on preferences first: python -m jobs.train"
    )


def _leave_out_padding(source: Path, tokenizer: PreTrainedTokenizerBase, pad_token_id: int | None) -> None:
    """Changes the chat template so that no text ends with the source's pad token, if its texts do.

    The source takes that token for padding and reads the score before it. A critic reads its reward at the last token.

    Raises:
        CheckpointError: Without the token at the end, the other ids would change.
    """

    def ids_of_probes() -> list[list[int]]:
        encoder = Encoder(tokenizer, DEFAULT_MAX_LENGTH)
        return encoder.tokenize([encoder.render(*probe) for probe in PROBES])

    if pad_token_id is None or pad_token_id == tokenizer.pad_token_id:  # an encoder rejects texts that end with its pad
        return
    before, template = ids_of_probes(), tokenizer.chat_template
    if not any(ids[-1] == pad_token_id for ids in before):
        return
    token = tokenizer.convert_ids_to_tokens(pad_token_id)
    if pad_token_id in tokenizer.added_tokens_decoder:  # others may join with the characters beside them
        tokenizer.chat_template = without_trailing(template, token)
    for ids, shorter in zip(before, ids_of_probes(), strict=True):
        while ids[-1] == pad_token_id:
            ids.pop()
        if ids != shorter:
            raise CheckpointError(
                f"{source}: config.json: pad_token_id: the token {token!r} ends the texts of this chat template and is "
                "the pad token of the source, which reads its score before it, and leaving it out changes other "
                "tokens: pass a --chat-template without it"
            )
    logger.warning(
        "encoding_changed left_out=%r reason=%s",
        token,
        "it is the source's pad token, so the source reads its score before it; the scores stay equal",
    )


def _pop_head_bias(reader: WeightReader, head_bias: HeadBias) -> float:
    """Checks that the head has one output, removes its bias from the weights and returns it (0 if there is none)."""
    head_shape = reader.shape(HEAD_NAME)
    if len(head_shape) != 2 or head_shape[0] != 1:
        raise CheckpointError(
            f"{reader.source}: the head's weight has shape {tuple(head_shape)}, with {head_shape[0]} outputs (labels), "
            "expected 1: use a model that was trained with num_labels=1"
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
