"""A critic directory on disk: its contents, its card, and how it is saved, verified and loaded.

A critic directory is a Hugging Face model directory (weights named as in the family's ``*ForSequenceClassification``
class, in safetensors) plus ``critic.json``. A training checkpoint is a critic directory with a ``resume`` folder and a
manifest of every file. Knows nothing about optimizers, Ray or how a critic is trained.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json
from transformers import PreTrainedModel

from rlhf_critic.algorithms.head_posterior import HeadPosterior
from rlhf_critic.checkpoint.interchange import write_for_other_readers
from rlhf_critic.checkpoint.posterior_file import POSTERIOR_NAME, read_posterior
from rlhf_critic.config.model import SpecialTokensInText
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import FileRecord, file_blocks, read_manifests, read_text, verify_files, write_text_atomically
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import HEAD_NAME, check_critic_model, create_critic_model
from rlhf_critic.model.hf_config import load_config
from rlhf_critic.model.weights import WeightReader, save_weights

CARD_NAME = "critic.json"
RESUME_FOLDER = "resume"
FORMAT_VERSION = 3  # of critic.json; raise it when an older reader would misread the file


class EncoderCard(BaseModel):
    """The encoder's entry in ``critic.json``; the tokenizer's own files are in the same directory.

    See `rlhf_critic.data.encoding.Encoder`. The defaults are those of critics that were saved before the options.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    fingerprint: str
    max_length: int
    special_tokens_in_text: SpecialTokensInText = "token"
    ignored_end_id: int | None = None

    @classmethod
    def of(cls, encoder: Encoder) -> EncoderCard:
        """Describes an encoder."""
        return cls(
            fingerprint=encoder.fingerprint,
            max_length=encoder.max_length,
            special_tokens_in_text=encoder.special_tokens_in_text,
            ignored_end_id=encoder.ignored_end_id,
        )


