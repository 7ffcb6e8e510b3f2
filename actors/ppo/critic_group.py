"""The online critic of PPO: a `rlhf_critic.training.critic_engine.CriticEngine` whose ranks are Ray actors, and the handle of them all.

A group starts from a fitted critic, or from a base model (such as the policy's) with a head that is zero, so that every
value is 0 at first. `CriticGroup` is what a PPO loop calls: values, updates, checkpoints, and leaving the devices to
others between phases. Knows nothing of policies, rewards or how rollouts are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actors.runtime.rank_group import START_TIMEOUT_S, Rank, RankGroup, write_failures_told
from rlhf_critic.algorithms.response_tokens import validate_rollouts
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import CARD_NAME, CriticCard, EncoderCard, load_encoder, read_card
from rlhf_critic.config.model import EncodingConfig, ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import CheckpointError
from rlhf_critic.files import atomic_directory, verify_manifest, write_manifest
from rlhf_critic.training.critic_engine import CriticEngine, ValueMetrics
from rlhf_critic.training.offload import Offloaded

OPTIONS = "critic_group"  # the key of a group's options in critic.json, by which `CriticGroup.restore` makes another


@dataclass(frozen=True)
class CriticOptions:
    """What a critic group is made of.

    Attributes:
        model: ``path`` is a critic directory, or a base model whose critic starts with a head of zeros.
        train: The optimizer and how it is sharded; what is about preferences is not looked at.
        encoding: Of a base model; a critic directory has its own.
        total_steps: Updates of the whole run; the schedule of the learning rate ends there.
    """

    model: ModelConfig
    train: TrainConfig
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    total_steps: int = 1

    @property
    def is_fitted(self) -> bool:
        """Whether the critic starts from one that was fitted before."""
        return (Path(self.model.path) / CARD_NAME).is_file()

    def encoder(self) -> Encoder:
        """The encoder of the critic.

        Raises:
            CriticError: See `rlhf_critic.data.encoding.load_tokenizer` and `rlhf_critic.checkpoint.critic_directory.load_encoder`.
        """
        if self.is_fitted:
            return load_encoder(self.model.path, read_card(self.model.path))
        return Encoder(load_tokenizer(self.model.path, self.encoding.chat_template), self.encoding.max_length)


@dataclass(frozen=True)
class CriticState:
    """What a critic group is at.

    Attributes:
        step: Updates done.
        world_size: Shards.
        zero_stage: What DeepSpeed shards.
        offloaded_bytes: What has left the devices, over all shards.
    """

    step: int
    world_size: int
    zero_stage: int
    offloaded_bytes: int


class CriticShard(Rank):
    """One rank of a critic in training. Every method is called on all ranks at once; the first rank answers."""

    _offloaded: Offloaded | None = None

    def build(self, options: CriticOptions) -> None:
        """Builds this rank's shard."""
        self._options = options
        model = options.model if options.is_fitted else options.model.model_copy(update={"head_init": "zero"})
        self._encoder = options.encoder()
        self._engine = CriticEngine.from_pretrained(
            self._encoder, model, options.train, options.total_steps, rlhf_training=options.is_fitted
        )

    def values(self, sequences: Sequence[TokenIds]) -> tuple[list[NDArray[np.float32]], int] | None:
        """The values at every token, and how many tokens were computed for them."""
        engine = self._engine_at_hand()
        validate_token_ids(sequences, engine.critic.model)
        with torch.no_grad():
            values = engine.values(sequences)
        return (values, engine.computed_tokens) if self.rank == 0 else None

    def update(self, rollouts: dict[str, Any], clip: float | None) -> ValueMetrics:
        """See `rlhf_critic.training.critic_engine.CriticEngine.update`."""
        engine = self._engine_at_hand()
        validate_token_ids(rollouts["sequences"], engine.critic.model)
        return engine.update(**rollouts, clip=clip)

    def save(self, directory: str, name: str) -> None:
        """See `rlhf_critic.training.critic_engine.CriticEngine.save`."""
        engine, options = self._engine_at_hand(), self._options
        card = CriticCard(
            # The step is looked up here: between two calls of the group, another thread may take one.
            version=f"{name}@{engine.step}",
            encoder=EncoderCard(fingerprint=self._encoder.fingerprint, max_length=self._encoder.max_length),
            training={
                "step": engine.step,
                OPTIONS: {
                    "model": options.model.model_dump(mode="json"),
                    "train": options.train.model_dump(mode="json"),
                    "encoding": options.encoding.model_dump(mode="json"),
                    "total_steps": options.total_steps,
                },
            },
        )
        engine.save(directory, self._encoder, card)

    def load(self, directory: str) -> None:
        """See `rlhf_critic.training.critic_engine.CriticEngine.load`."""
        self._engine_at_hand().load(directory)

    def offload(self) -> int:
        """Takes the state out of the device; returns its bytes."""
        self._offloaded = self._offloaded or self._engine.training.offload()
        return self._offloaded.bytes

    def onload(self) -> None:
        """Brings it back."""
        if self._offloaded is not None:
            self._offloaded.restore()
            self._offloaded = None

    def step(self) -> int:
        """Updates done."""
        return self._engine.step

    def _engine_at_hand(self) -> CriticEngine:
        """The engine, with its state on the device.

        Raises:
            ValueError: The state is elsewhere. Known here, where calls come one after the other: what a thread knows
                before its call may have changed by the time it is made.
        """
        if self._offloaded is not None:
            raise ValueError("the critic's state is offloaded: call onload() first")
        return self._engine


