"""One rank's engine for scoring with a critic that is sharded over ranks: rewards and values, without an optimizer.

Every method is collective. `rlhf_critic.training.critic_engine.CriticEngine` adds training. Knows nothing about Ray,
text or who calls it.

Shape legend: S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rlhf_critic.algorithms.head_posterior import HeadPosterior
from rlhf_critic.batching.device_copy import copy_to_device
from rlhf_critic.batching.planner import plan_sequences
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import OpenedCritic
from rlhf_critic.config.deepspeed import TIMERS_OFF
from rlhf_critic.model.backbone import Batch, forward_micro_batches
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.device import configure_device
from rlhf_critic.training.posterior_fit import Unit, last_states, plan_units


class InferenceEngine:
    """A scoring critic, sharded by DeepSpeed over the ranks of ``torch.distributed``.

    Args:
        critic: The critic.
        engine: DeepSpeed's engine around the critic.
        token_budget: Returns the maximum number of tokens that a rank computes at once. All ranks call it together.
        posterior: Posterior of the head, if the critic is calibrated.

    Attributes:
        computed_tokens: Tokens that all ranks together computed for the last call.
        stds_S: Standard deviation of each reward of the last call, fp32; None without a posterior.
    """

    def __init__(
        self, critic: Critic, engine: Any, token_budget: Callable[[], int], posterior: HeadPosterior | None = None
    ) -> None:
        self.critic = critic
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = engine.device
        self.computed_tokens = 0
        self.stds_S: NDArray[np.float32] | None = None
        self._posterior = posterior and posterior.to(self.device)
        self._engine = engine
        self._token_budget = token_budget

    @classmethod
    def from_checkpoint(cls, opened: OpenedCritic, token_budget: int, dtype: torch.dtype) -> InferenceEngine:
        """Loads a critic in a dtype, with its parameters sharded over the ranks (ZeRO stage 3).

        Raises:
            CheckpointError: See `rlhf_critic.checkpoint.critic_directory.OpenedCritic.build`.
        """
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "timers": TIMERS_OFF,
        }
        posterior = opened.posterior()  # before `build`, which takes the weights
        critic = opened.build(config, dtype)
        engine, *_ = deepspeed.initialize(model=critic, config=config)
        configure_device(engine.device, dtype)
        return cls(critic, engine, lambda: token_budget, posterior)

    def rewards(self, sequences: Sequence[TokenIds]) -> NDArray[np.float32]:
        """Computes the reward of each sequence of token ids, fp32 ``[S]``.

        Raises:
            ValueError: There is no sequence, or one is empty.
        """
        rewards_S = torch.zeros(len(sequences) + 1, dtype=torch.float64, device=self.device)
        for units, rewards_U, computed_tokens in self._forward_sequences(sequences, rewards_only=True):
            (places_U,) = copy_to_device([torch.tensor(units)], self.device)
            rewards_S.index_copy_(0, places_U, rewards_U.double())
            rewards_S[-1] += computed_tokens
        return self._sum_over_ranks(rewards_S)

    def values(self, sequences: Sequence[TokenIds]) -> list[NDArray[np.float32]]:
        """Computes the value at every token of each sequence of token ids: ``S`` fp32 arrays, as long as the sequences.

        Raises:
            ValueError: There is no sequence, or one is empty.
        """
        ends = np.cumsum([len(sequence) for sequence in sequences])
        flat = torch.zeros((int(ends[-1]) if len(ends) else 0) + 1, dtype=torch.float64, device=self.device)
        for units, values_SL, computed_tokens in self._forward_sequences(sequences, rewards_only=False):
            for row, unit in enumerate(units):
                length = len(sequences[unit])
                flat[int(ends[unit]) - length : int(ends[unit])] = values_SL[row, :length].double()
            flat[-1] += computed_tokens
        return np.split(self._sum_over_ranks(flat), ends[:-1])

    def last_states(self, units: Sequence[Unit]) -> Iterator[tuple[Tensor, Tensor]]:
        """Computes rewards and last hidden states of the sequences of units, each unit on one rank.

        Yields:
            Rewards fp32 ``[S]`` and states fp32 ``[S, D]`` of each unit of this rank. Read it to its end on all ranks.

        Raises:
            ValueError: There is no unit.
        """
        plan = plan_units(units, self.world_size, self._token_budget(), self.critic.prefix_tree)
        self._engine.eval()

        def run(batch: Batch) -> tuple[Tensor, Tensor]:
            return self._engine(batch, rewards_only=True, with_states=True)

        return last_states(self.critic, units, plan[self.rank], run, self.device)

    def _sum_over_ranks(self, results: Tensor) -> NDArray[np.float32]:
        """Sums the ranks' results, whose last entry counts tokens.

        They are fp64, which represents fp32 values and counts exactly.
        """
        dist.all_reduce(results)
        self.computed_tokens = int(results[-1])
        return results[:-1].float().cpu().numpy()

    def _forward_sequences(
        self, sequences: Sequence[TokenIds], rewards_only: bool
    ) -> Iterator[tuple[tuple[int, ...], Tensor, int]]:
        """Computes this rank's part of the sequences, micro-batch by micro-batch."""
        plan = plan_sequences(sequences, self.world_size, self._token_budget(), self.critic.prefix_tree)
        self._engine.eval()  # after the token budget, whose probe runs in training mode
        posterior = self._posterior
        stds_S = torch.zeros(len(sequences), dtype=torch.float64, device=self.device)

        def run(batch: Batch, _: Sequence[int]) -> tuple[Tensor, Tensor | None]:
            if posterior is None:
                return self._engine(batch, rewards_only=rewards_only), None
            output, states_SD = self._engine(batch, rewards_only=rewards_only, with_states=True)
            return output, posterior.stds(states_SD)

        for units, (output, stds_U), computed in forward_micro_batches(
            self.critic, sequences, plan[self.rank], run, self.device
        ):
            if stds_U is not None:
                (places_U,) = copy_to_device([torch.tensor(units)], self.device)
                stds_S.index_copy_(0, places_U, stds_U.double())
            yield units, output, computed
        if posterior is not None:
            dist.all_reduce(stds_S)
            self.stds_S = stds_S.float().cpu().numpy()
