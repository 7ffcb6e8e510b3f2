"""Advantages and critic updates for your own PPO trainer: the calls that its loop makes to this project.

Your trainer provides rollouts and `update_policy`. It needs a running pool of scorers: ``rlhf-critic serve my-critic``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from actors import CriticGroup, CriticOptions, connect
from rlhf_critic.algorithms import gae, ppo
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.scoring.items import conversations


def run(checkpoint: str, rollouts: Iterable[Any], update_policy: Callable[..., None], steps: int) -> None:
    """Computes advantages for every batch of rollouts and trains the critic on its returns."""
    # 1. Start the online critic: two ranks, each with its shard of the critic in an actor.
    options = CriticOptions(ModelConfig(path=checkpoint), TrainConfig(learning_rate=1e-5), total_steps=steps)
    with CriticGroup(options, shards=2, cpus_per_shard=0.5) as critic, connect() as scorers:
        for batch in rollouts:
            # 2. Request rewards [S] from the pool. They are computed while the critic computes values.
            scores = scorers.submit(conversations(batch.prompts, batch.responses))

            # 3. Compute the value at every response token, and the value after the last one [S].
            values, last_values_S = ppo.action_values(critic.values(batch.sequences), batch.prompt_lengths)
            values_SL, _ = ppo.pad_rows(values)

            # 4. Shape rewards: a KL penalty against the reference at every token, the reward at the last one.
            log_probs_SL, mask_SL = ppo.pad_rows(batch.log_probs)
            kl_SL = ppo.estimate_kl(log_probs_SL, ppo.pad_rows(batch.ref_log_probs)[0], "k1")
            rewards_SL = ppo.shaped_rewards(torch.tensor(scores.result().rewards_S), kl_SL, mask_SL, 0.05)

            # 5. Compute advantages and returns by GAE. Truncated responses end an episode here like all others.
            truncated_S = torch.zeros(len(values), dtype=torch.bool)
            advantages_SL, returns_SL = gae.gae(
                rewards_SL, values_SL, mask_SL, torch.from_numpy(last_values_S), truncated_S, gamma=1.0, gae_lambda=0.95
            )

            # 6. Train the critic on the returns, and the policy on whitened advantages.
            critic.update(batch.sequences, batch.prompt_lengths, ppo.unpad_rows(returns_SL, mask_SL), values)
            update_policy(batch, ppo.whiten(advantages_SL, mask_SL))

        # 7. Save the critic.
        critic.save("my-value-critic")
