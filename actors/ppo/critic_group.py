"""The online critic of PPO: ranks of a `CriticEngine` in Ray actors, and the handle of all ranks.

A group starts from a trained critic, or from a base model (such as the policy's) with a head of zeros, so that every
value is 0 at first. Knows nothing about policies, rewards or how rollouts are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from actors.ppo.engine_group import (
    EngineGroup,
    Sequences,
    only_lengths,
    put_numbers,
    received,
    send,
    validate_token_ids,
)
from actors.runtime.rank_group import Rank
from rlhf_critic.algorithms.ppo_losses import LossMean
from rlhf_critic.algorithms.response_tokens import Masks, validate_rollouts
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import CARD_NAME, CriticCard, EncoderCard, load_encoder, read_card
from rlhf_critic.checkpoint.reward_model import ignored_end_at_start
from rlhf_critic.config.model import EncodingConfig, ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, create_encoder
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import verify_manifest
from rlhf_critic.training.critic_engine import CriticEngine, ValueMetrics
from rlhf_critic.training.offload import Offloaded

OPTIONS = "critic_group"  # key of a group's options in critic.json, from which `CriticGroup.restore` makes another


@dataclass(frozen=True)
class CriticOptions:
    """Options of a critic group.

    Attributes:
        model: Options of the model; ``path`` is a critic directory, or a base model whose critic starts with a head of
            zeros.
        train: Options of the optimizer and its sharding; options about preferences are not used.
        encoding: Encoding of a base model; a critic directory has its own.
        total_steps: Updates of the whole run, at which the learning rate schedule ends.
    """

    model: ModelConfig
    train: TrainConfig
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    total_steps: int = 1

    @property
    def is_trained(self) -> bool:
        """Whether the critic starts from a trained one."""
        return (Path(self.model.path) / CARD_NAME).is_file()

    def encoder(self) -> Encoder:
        """Loads the encoder of the critic.

        Raises:
            CriticError: The tokenizer or the critic's card cannot be loaded.
        """
        if self.is_trained:
            return load_encoder(self.model.path, read_card(self.model.path))
        return create_encoder(self.model.path, self.encoding, ignored_end_at_start(self.model.path))


@dataclass(frozen=True)
class CriticState:
    """State of a critic group.

    Attributes:
        step: Updates done.
        world_size: Number of shards.
        zero_stage: ZeRO stage of DeepSpeed.
        offloaded_bytes: Bytes that are offloaded from the devices, over all shards.
    """

    step: int
    world_size: int
    zero_stage: int
    offloaded_bytes: int


OPTIONS_FORMAT = TypeAdapter(CriticOptions)


class CriticRank(Rank):
    """One rank of a critic in training. Every method is called on all ranks at once; the first rank answers."""

    _offloaded: Offloaded | None = None

    def build(self, options: CriticOptions) -> None:
        """Builds this rank's shard."""
        self._options, self._encoder = options, options.encoder()
        model = options.model if options.is_trained else options.model.model_copy(update={"head_init": "zero"})
        self._engine = CriticEngine.from_pretrained(
            self._encoder, model, options.train, options.total_steps, rlhf_training=options.is_trained
        )

    def values(
        self, columns: Sequence[Sequence[TokenIds]], rows: Sequence[int] | None
    ) -> tuple[list[NDArray[np.float32]], int]:
        """Computes the values at every token; returns them and the number of tokens that were computed."""
        engine, sequences = self._engine_on_device(), received(columns, rows)
        validate_token_ids(sequences, engine.critic.model)
        with torch.no_grad():
            values = engine.values(sequences)
        return values if self.rank == 0 else [], engine.computed_tokens

    def update(
        self,
        columns: Sequence[Sequence[TokenIds]],
        rows: Sequence[int] | None,
        numbers: dict[str, Any],
        options: dict[str, Any],
    ) -> ValueMetrics:
        """Takes one optimizer step; see `rlhf_critic.training.critic_engine.CriticEngine.update`."""
        engine, sequences = self._engine_on_device(), received(columns, rows)
        validate_token_ids(sequences, engine.critic.model)
        return engine.update(sequences, **numbers, **options)

    def save(self, directory: str, name: str) -> None:
        """Saves the critic; see `rlhf_critic.training.critic_engine.CriticEngine.save`."""
        engine, encoder = self._engine_on_device(), self._encoder
        card = CriticCard(
            # The step is read here, because another thread may take one between two calls of the group.
            version=f"{name}@{engine.step}",
            encoder=EncoderCard.of(encoder),
            training={"step": engine.step, OPTIONS: OPTIONS_FORMAT.dump_python(self._options, mode="json")},
        )
        engine.save(directory, encoder, card)

    def load(self, directory: str) -> None:
        """Loads a checkpoint; see `rlhf_critic.training.critic_engine.CriticEngine.load`."""
        self._engine_on_device().load(directory)

    def offload(self) -> int:
        """Offloads the state from the device; returns its bytes."""
        self._offloaded = self._offloaded or self._engine.training.offload()
        return self._offloaded.bytes

    def onload(self) -> None:
        """Loads the state back onto the device."""
        if self._offloaded is not None:
            self._offloaded.restore()
            self._offloaded = None

    def step(self) -> int:
        """Returns the number of updates done."""
        return self._engine.step

    def _engine_on_device(self) -> CriticEngine:
        # Checked here, where calls are sequential: the state may change between a caller's check and its call.
        if self._offloaded is not None:
            raise ValueError("the critic's state is offloaded: call onload() first")
        return self._engine