def validate_token_ids(sequences: Sequence[TokenIds], model: PreTrainedModel) -> None:
    """Checks, on all ranks alike, that a model has an embedding for every token.

    Otherwise the lookup would fail on the one rank that makes it, and the group would end.

    Raises:
        ValueError: Names the first sequence of which it has not.
    """
    rows = model.config.get_text_config().vocab_size
    for index, ids in enumerate(sequences):
        if len(ids) and not 0 <= np.min(ids) <= np.max(ids) < rows:
            raise ValueError(
                f"sequence {index}: token ids from {np.min(ids)} to {np.max(ids)}, but the model has those from 0 to "
                f"{rows - 1}: encode it with the model's own tokenizer"
            )


class CriticGroup:
    """A critic in training, sharded over Ray actors; a context manager that ends them.

    Calls may come from several threads; they are made one after the other. When a shard is lost, the call that notices
    raises `RankLost`, the other shards are ended, and `restore` brings the group back from a checkpoint.

    Args:
        options: What the critic is.
        shards: Over how many actors it is sharded.
        cpus_per_shard: CPUs that Ray reserves for each; torch threads where there is no GPU.
        use_gpu: One GPU for each, and NCCL (not yet run on a GPU).
        start_timeout_s: How long to wait for room in the cluster, and for the shards to be built.
        call_timeout_s: How long a call may take.

    Attributes:
        encoder: How the critic reads texts.
        computed_tokens: Tokens that all shards together computed for the last `values`.

    Raises:
        CriticError: The critic cannot be built, or the cluster has no room for it; nothing is left running.
    """

    def __init__(
        self,
        options: CriticOptions,
        shards: int = 1,
        *,
        cpus_per_shard: float = 1.0,
        use_gpu: bool = False,
        start_timeout_s: float = START_TIMEOUT_S,
        call_timeout_s: float = 1800.0,
    ) -> None:
        self.options = options
        self.encoder = options.encoder()
        self.computed_tokens = 0
        self._offloaded_bytes = 0
        self._ranks = RankGroup(
            "critic",
            CriticShard,
            shards,
            cpus_per_rank=cpus_per_shard,
            use_gpu=use_gpu,
            start_timeout_s=start_timeout_s,
            call_timeout_s=call_timeout_s,
        )
        try:
            self._ranks.call_all("build the critic", "build", options, timeout_s=start_timeout_s)
        except BaseException:
            self.shutdown()
            raise

    @classmethod
    def restore(cls, checkpoint: str | Path, shards: int = 1, **placement: Any) -> CriticGroup:
        """A group that goes on from what `save` wrote: weights, optimizer, schedule and step.

        Args:
            checkpoint: Reachable from every shard under this path.
            shards: Any number, also another than when it was saved.
            **placement: The other arguments of the class.

        Raises:
            CheckpointError: It is not whole or not a group's, or cannot be converted to another number of shards.
        """
        verify_manifest(checkpoint)
        recorded = read_card(checkpoint).training.get(OPTIONS)
        if recorded is None:
            raise CheckpointError(f"{checkpoint}: not a checkpoint of a critic group; start one from it instead")
        encoding = EncodingConfig(**recorded["encoding"])
        options = CriticOptions(
            # Not the path it once started from: the weights are here.
            ModelConfig(**{**recorded["model"], "path": str(Path(checkpoint).resolve()), "num_layers": None}),
            TrainConfig(**recorded["train"]),
            encoding,
            recorded["total_steps"],
        )
        group = cls(options, shards, **placement)
        try:
            group.load(checkpoint)
        except BaseException:
            group.shutdown()
            raise
        return group

    def values(self, sequences: Sequence[TokenIds]) -> list[NDArray[np.float32]]:
        """The value at every token of each sequence: ``S`` arrays, fp32, as long as the sequences.

        `rlhf_critic.algorithms.ppo.action_values` takes from them those of the actions.

        Raises:
            RankLost: A shard was lost.
            ValueError: There is no sequence, an empty one, or one with a token that the critic does not have; or the
                state is offloaded.
        """
        arrays = ray.put([np.asarray(ids, dtype=np.int64) for ids in sequences])
        values, self.computed_tokens = self._ranks.call_all("compute values", "values", arrays)[0]
        return list(values)

    def update(
        self,
        sequences: Sequence[TokenIds],
        prompt_lengths: Sequence[int],
        returns: Sequence[NDArray[np.floating]],
        old_values: Sequence[NDArray[np.floating]],
        *,
        clip: float | None = 0.2,
    ) -> ValueMetrics:
        """Takes one optimizer step on the clipped value loss; see `rlhf_critic.training.critic_engine.CriticEngine.update`.

        Raises:
            RankLost: A shard was lost; whether the step was taken is unknown, so go on from a checkpoint.
            NonFiniteLossError: The loss is NaN or infinite; the group has ended.
            ValueError: Shapes do not fit, a number is not finite, a token is none that the critic has, or no rollout
                has an action; or the state is offloaded.
        """
        validate_rollouts(sequences, prompt_lengths, returns=returns, old_values=old_values)
        rollouts = ray.put(
            {
                "sequences": [np.asarray(ids, dtype=np.int64) for ids in sequences],
                "prompt_lengths": [int(length) for length in prompt_lengths],
                "returns": [np.asarray(numbers, dtype=np.float32) for numbers in returns],
                "old_values": [np.asarray(numbers, dtype=np.float32) for numbers in old_values],
            }
        )
        metrics: ValueMetrics = self._ranks.call_all("update the critic", "update", rollouts, clip)[0]
        return metrics

    def save(self, directory: str | Path, name: str = "critic") -> None:
        """Writes a critic directory that can be served, evaluated and exported, with what `restore` needs.

        Args:
            directory: One that does not exist yet, reachable from every shard under this path; it appears whole.
            name: Of the critic; its version is ``NAME@STEP``.

        Raises:
            RankLost: A shard was lost.
            CheckpointError: The directory is there already, or cannot be written, which ends the group.
            ValueError: The state is offloaded.
        """
        with atomic_directory(directory) as building, write_failures_told():
            self._ranks.call_all("save the critic", "save", str(building.resolve()), name)
            write_manifest(building, 0, 1)

    def load(self, checkpoint: str | Path) -> None:
        """Goes on from what `save` wrote with the same options and any number of shards.

        Raises:
            RankLost: A shard was lost.
            CheckpointError: It is not whole, or was saved with another ZeRO stage.
            ValueError: The state is offloaded.
        """
        verify_manifest(checkpoint)
        self._ranks.call_all("load the critic", "load", str(Path(checkpoint).resolve()))

    def offload(self) -> int:
        """Takes parameters, gradients and optimizer state out of the devices until `onload`.

        From GPUs they go to the memory of the CPUs (not yet run on a GPU), from CPUs to files.

        Returns:
            Bytes that left, over all shards.

        Raises:
            RankLost: A shard was lost.
        """
        self._offloaded_bytes = sum(self._ranks.call_all("offload", "offload"))
        return self._offloaded_bytes

    def onload(self) -> None:
        """Brings back what `offload` took away.

        Raises:
            RankLost: A shard was lost.
        """
        self._ranks.call_all("onload", "onload")
        self._offloaded_bytes = 0

    def state(self) -> CriticState:
        """What the group is at.

        Raises:
            RankLost: A shard was lost.
        """
        step = self._ranks.call_all("tell their step", "step")[0]
        return CriticState(step, len(self._ranks), self.options.train.zero_stage, self._offloaded_bytes)

    def shutdown(self) -> None:
        """Ends the shards and gives back what they had reserved; may be called again."""
        self._ranks.close()

    def __enter__(self) -> CriticGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
