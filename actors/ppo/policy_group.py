"""The policy of PPO in training, with its frozen reference: ranks in Ray actors, and the handle of all ranks.

The counterpart of `actors.ppo.critic_group`. Knows nothing about rewards, values or how rollouts are made.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actors.ppo.engine_group import EngineGroup, put_rollouts, put_sequences, validate_token_ids
from actors.runtime.rank_group import Rank
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.training.policy_engine import PolicyEngine, PolicyMetrics


@dataclass(frozen=True)
class PolicyOptions:
    """Options of a policy.

    Attributes:
        model: Options of the base model, which is the reference too.
        optimizer: Options of the optimizer and its sharding.
        chat_template: Template of prompts; see `rlhf_critic.data.encoding.load_tokenizer`.
        total_steps: Updates of the whole run, at which the learning rate schedule ends.
        seed: Seed of dropout, if any.
        temperature: Temperature at which tokens are sampled.
    """

    model: BodyConfig
    optimizer: OptimizerConfig
    chat_template: str
    total_steps: int
    seed: int
    temperature: float

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the policy's tokenizer.

        Raises:
            EncodingError: See `rlhf_critic.data.encoding.load_tokenizer`.
        """
        return load_tokenizer(self.model.path, self.chat_template)


@dataclass(frozen=True)
class PolicyWeights:
    """Weights of the policy that rollout workers load.

    Attributes:
        version: Updates done.
        stored: Reference to the bytes, dtype and shape of each weight by name; in a tuple, so that Ray passes the
            reference on instead of fetching the weights.
    """

    version: int
    stored: tuple[ray.ObjectRef]

    @classmethod
    def put(cls, version: int, tensors: Mapping[str, Tensor]) -> PolicyWeights:
        """Copies contiguous CPU tensors into the object store. Ray would pickle tensors; arrays it maps into memory."""
        stored = {
            name: (tensor.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)
            for name, tensor in tensors.items()
        }
        return cls(version, (ray.put(stored),))

    def get(self) -> dict[str, Tensor]:
        """Returns the weights, which share the object store's memory: they may be read and not written.

        Raises:
            ray.exceptions.ObjectLostError: The weights were lost with the rank that put them.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return {
                name: torch.from_numpy(bytes_B).view(dtype).view(shape)
                for name, (bytes_B, dtype, shape) in ray.get(self.stored[0]).items()
            }


class PolicyRank(Rank):
    """One rank of a policy in training. Every method is called on all ranks at once; the first rank answers."""

    def build(self, options: PolicyOptions) -> None:
        """Builds this rank's shard."""
        tokenizer, steps = options.tokenizer(), options.total_steps
        self._engine = PolicyEngine(
            tokenizer, options.model, options.optimizer, steps, options.seed, options.temperature
        )

    def save(self, directory: str, _name: str) -> None:
        """Saves the policy; see `rlhf_critic.training.policy_engine.PolicyEngine.save`."""
        self._engine.save(directory)

    def load(self, directory: str) -> None:
        """Loads a checkpoint; see `rlhf_critic.training.policy_engine.PolicyEngine.load`."""
        self._engine.load(directory)

    def reference_log_probs(
        self, sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """Computes log-probabilities; see `rlhf_critic.training.policy_engine.PolicyEngine.reference_log_probs`."""
        validate_token_ids(sequences, self._engine.policy.model)
        log_probs = self._engine.reference_log_probs(sequences, prompt_lengths)
        return log_probs if self.rank == 0 else []

    def update(self, rollouts: dict[str, Any], clip: float, entropy_coefficient: float) -> PolicyMetrics:
        """Takes one optimizer step; see `rlhf_critic.training.policy_engine.PolicyEngine.update`."""
        validate_token_ids(rollouts["sequences"], self._engine.policy.model)
        return self._engine.update(**rollouts, clip=clip, entropy_coefficient=entropy_coefficient)

    def weights(self) -> PolicyWeights | None:
        """Puts the weights into the object store."""
        tensors = self._engine.weights()
        return PolicyWeights.put(self._engine.step, tensors) if self.rank == 0 else None


class PolicyGroup(EngineGroup):
    """Handle of a policy in training; see `EngineGroup`. Its reference is always the base model."""

    what = "policy"
    rank_class = PolicyRank

    def reference_log_probs(
        self, sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """Computes the frozen reference's log-probabilities of response tokens, in nats: ``S`` arrays, fp32 ``[R]``.

        Raises:
            RankLost: A rank was lost.
            ValueError: A prompt is empty or longer than its sequence, or the policy does not have a token id.
        """
        doing, lengths = "compute reference log-probabilities", list(prompt_lengths)
        return self._call(doing, PolicyRank.reference_log_probs, put_sequences(sequences), lengths)[0]

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
            RankLost: A rank was lost. Whether the step was taken is unknown, so resume from a checkpoint.
            NonFiniteLossError: The loss is NaN or infinite; the group has ended.
            ValueError: Shapes do not fit, a number is not finite, the policy does not have a token id, or all responses
                are empty.
        """
        rollouts = put_rollouts(sequences, prompt_lengths, old_log_probs=old_log_probs, advantages=advantages)
        return self._call("update the policy", PolicyRank.update, rollouts, clip, entropy_coefficient)[0]

    def weights(self) -> PolicyWeights:
        """Returns the policy's current weights, for rollout workers.

        Raises:
            RankLost: A rank was lost.
        """
        weights = self._call("gather the policy's weights", PolicyRank.weights)[0]
        assert weights is not None, "the first rank answers"
        return weights
