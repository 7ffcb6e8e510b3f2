"""One rank's share of scoring with a critic that is sharded over ranks: rewards and values, without an optimizer.

Every method is collective, as in `rlhf_critic.training.critic_engine`, whose training engine is one of these too. Knows nothing of Ray,
text or who calls it.

Shape legend: S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.batching.planner import plan_sequences
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import load_encoder, read_card
from rlhf_critic.model.backbone import forward_micro_batches
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import create_critic_model, load_config
from rlhf_critic.model.weights import WeightReader


class InferenceEngine:
    """A critic, sharded by DeepSpeed over the ranks of ``torch.distributed``, that scores.

    Args:
        critic: The critic.
        engine: DeepSpeed's engine around it.
        token_budget: The most tokens a rank computes at once.

    Attributes:
        computed_tokens: Tokens that all ranks together computed for the last call.
    """

    def __init__(self, critic: Critic, engine: Any, token_budget: int) -> None:
        self.critic = critic
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = engine.device
        self.computed_tokens = 0
        self._engine = engine
        self._token_budget = token_budget

    @classmethod
    def from_checkpoint(cls, directory: str | Path, token_budget: int) -> InferenceEngine:
        """Loads a critic directory with its parameters sharded over the ranks (ZeRO stage 3), in the dtype saved.

        But for float16, which becomes float32: DeepSpeed shards that only where its CPU or GPU computes with it.

        Raises:
            CheckpointError: See `rlhf_critic.checkpoint.critic_directory.load_critic`.
        """
        import deepspeed

        card = read_card(directory)
        dtype = load_config(str(directory)).dtype
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        critic = create_critic_model(
            str(directory),
            load_encoder(directory, card).tokenizer,
            config,
            card.num_padding_at_beginning,
            rlhf_training=True,
            disable_dropout=True,
            dtype=dtype,
            weights=WeightReader(str(directory), safetensors_only=True),
        )
        engine, *_ = deepspeed.initialize(model=critic, config=config)
        return cls(critic, engine, token_budget)

    @cached_property
    def token_budget(self) -> int:
        """The most tokens of a micro-batch."""
        return self._token_budget

    def rewards(self, sequences: Sequence[TokenIds]) -> NDArray[np.float32]:
        """The reward of each sequence of token ids, fp32 ``[S]``.

        Raises:
            ValueError: There is no sequence, or an empty one.
        """
        rewards_S = torch.zeros(len(sequences) + 1, dtype=torch.float64, device=self.device)
        for units, rewards_U, computed_tokens in self._forward_sequences(sequences, rewards_only=True):
            rewards_S[list(units)] = rewards_U.double()
            rewards_S[-1] += computed_tokens
        return self._sum_over_ranks(rewards_S)

    def values(self, sequences: Sequence[TokenIds]) -> list[NDArray[np.float32]]:
        """The value at every token of each sequence of token ids: ``S`` arrays, fp32, as long as the sequences.

        Raises:
            ValueError: There is no sequence, or an empty one.
        """
        ends = np.cumsum([len(sequence) for sequence in sequences])
        flat = torch.zeros((int(ends[-1]) if len(ends) else 0) + 1, dtype=torch.float64, device=self.device)
        for units, values_SL, computed_tokens in self._forward_sequences(sequences, rewards_only=False):
            for row, unit in enumerate(units):
                length = len(sequences[unit])
                flat[int(ends[unit]) - length : int(ends[unit])] = values_SL[row, :length].double()
            flat[-1] += computed_tokens
        return np.split(self._sum_over_ranks(flat), ends[:-1])

    def _sum_over_ranks(self, results: Tensor) -> NDArray[np.float32]:
        """Joins the ranks' results, whose last entry counts tokens; fp64, in which fp32 values and counts are exact."""
        dist.all_reduce(results)
        self.computed_tokens = int(results[-1])
        return results[:-1].float().cpu().numpy()

    def _forward_sequences(
        self, sequences: Sequence[TokenIds], rewards_only: bool
    ) -> Iterator[tuple[tuple[int, ...], Tensor, int]]:
        """This rank's part of the sequences, micro-batch by micro-batch."""
        plan = plan_sequences(sequences, self.world_size, self.token_budget, self.critic.prefix_tree)
        self._engine.eval()  # after the plan: the probe of the token budget trains
        return forward_micro_batches(
            self.critic,
            sequences,
            plan[self.rank],
            lambda batch, _: self._engine(batch, rewards_only=rewards_only),
            self.device,
        )
