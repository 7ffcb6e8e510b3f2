"""The policy of PPO in training, with its frozen reference: Ray actors that each host a rank, and the handle of them.

The counterpart of `actors.ppo.critic_group`. Knows nothing of rewards, values or how rollouts are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from actors.ppo.critic_group import validate_token_ids
from actors.runtime.rank_group import START_TIMEOUT_S, Rank, RankGroup, write_failures_told
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.files import atomic_directory, verify_manifest, write_manifest
from rlhf_critic.training.policy_engine import PolicyEngine, PolicyMetrics


@dataclass(frozen=True)
class PolicyOptions:
    """What a policy is made of.

    Attributes:
        model: The base model, which is the reference too.
        optimizer: The optimizer and how it is sharded.
        chat_template: How the policy reads prompts; see `rlhf_critic.data.encoding.load_tokenizer`.
        total_steps: Updates of the whole run; the schedule of the learning rate ends there.
        seed: Of dropout, if any.
        temperature: With which tokens are drawn.
    """

    model: BodyConfig
    optimizer: OptimizerConfig
    chat_template: str
    total_steps: int
    seed: int
    temperature: float

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer.

        Raises:
            EncodingError: See `rlhf_critic.data.encoding.load_tokenizer`.
        """
        return load_tokenizer(self.model.path, self.chat_template)


@dataclass(frozen=True)
class PolicyWeights:
    """A state of the policy that rollout workers load.

    Attributes:
        version: Updates done.
        tensors: A reference to the weights by name; in a tuple, so that Ray hands it on instead of fetching them.
    """

    version: int
    tensors: tuple[ray.ObjectRef]


class PolicyShard(Rank):
    """One rank of a policy in training. Every method is called on all ranks at once; the first rank answers."""

    def build(self, options: PolicyOptions) -> None:
        """Builds this rank's shard."""
        self._engine = PolicyEngine(
            options.tokenizer(),
            options.model,
            options.optimizer,
            options.total_steps,
            options.seed,
            options.temperature,
        )

    def reference_log_probs(
        self, sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]
    ) -> list[NDArray[np.float32]] | None:
        """See `rlhf_critic.training.policy_engine.PolicyEngine.reference_log_probs`."""
        validate_token_ids(sequences, self._engine.policy.model)
        log_probs = self._engine.reference_log_probs(sequences, prompt_lengths)
        return log_probs if self.rank == 0 else None

    def update(self, rollouts: dict[str, Any], clip: float, entropy_coefficient: float) -> PolicyMetrics:
        """See `rlhf_critic.training.policy_engine.PolicyEngine.update`."""
        validate_token_ids(rollouts["sequences"], self._engine.policy.model)
        return self._engine.update(**rollouts, clip=clip, entropy_coefficient=entropy_coefficient)

    def weights(self) -> PolicyWeights | None:
        """The weights, in the object store."""
        tensors = self._engine.weights()
        return PolicyWeights(self._engine.step, (ray.put(tensors),)) if self.rank == 0 else None

    def save(self, directory: str) -> None:
        """See `rlhf_critic.training.policy_engine.PolicyEngine.save`."""
        self._engine.save(directory)

    def load(self, directory: str) -> None:
        """See `rlhf_critic.training.policy_engine.PolicyEngine.load`."""
        self._engine.load(directory)