class CriticGroup(EngineGroup):
    """Handle of a critic in training; see `EngineGroup`. `restore` brings a lost group back from a checkpoint.

    Attributes:
        options: Options of the critic.
        encoder: Encoder of the critic.
        computed_tokens: Tokens that all shards together computed for the last `values`.
    """

    what = "critic"
    rank_class = CriticRank

    def __init__(self, options: CriticOptions, shards: int = 1, **placement: Any) -> None:
        self.options = options
        self.encoder = options.encoder()
        self.computed_tokens = 0
        self._offloaded_bytes = 0
        super().__init__(options, shards, **placement)

    @classmethod
    def restore(cls, checkpoint: str | Path, shards: int = 1, **placement: Any) -> CriticGroup:
        """Starts a group that resumes from what `save` wrote: weights, optimizer, schedule and step.

        Args:
            checkpoint: Directory of the checkpoint, reachable from every shard at this path.
            shards: Number of shards, which may differ from the one that saved.
            **placement: Keyword arguments of `EngineGroup`.

        Raises:
            CheckpointError: The checkpoint is incomplete, damaged or not a group's, or cannot be converted to another
                number of shards.
        """
        verify_manifest(checkpoint)
        recorded = read_card(checkpoint).training.get(OPTIONS)
        if recorded is None:
            raise CheckpointError(f"{checkpoint}: not a checkpoint of a critic group; start one from it instead")
        # Not the path it once started from: the weights are here.
        model = {**recorded["model"], "path": str(Path(checkpoint).resolve()), "num_layers": None}
        group = cls(OPTIONS_FORMAT.validate_python({**recorded, "model": model}), shards, **placement)
        try:
            group.load(checkpoint)
        except BaseException:
            group.shutdown()
            raise
        return group

    def values(self, sequences: Sequences) -> list[NDArray[np.float32]]:
        """Computes the value at every token of each sequence: ``S`` arrays, fp32, as long as the sequences.

        `rlhf_critic.algorithms.ppo.action_values` selects those of the response tokens.

        Raises:
            RankLost: A rank was lost.
            ValueError: There is no sequence, a sequence is empty or has a token id that the critic does not have, or
                the state is offloaded.
        """
        values, self.computed_tokens = self._call("compute values", CriticRank.values, *send(sequences))[0]
        return values

    def update(
        self,
        sequences: Sequences,
        prompt_lengths: Sequence[int],
        returns: Sequence[NDArray[np.floating]],
        old_values: Sequence[NDArray[np.floating]],
        *,
        clip: float | None = 0.2,
        masks: Masks | None = None,
        mean: LossMean = "token",
    ) -> ValueMetrics:
        """Takes one optimizer step on the clipped value loss, as `CriticEngine.update` does.

        Args:
            sequences: Token ids of prompt and response: a list of ``S``, or `actors.ppo.engine_group.SharedSequences`.
            prompt_lengths: Tokens of each prompt, at least 1.
            returns: Target values of the response tokens of every rollout, ``[R]``.
            old_values: Values of the response tokens when the rollouts were generated, ``[R]``.
            clip: Maximum change of a value from its old value; None does not clip.
            masks: True at the response tokens that the policy sampled, bool ``[R]`` each; None if it sampled all. The
                others, such as the output of a tool between two turns, are context: their numbers are not read.
            mean: Mean of the losses: over tokens, or over sequences.

        Raises:
            RankLost: A rank was lost. Whether the step was taken is unknown, so resume from a checkpoint.
            NonFiniteLossError: The loss is NaN or infinite; the group has ended.
            ValueError: Shapes do not fit, a number is not finite, the critic does not have a token id, all responses
                are empty, or the state is offloaded.
        """
        validate_rollouts(only_lengths(sequences), prompt_lengths, masks, returns=returns, old_values=old_values)
        numbers = put_numbers(prompt_lengths, masks, returns=returns, old_values=old_values)
        options = {"clip": clip, "mean": mean}
        return self._call("update the critic", CriticRank.update, *send(sequences), numbers, options)[0]

    def offload(self) -> int:
        """Offloads parameters, gradients and optimizer state from the devices until `onload`; returns their bytes.

        From GPUs they go to the memory of the CPUs, from CPUs to files.

        Raises:
            RankLost: A rank was lost.
        """
        self._offloaded_bytes = sum(self._call("offload", CriticRank.offload))
        return self._offloaded_bytes

    def onload(self) -> None:
        """Loads back what `offload` offloaded.

        Raises:
            RankLost: A rank was lost.
        """
        self._call("onload", CriticRank.onload)
        self._offloaded_bytes = 0

    def state(self) -> CriticState:
        """Returns the state of the group.

        Raises:
            RankLost: A rank was lost.
        """
        step = self._call("report their step", CriticRank.step)[0]
        return CriticState(step, len(self._ranks), self.options.train.zero_stage, self._offloaded_bytes)
