"""Rewards, values and advantages for a PPO trainer of your own: what its loop asks of this project.

Bring rollouts as your trainer makes them; `update_policy` is yours too. A pool of scorers must be running:
``python -m jobs.serve my-critic``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from actors.ppo.critic_group import CriticGroup, CriticOptions
from actors.serving.handle import connect
from rlhf_critic.algorithms import ppo
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.scoring.items import conversations


def run(checkpoint: str, rollouts: Iterable[Any], update_policy: Callable[..., None], steps: int) -> None:
    """Gives every batch of rollouts its advantages and fits the critic to its returns."""
    options = CriticOptions(ModelConfig(path=checkpoint), TrainConfig(learning_rate=1e-5), total_steps=steps)
    with CriticGroup(options, shards=2, cpus_per_shard=0.5) as critic, connect() as scorers:
        for batch in rollouts:
            judged = scorers.submit(conversations(batch.prompts, batch.responses))  # while values are computed
            values, last_values_S = ppo.action_values(critic.values(batch.sequences), batch.prompt_lengths)
            log_probs_SL, mask_SL = ppo.pad_rows(batch.log_probs)
            kl_SL = ppo.estimate_kl(log_probs_SL, ppo.pad_rows(batch.ref_log_probs)[0], "k1")
            rewards_SL = ppo.shaped_rewards(torch.tensor(judged.result().rewards_S), kl_SL, mask_SL, 0.05)
            values_SL, _ = ppo.pad_rows(values)
            cut_S = torch.zeros(len(values), dtype=torch.bool)  # a cut response is judged as it stands, and ends there
            advantages_SL, returns_SL = ppo.gae(
                rewards_SL, values_SL, mask_SL, torch.from_numpy(last_values_S), cut_S, gamma=1.0, gae_lambda=0.95
            )
            critic.update(batch.sequences, batch.prompt_lengths, ppo.unpad_rows(returns_SL, mask_SL), values)
            update_policy(batch, ppo.whiten(advantages_SL, mask_SL))
        critic.save("my-value-critic")