class PolicyGroup:
    """A policy in training, sharded over Ray actors; a context manager that ends them.

    Args:
        options: What the policy is.
        shards: Over how many actors it is sharded.
        cpus_per_shard: CPUs that Ray reserves for each; torch threads where there is no GPU.
        use_gpu: One GPU for each, and NCCL (not yet run on a GPU).
        start_timeout_s: How long to wait for room in the cluster, and for the shards to be built.
        call_timeout_s: How long a call may take.

    Raises:
        CriticError: The policy cannot be built, or the cluster has no room for it; nothing is left running.
    """

    def __init__(
        self,
        options: PolicyOptions,
        shards: int = 1,
        *,
        cpus_per_shard: float = 1.0,
        use_gpu: bool = False,
        start_timeout_s: float = START_TIMEOUT_S,
        call_timeout_s: float = 1800.0,
    ) -> None:
        self._ranks = RankGroup(
            "policy",
            PolicyShard,
            shards,
            cpus_per_rank=cpus_per_shard,
            use_gpu=use_gpu,
            start_timeout_s=start_timeout_s,
            call_timeout_s=call_timeout_s,
        )
        try:
            self._ranks.call_all("build the policy", "build", options, timeout_s=start_timeout_s)
        except BaseException:
            self.shutdown()
            raise

    def reference_log_probs(
        self, sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """The log-probability of every action under the frozen reference: ``S`` arrays, fp32 ``[R]``, in nats.

        Raises:
            RankLost: A shard was lost.
            ValueError: A prompt is empty or longer than its sequence, or a token is none that the policy has.
        """
        arrays = ray.put([np.asarray(ids, dtype=np.int64) for ids in sequences])
        log_probs = self._ranks.call_all(
            "compute reference log-probabilities", "reference_log_probs", arrays, list(prompt_lengths)
        )[0]
        return list(log_probs)

    def update(
        self,
        sequences: Sequence[TokenIds],
        prompt_lengths: Sequence[int],
        old_log_probs: Sequence[NDArray[np.floating]],
        advantages: Sequence[NDArray[np.floating]],
        *,
        clip: float = 0.2,
        entropy_coefficient: float = 0.0,
    ) -> PolicyMetrics:
        """Takes one optimizer step; see `rlhf_critic.training.policy_engine.PolicyEngine.update`.

        Raises:
            RankLost: A shard was lost; whether the step was taken is unknown, so go on from a checkpoint.
            NonFiniteLossError: The loss is NaN or infinite; the group has ended.
            ValueError: Shapes do not fit, a number is not finite, a token is none that the policy has, or no rollout
                has an action.
        """
        rollouts = ray.put(
            {
                "sequences": [np.asarray(ids, dtype=np.int64) for ids in sequences],
                "prompt_lengths": [int(length) for length in prompt_lengths],
                "old_log_probs": [np.asarray(numbers, dtype=np.float32) for numbers in old_log_probs],
                "advantages": [np.asarray(numbers, dtype=np.float32) for numbers in advantages],
            }
        )
        metrics: PolicyMetrics = self._ranks.call_all(
            "update the policy", "update", rollouts, clip, entropy_coefficient
        )[0]
        return metrics

    def weights(self) -> PolicyWeights:
        """The policy's weights as they are now, for rollout workers.

        Raises:
            RankLost: A shard was lost.
        """
        weights: PolicyWeights = self._ranks.call_all("gather the policy's weights", "weights")[0]
        return weights

    def save(self, directory: str | Path) -> None:
        """Writes a Hugging Face model directory with what `load` needs.

        Args:
            directory: One that does not exist yet, reachable from every shard under this path; it appears whole.

        Raises:
            RankLost: A shard was lost.
            CheckpointError: The directory is there already, or cannot be written, which ends the group.
        """
        with atomic_directory(directory) as building, write_failures_told():
            self._ranks.call_all("save the policy", "save", str(building.resolve()))
            write_manifest(building, 0, 1)

    def load(self, checkpoint: str | Path) -> None:
        """Goes on from what `save` wrote with any number of shards; the reference stays the base model.

        Raises:
            RankLost: A shard was lost.
            CheckpointError: It is not whole, or was saved with another ZeRO stage.
        """
        verify_manifest(checkpoint)
        self._ranks.call_all("load the policy", "load", str(Path(checkpoint).resolve()))

    def shutdown(self) -> None:
        """Ends the shards and gives back what they had reserved; may be called again."""
        self._ranks.close()

    def __enter__(self) -> PolicyGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
