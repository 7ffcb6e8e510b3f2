"""A critic directory on disk: what is in it, how it is written whole, checked and exported.

A critic directory is a Hugging Face model directory (the family's own ``*ForSequenceClassification`` names, in
safetensors) plus ``critic.json``. A training checkpoint is a critic directory with a ``resume`` folder and a manifest
of every file. Knows nothing of optimizers, Ray or how a critic is fitted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import _manifests, _read_manifest, _verify_files, write_text_atomically
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import HEAD_NAME, check_critic_model, create_critic_model
from rlhf_critic.model.hf_config import load_config
from rlhf_critic.model.weights import WeightReader, save_weights

CARD_NAME = "critic.json"
RESUME_FOLDER = "resume"


class EncoderCard(BaseModel):
    """What ``critic.json`` says of the encoder; the tokenizer itself lies beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    fingerprint: str
    max_length: int


class CriticCard(BaseModel):
    """The contents of ``critic.json``.

    Attributes:
        format_version: Of this file.
        version: Names these weights, for example ``run@step``.
        encoder: How texts become ids.
        num_padding_at_beginning: See `rlhf_critic.model.critic.Critic`.
        reward_mean: Mean reward of the reference responses, None where it was not measured.
        reward_std: Their standard deviation.
        reward_reference: Which responses those are, in words.
        training: How it was fitted: options, step, data, evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: Literal[1] = 1
    version: str
    encoder: EncoderCard
    num_padding_at_beginning: int = 0
    reward_mean: float | None = None
    reward_std: float | None = None
    reward_reference: str | None = None
    training: dict[str, Any] = {}

    def normalize(self, rewards_S: NDArray[np.floating]) -> NDArray[np.floating]:
        """Rewards on the scale on which the reference responses have mean 0 and standard deviation 1.

        As Ziegler et al., "Fine-tuning language models from human preferences" (2019), normalise a fitted reward
        model. Rewards are never normalised unless this is asked for.

        Raises:
            CheckpointError: The mean and standard deviation were not measured, or all rewards were the same.
        """
        mean, std = self.reward_scale()
        return (rewards_S - mean) / std

    def reward_scale(self) -> tuple[float, float]:
        """The mean and standard deviation that `normalize` needs.

        Raises:
            CheckpointError: They were not measured, or all rewards were the same.
        """
        if self.reward_mean is None or not self.reward_std:
            raise CheckpointError(
                f"the critic {self.version} has no reward mean and standard deviation to normalise by: fit it with "
                "--data.validation, or with --train.reference train; or use its rewards as they are"
            )
        return self.reward_mean, self.reward_std


@dataclass(frozen=True)
class LoadedCritic:
    """A critic with all that is needed to score a text."""

    critic: Critic
    encoder: Encoder
    card: CriticCard


def save_critic(
    directory: str | Path, critic: Critic, encoder: Encoder, card: CriticCard, is_main: bool = True
) -> None:
    """Writes a critic directory. ``critic.json`` comes last: without it the directory is not a critic.

    Under ZeRO-3 all ranks must call; only the one with ``is_main`` writes.

    Raises:
        CheckpointError: The pad token could end a sequence.
    """
    directory = Path(directory)
    config, pad_token_id = critic.model.config, encoder.tokenizer.pad_token_id
    if config.pad_token_id != pad_token_id:
        raise CheckpointError(
            f"the model's pad_token_id is {config.pad_token_id}, the tokenizer's {pad_token_id}; build the "
            "critic with the tokenizer of its encoder"
        )
    if is_main:
        directory.mkdir(parents=True, exist_ok=True)
    save_weights(critic.model, directory, is_main)
    if not is_main:
        return
    config = type(config).from_dict(config.to_dict())
    config.architectures = [type(critic.model).__name__]
    config.dtype = next(critic.model.parameters()).dtype
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.save_pretrained(directory)
    encoder.save(directory)
    write_text_atomically(directory / CARD_NAME, card.model_dump_json(indent=2))


def read_card(directory: str | Path) -> CriticCard:
    """Reads ``critic.json``.

    Raises:
        CheckpointError: It is missing (the directory is not a critic, or was not written to its end) or not valid.
    """
    path = Path(directory) / CARD_NAME
    try:
        return CriticCard.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no {CARD_NAME}: not a critic directory, or one that was not written to its end"
        ) from error
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{path}: not a valid critic card: {error}") from error


def load_critic(directory: str | Path) -> LoadedCritic:
    """Loads a critic directory on this process, in the dtype it was saved in and in evaluation mode.

    Raises:
        CheckpointError: The directory is incomplete or damaged, or its tokenizer is not the one it was fitted with.
    """
    verify_critic(directory)
    card = read_card(directory)
    encoder = load_encoder(directory, card)
    critic = create_critic_model(
        str(directory),
        encoder.tokenizer,
        None,
        card.num_padding_at_beginning,
        rlhf_training=True,
        disable_dropout=True,
        dtype=load_config(str(directory)).dtype,
        weights=WeightReader(str(directory), safetensors_only=True),
    )
    return LoadedCritic(critic.eval(), encoder, card)


def check_critic(directory: str | Path) -> CriticCard:
    """Checks a critic directory without loading its body: what can be known of it on a machine that is too small.

    Raises:
        CheckpointError: A file is missing or damaged, the weights are no safetensors or do not fit the config, the
            tokenizer is not the one it was fitted with, or the head is NaN or infinite.
    """
    verify_critic(directory)
    card = read_card(directory)
    encoder = load_encoder(directory, card)
    reader = WeightReader(str(directory), safetensors_only=True)
    check_critic_model(str(directory), encoder.tokenizer)
    if HEAD_NAME not in reader.names:
        raise CheckpointError(f"{directory}: no {HEAD_NAME}: the weights are those of another kind of model")
    if not torch.isfinite(reader.read(HEAD_NAME)).all():
        raise CheckpointError(f"{directory}: the head ({HEAD_NAME}) is NaN or infinite: export another checkpoint")
    return card


def weights_digest(directory: str | Path, *, safetensors_only: bool = True) -> str:
    """A SHA-256 over a model's weights, its config and, of a critic, its card: two of one name are told apart by it.

    Args:
        directory: A model's directory.
        safetensors_only: Whether a pickle is refused, as where a critic is loaded; a base model may be one.

    Raises:
        CheckpointError: The directory has no weights, or a file is damaged or cannot be read.
    """
    directory = Path(directory)
    weights = WeightReader(str(directory), safetensors_only=safetensors_only).files
    files = [*(path for name in (CARD_NAME, "config.json") if (path := directory / name).is_file()), *weights]
    digest = hashlib.sha256()
    try:
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}; restore the file, or export the critic again"
        ) from error
    return digest.hexdigest()


def load_encoder(directory: str | Path, card: CriticCard) -> Encoder:
    """Loads the encoder of a critic directory.

    Raises:
        CheckpointError: Its fingerprint differs from the card's.
    """
    encoder = Encoder(load_tokenizer(str(directory)), card.encoder.max_length)
    if encoder.fingerprint != card.encoder.fingerprint:
        raise CheckpointError(
            f"{directory}: the tokenizer or chat template is not the one this critic was fitted with: fingerprint "
            f"{encoder.fingerprint[:12]}, {CARD_NAME} says {card.encoder.fingerprint[:12]}. Restore the tokenizer "
            "files, or fit the critic again with the new ones."
        )
    return encoder


def verify_critic(directory: str | Path) -> None:
    """Checks what scoring reads (all but the state that a run resumes from) against the manifests, where there are any.

    Raises:
        CheckpointError: A manifest is damaged, or a file is missing, cut short or changed.
    """
    directory = Path(directory)
    for manifest in _manifests(directory)[0]:
        files = _read_manifest(manifest)
        _verify_files(directory, {name: files[name] for name in files if not name.startswith(f"{RESUME_FOLDER}/")})
