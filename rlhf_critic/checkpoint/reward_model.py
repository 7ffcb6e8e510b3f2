"""Opening of any reward model for scoring: a critic directory, or a sequence-classification model of another system.

Another system's model is opened by the conversion of `rlhf_critic.checkpoint.convert`, in memory. It has no
``critic.json`` that tells how its texts were encoded. The encoding is then assumed: it is logged and is part of the
model's version. Knows nothing about where a directory comes from, or how scores are used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from rlhf_critic.checkpoint.convert import FORMATS, NATIVE_FORMAT, ignored_end_of, open_foreign, open_weights
from rlhf_critic.checkpoint.critic_directory import (
    CARD_NAME,
    RESUME_FOLDER,
    OpenedCritic,
    open_critic,
    read_card,
    verify_critic,
    weights_hash,
)
from rlhf_critic.config.model import AssumedEncoding
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.model.factory import HEAD_NAME
from rlhf_critic.model.hf_config import load_config
from rlhf_critic.model.weights import WeightReader

logger = logging.getLogger(__name__)

NATIVE_CLASS = "ForSequenceClassification"
UNKNOWN_CLASS = "this model"


@dataclass(frozen=True)
class VerifiedModel:
    """A reward model whose files were verified, and a SHA-256 of everything that decides its scores."""

    opened: OpenedCritic
    digest: str


def is_critic_directory(directory: str | Path) -> bool:
    """Returns whether this project wrote the directory. An incomplete checkpoint of a run has no card, but a state."""
    return any((Path(directory) / name).exists() for name in (CARD_NAME, RESUME_FOLDER))


def open_reward_model(
    directory: str | Path, name: str, encoding: AssumedEncoding | None = None, *, verify: bool = True
) -> OpenedCritic:
    """Opens a critic directory, or a sequence-classification model with one output.

    Args:
        directory: The directory.
        name: Path, URI or hub id by which the user knows it.
        encoding: Encoding of a model that has no ``critic.json``.
        verify: Whether to compare the files with their manifests, if any.

    Raises:
        CheckpointError: The directory is incomplete or damaged, or the model has no head with one linear output.
        ConfigError: An encoding is given for a critic of this project, whose card has it.
        EncodingError: The tokenizer or template cannot be used.
    """
    encoding = encoding or AssumedEncoding()
    given = [option for option, value in encoding.model_dump().items() if value is not None]
    if is_critic_directory(directory):
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')} is for a reward model without {CARD_NAME}, and {name} is a critic of "
                "this project, whose encoding is part of it: leave the option out"
            )
        return open_critic(directory, verify=verify)
    if verify:
        verify_critic(directory)
    opened = _open_native(Path(directory), name, encoding)
    chat_template = opened.card.training["chat_template"]
    version = f"{Path(name).name}@assumed-{chat_template}-{opened.encoder.max_length}"
    logger.info(
        "assumed encoding of a reward model without %s: checkpoint=%s chat_template=%s max_length=%d ending=%r "
        "ignored_at_the_end=%s head_bias=%g; change it with --chat-template and --max-length",
        CARD_NAME,
        name,
        chat_template,
        opened.encoder.max_length,
        opened.encoder.ending,
        opened.encoder.ignored_end_id,
        opened.head_bias,
    )
    return opened.named(version)


def ignored_end_at_start(model: str) -> int | None:
    """Returns the token that a critic must ignore at the end of texts if its training starts from this model.

    It is the one that the model ignores: a critic of this project, or a sequence-classification model of another
    system. A base model without a head has none, and neither has one that cannot be read, whose errors come later.
    """
    try:
        if (Path(model) / CARD_NAME).is_file():
            return read_card(model).encoder.ignored_end_id
        ignored = ignored_end_of(load_config(model))
        return ignored if ignored is not None and HEAD_NAME in WeightReader(model).names else None
    except CheckpointError:
        return None


def verify_reward_model(directory: str | Path, name: str, encoding: AssumedEncoding | None = None) -> VerifiedModel:
    """Verifies the files of a reward model, reading each once, and opens it. See `open_reward_model` for the errors."""
    hashed = weights_hash(directory)
    opened = open_reward_model(directory, name, encoding, verify=False)
    if not is_critic_directory(directory):  # no card, which would hold the fingerprint of the encoding
        hashed = hashlib.sha256(f"{hashed}{opened.encoder.fingerprint}".encode()).hexdigest()
    return VerifiedModel(opened, hashed)


def check_reward_model(directory: str | Path, name: str, encoding: AssumedEncoding | None = None) -> VerifiedModel:
    """Checks a reward model without loading its body, so that a machine too small for the model can do it.

    Raises:
        CheckpointError: See `open_reward_model` and `rlhf_critic.checkpoint.critic_directory.check_critic`.
    """
    verified = verify_reward_model(directory, name, encoding)
    verified.opened.check()
    return verified


def _open_native(directory: Path, name: str, encoding: AssumedEncoding) -> OpenedCritic:
    """Opens a sequence-classification model.

    Raises:
        CheckpointError: The weights have the names of another format, which must be converted, or are damaged; or the
            model has another kind of head.
    """
    reader = open_weights(directory, safetensors_only=True)
    fitting = next((known for known, names in FORMATS.items() if names.fits(reader)), None)
    if fitting not in (None, NATIVE_FORMAT):
        raise CheckpointError(
            f"{name}: no {CARD_NAME}, and weights in the format {fitting}, whose texts have an encoding of their own: "
            f"convert it first, with rlhf-critic export {name} OUT --from {fitting}"
        )
    kind = _architecture(directory)
    if fitting is None:
        others = sorted({key.split(".")[0] for key in reader.names})
        raise CheckpointError(
            f"{name}: no {CARD_NAME}: not a critic directory, or writing it was interrupted; and {kind} cannot be "
            f"scored, because it has no {HEAD_NAME} (its weights: {', '.join(f'{other}.*' for other in others)}). A "
            "reward model needs one linear head with one output. Train a base model on preferences: rlhf-critic train"
        )
    if kind != UNKNOWN_CLASS and not kind.endswith(NATIVE_CLASS):
        raise CheckpointError(
            f"{name}: {kind} cannot be scored, because it is not a *{NATIVE_CLASS} class and may compute its scores in "
            f"another way. If its head is one linear layer, convert it: rlhf-critic export {name} OUT"
        )
    try:
        return open_foreign(directory, NATIVE_FORMAT, head_bias="keep", safetensors_only=True, **encoding.model_dump())
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {kind} cannot be scored: {error}") from error


def _architecture(directory: Path) -> str:
    """Returns the name of a model's class, as far as its config tells."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        names = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    except (OSError, ValueError, AttributeError):
        return UNKNOWN_CLASS
    return next((name for name in names if name.endswith(NATIVE_CLASS)), names[0] if names else UNKNOWN_CLASS)