class CriticCard(BaseModel):
    """The contents of ``critic.json``.

    Attributes:
        format_version: Version of this file's format.
        version: Name of these weights, for example ``run@step``.
        encoder: Fingerprint and limits of the encoder.
        num_padding_at_beginning: See `rlhf_critic.model.critic.Critic`.
        reward_mean: Mean reward of the reference responses, None if it was not measured.
        reward_std: Standard deviation of their rewards.
        reward_reference: Description of the reference responses.
        training: Options, step, data and evaluation of the training run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int = Field(FORMAT_VERSION, ge=1)
    version: str
    encoder: EncoderCard
    num_padding_at_beginning: int = 0
    reward_mean: float | None = None
    reward_std: float | None = None
    reward_reference: str | None = None
    training: dict[str, Any] = {}

    def normalize(self, rewards_S: NDArray[np.floating]) -> NDArray[np.floating]:
        """Scales rewards so that the reference responses have mean 0 and standard deviation 1.

        Ziegler et al., "Fine-tuning language models from human preferences" (2019), normalise a trained reward model
        in this way. Rewards are normalised only on request.

        Raises:
            CheckpointError: The mean and standard deviation were not measured, or all rewards were the same.
        """
        mean, std = self.reward_scale()
        return (rewards_S - mean) / std

    def reward_scale(self) -> tuple[float, float]:
        """Returns the mean and standard deviation that `normalize` needs; see there for the errors."""
        if self.reward_mean is None or not self.reward_std:
            raise CheckpointError(
                f"the critic {self.version} has no reward mean and standard deviation to normalise by: train it with "
                "--data.validation, or with --train.reference train; or use its rewards without --normalize"
            )
        return self.reward_mean, self.reward_std


@dataclass(frozen=True)
class LoadedCritic:
    """A critic with its encoder and card, and the posterior of its head if it is calibrated."""

    critic: Critic
    encoder: Encoder
    card: CriticCard
    posterior: HeadPosterior | None = None


@dataclass(frozen=True)
class OpenedCritic:
    """A critic with its card and encoder, whose weights are not read yet.

    Attributes:
        directory: Directory with the config.
        card: The card.
        encoder: The encoder.
        reader: Reader of the weights, under the names of the family's ``*ForSequenceClassification`` class.
        dtype: Dtype of the weights.
        head_bias: See `rlhf_critic.model.critic.ScalarHead`.
    """

    directory: str
    card: CriticCard
    encoder: Encoder
    reader: WeightReader
    dtype: torch.dtype | None
    head_bias: float = 0.0

    def named(self, version: str) -> OpenedCritic:
        """Returns the same critic with another version in its card."""
        return replace(self, card=self.card.model_copy(update={"version": version}))

    def build(self, ds_config: dict[str, Any] | None = None, dtype: torch.dtype | None = None) -> Critic:
        """Builds the critic and reads its weights; see `rlhf_critic.model.factory.create_critic_model`.

        ``dtype`` is that of the parameters, by default that of the weights.

        Raises:
            CheckpointError: The weights do not match the config.
        """
        return create_critic_model(
            self.directory,
            self.encoder.tokenizer,
            ds_config,
            self.card.num_padding_at_beginning,
            rlhf_training=True,
            disable_dropout=True,
            dtype=dtype or self.dtype,
            weights=self.reader,
            head_bias=self.head_bias,
        )

    def load(self, dtype: torch.dtype | None = None) -> LoadedCritic:
        """Builds the critic in this process, in evaluation mode. See `build`."""
        posterior = self.posterior()  # before `build`, which takes the weights
        return LoadedCritic(self.build(dtype=dtype).eval(), self.encoder, self.card, posterior)

    def posterior(self) -> HeadPosterior | None:
        """Reads the posterior of the head, if the critic is calibrated.

        Raises:
            CheckpointError: See `rlhf_critic.checkpoint.posterior_file.read_posterior`.
        """
        return read_posterior(self.directory, self.reader)

    def check(self) -> PreTrainedModel:
        """Checks the weights against the config, and the head's numbers. Returns the model on the meta device.

        Raises:
            CheckpointError: The weights do not match the config, or the head is NaN or infinite.
        """
        model = check_critic_model(self.directory, self.encoder.tokenizer, weights=self.reader)
        if HEAD_NAME not in self.reader.names:
            raise CheckpointError(f"{self.directory}: no {HEAD_NAME}: the weights are those of another kind of model")
        if not torch.isfinite(self.reader.read(HEAD_NAME)).all():
            raise CheckpointError(
                f"{self.directory}: the head ({HEAD_NAME}) is NaN or infinite: export another checkpoint"
            )
        return model


def save_critic(
    directory: str | Path, critic: Critic, encoder: Encoder, card: CriticCard, is_main: bool = True
) -> None:
    """Writes a critic directory. ``critic.json`` is written last, so an interrupted directory is not a critic.

    Under ZeRO-3 all ranks must call; only the one with ``is_main`` writes.

    Raises:
        CheckpointError: The model and the encoder have different pad tokens, or the head has a bias.
    """
    directory = Path(directory)
    if bias := critic.model.score.bias:
        raise CheckpointError(
            f"the critic's head has a bias of {bias:g}, and a critic directory has none: convert its "
            "source with rlhf-critic export SOURCE OUT --head-bias reward-mean, which keeps the bias in the card"
        )
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
    write_for_other_readers(directory)
    write_text_atomically(directory / CARD_NAME, card.model_dump_json(indent=2))


def read_card(directory: str | Path) -> CriticCard:
    """Reads ``critic.json``, of this format version or an older one.

    Raises:
        CheckpointError: The file is missing (the directory is not a critic, or writing it was interrupted), is not
            valid, or was written by a newer version.
    """
    path = Path(directory) / CARD_NAME
    try:
        content = from_json(read_text(path))
        version = content.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: written by a newer version of rlhf-critic (format {version}, this version reads up to "
                f"{FORMAT_VERSION}): upgrade rlhf-critic"
            )
        return CriticCard.model_validate(content)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no {CARD_NAME}: not a critic directory, or writing it was interrupted. Convert another "
            "system's reward model with rlhf-critic export DIRECTORY OUT"
        ) from error
    except (OSError, ValueError, AttributeError) as error:  # pydantic's errors are ValueErrors
        raise CheckpointError(f"{path}: not a valid critic card: {error}") from error


def open_critic(directory: str | Path, *, verify: bool = True) -> OpenedCritic:
    """Opens a critic directory. It compares the files with their manifests, unless the caller did: ``verify=False``.

    Raises:
        CheckpointError: The directory is incomplete or damaged, or its tokenizer is not the one it was trained with.
    """
    if verify:
        verify_critic(directory)
    card = read_card(directory)
    encoder = load_encoder(directory, card)
    reader = WeightReader(str(directory), safetensors_only=True)
    return OpenedCritic(str(directory), card, encoder, reader, load_config(str(directory)).dtype)


def load_critic(directory: str | Path, *, verify: bool = True) -> LoadedCritic:
    """Loads a critic directory in this process, in the dtype it was saved in and in evaluation mode.

    Raises:
        CheckpointError: See `open_critic`.
    """
    return open_critic(directory, verify=verify).load()


def check_critic(directory: str | Path) -> tuple[CriticCard, str]:
    """Checks a critic directory without loading its body, so that a machine too small for the model can do it.

    It returns the card and the `weights_hash`.

    Raises:
        CheckpointError: A file is missing or damaged, the weights are not safetensors or do not match the config, the
            tokenizer is not the one the critic was trained with, or the head is NaN or infinite.
    """
    hashed = weights_hash(directory)
    opened = open_critic(directory, verify=False)
    opened.check()
    return opened.card, hashed


def weights_hash(directory: str | Path, *, safetensors_only: bool = True) -> str:
    """Verifies a model directory and returns a SHA-256 over its weights, config, card and posterior, if any.

    The hash tells two critics of the same name apart. It is made from the manifest's checksums where they are SHA-256,
    so that each file is read once. Otherwise it is made from the files themselves. ``safetensors_only`` rejects pickled
    weights, which a base model may have.

    Raises:
        CheckpointError: The directory has no weights, or a file is damaged or unreadable.
    """
    directory = Path(directory)
    records = verify_critic(directory)
    weights = WeightReader(str(directory), safetensors_only=safetensors_only).files
    beside = (directory / CARD_NAME, directory / "config.json", directory / POSTERIOR_NAME)
    files = [*(path for path in beside if path.is_file()), *weights]
    found = [records.get(os.path.relpath(path, directory)) for path in files]
    checksums = [record.checksum for record in found if record and isinstance(record.checksum, str)]
    if len(checksums) == len(files):
        lines = [f"{path.name} {checksum}\n" for path, checksum in zip(files, checksums, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    hashed = hashlib.sha256()
    try:
        for path in files:
            hashed.update(f"{path.name} {path.stat().st_size}\n".encode())
            for block in file_blocks(path):
                hashed.update(block)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}; restore the file, or export the critic again"
        ) from error
    return hashed.hexdigest()


def load_encoder(directory: str | Path, card: CriticCard) -> Encoder:
    """Loads the encoder of a critic directory.

    Raises:
        CheckpointError: Its fingerprint differs from the card's.
    """
    tokenizer = load_tokenizer(str(directory), keeps_template=True)
    saved = card.encoder
    encoder = Encoder(tokenizer, saved.max_length, saved.special_tokens_in_text, saved.ignored_end_id)
    if encoder.fingerprint != card.encoder.fingerprint:
        raise CheckpointError(
            f"{directory}: the tokenizer or chat template is not the one this critic was trained with: fingerprint "
            f"{encoder.fingerprint[:12]}, expected {card.encoder.fingerprint[:12]} ({CARD_NAME}). Restore the "
            "tokenizer files, or train the critic again with the new ones."
        )
    return encoder


def verify_critic(directory: str | Path) -> dict[str, FileRecord]:
    """Compares the files that scoring reads with the manifests, if any, and returns their records.

    Raises:
        CheckpointError: A manifest is damaged, or a file is missing, truncated or changed.
    """
    records = read_manifests(directory)
    scored = {name: records[name] for name in records if not name.startswith(f"{RESUME_FOLDER}/")}
    verify_files(directory, scored)
    return scored
