"""Experience of one iteration: rollouts with their targets, from which the critic and the policy are updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from actors.ppo.critic_group import CriticGroup
from actors.ppo.engine_group import SharedSequences
from actors.ppo.policy_group import PolicyGroup
from actors.ppo.rollout_workers import Rollout
from rlhf_critic.algorithms.advantages import BoolArray, FloatArray, PPOTargets, RolloutBatch, minibatch_rows
from rlhf_critic.config.ppo import AlgorithmConfig
from rlhf_critic.training.critic_engine import ValueMetrics
from rlhf_critic.training.policy_engine import PolicyMetrics

T = TypeVar("T")

MINIBATCHES = 3  # first number of the seed of minibatches
CRITIC_METRICS = ("loss", "clip_fraction", "grad_norm", "learning_rate")
POLICY_METRICS = (*CRITIC_METRICS, "entropy", "approx_kl")


def share_sequences(rollouts: Sequence[Rollout]) -> SharedSequences:
    """Puts the token ids of rollouts into the object store."""
    return SharedSequences([one.prompt_ids for one in rollouts], [one.response_ids for one in rollouts])


def batch_of(
    rollouts: Sequence[Rollout], values: Sequence[FloatArray], ref_log_probs: Sequence[FloatArray]
) -> RolloutBatch:
    """Joins rollouts with their values and the reference's log-probabilities."""
    return RolloutBatch(
        [len(rollout.prompt_ids) for rollout in rollouts],
        np.array([rollout.truncated for rollout in rollouts]),
        np.array([rollout.reward for rollout in rollouts], dtype=np.float32),
        [rollout.log_probs for rollout in rollouts],
        ref_log_probs,
        values,
        _of_all(rollouts, [rollout.mask for rollout in rollouts], True, np.bool_),
        _of_all(rollouts, [rollout.token_rewards for rollout in rollouts], 0.0, np.float32),
        np.array([rollout.row for rollout in rollouts]),
    )


def _of_all(rollouts: Sequence[Rollout], column: Sequence[Any], default: Any, dtype: Any) -> list[Any] | None:
    """Fills a column of response tokens where a rollout has none; returns None if no rollout has one."""
    if all(one is None for one in column):
        return None
    return [
        np.full(len(rollout.response_ids), default, dtype) if one is None else np.asarray(one, dtype)
        for rollout, one in zip(rollouts, column, strict=True)
    ]


def minibatches_of(rows: Sequence[int], ppo: AlgorithmConfig, iteration: int) -> tuple[list[Any], list[Any]]:
    """Returns the minibatches of the critic and those of the policy, which has none while values warm up.

    The passes of both begin with the same minibatches.
    """
    passes = [
        minibatch_rows(rows, ppo.minibatches, [ppo.seed, MINIBATCHES, iteration, epoch])
        for epoch in range(ppo.epochs * ppo.critic_epochs)
    ]
    of_policy = passes[: ppo.epochs] if iteration >= ppo.value_warmup_iterations else []
    return [part for one in passes for part in one], [part for one in of_policy for part in one]


@dataclass(frozen=True, eq=False)
class Experience:
    """Rollouts of an iteration with their targets, in the form that the updates of the groups take.

    Attributes:
        sequences: Token ids of prompt and response.
        batch: The rollouts.
        targets: Their advantages and returns.
        ppo: Options of PPO.
    """

    sequences: SharedSequences
    batch: RolloutBatch
    targets: PPOTargets
    ppo: AlgorithmConfig

    def update_critic(self, critic: CriticGroup, minibatches: Sequence[Sequence[int]]) -> list[ValueMetrics]:
        """Takes one optimizer step of the critic on each minibatch of rows."""
        columns = self.targets.returns, self.targets.old_values
        update = partial(critic.update, clip=self.ppo.value_clip, mean=self.ppo.loss_mean)
        return [self._on_part(update, rows, columns) for rows in minibatches]

    def update_policy(self, policy: PolicyGroup, minibatches: Sequence[Sequence[int]]) -> list[PolicyMetrics]:
        """Takes one optimizer step of the policy on each minibatch of rows."""
        columns = self.batch.log_probs, self.targets.advantages
        update = partial(
            policy.update,
            clip=self.ppo.clip,
            entropy_coefficient=self.ppo.entropy_coefficient,
            mean=self.ppo.loss_mean,
            clip_high=self.ppo.clip_high,
            dual_clip=self.ppo.dual_clip,
        )
        return [self._on_part(update, rows, columns) for rows in minibatches]

    def _on_part(self, update: Callable[..., T], rows: Sequence[int], columns: Sequence[Sequence[FloatArray]]) -> T:
        masks: list[BoolArray] | None = None
        if self.batch.masks is not None:
            masks = [self.batch.masks[row] for row in rows]
        lengths = [self.batch.prompt_lengths[row] for row in rows]
        of_rows = ([column[row] for row in rows] for column in columns)
        return update(self.sequences.part(rows), lengths, *of_rows, masks=masks)


def means(prefix: str, metrics: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
    """Returns the means of metrics over the updates of an iteration."""
    if not metrics:
        return {}
    return {f"{prefix}_{name}": float(np.mean([getattr(one, name) for one in metrics])) for name in names}
