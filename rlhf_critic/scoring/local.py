"""Rewards of token ids from a critic in this process. Knows nothing about text or files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from rlhf_critic.batching.planner import plan_sequences
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.model.backbone import forward_micro_batches
from rlhf_critic.model.critic import Critic


def score_sequences(critic: Critic, sequences: Sequence[TokenIds], token_budget: int) -> NDArray[np.float32]:
    """Computes the reward of each sequence with an unsharded critic. Shows its progress on a terminal.

    Args:
        critic: Critic in evaluation mode.
        sequences: Token ids.
        token_budget: Maximum number of tokens in a micro-batch.

    Returns:
        Rewards, fp32 ``[S]``, in the order of ``sequences``.

    Raises:
        ValueError: There is no sequence, or one of them is empty.
    """
    device = next(critic.parameters()).device
    (micro_batches,) = plan_sequences(sequences, 1, token_budget, critic.prefix_tree)
    rewards_S = torch.zeros(len(sequences), dtype=torch.float32)
    with tqdm(total=len(sequences), desc="scoring", unit="text", disable=None) as bar:
        scored = forward_micro_batches(critic, sequences, micro_batches, lambda batch, _: critic.rewards(batch), device)
        for units, rewards_U, _ in scored:
            rewards_S[list(units)] = rewards_U.cpu()
            bar.update(len(units))
    return rewards_S.numpy()


@torch.no_grad()
def rewards_and_states(
    critic: Critic, sequences: Sequence[TokenIds], token_budget: int
) -> tuple[NDArray[np.float32], Tensor]:
    """Computes rewards as `score_sequences` does, and the last hidden states, fp32 ``[S, D]`` on the critic's device.

    States take ``4 D`` bytes a sequence, so call it for a part of a large data set at a time.

    Raises:
        ValueError: There is no sequence, or one of them is empty.
    """
    device = next(critic.parameters()).device
    (micro_batches,) = plan_sequences(sequences, 1, token_budget, critic.prefix_tree)
    scored = forward_micro_batches(
        critic, sequences, micro_batches, lambda batch, _: critic.rewards_and_states(batch), device
    )
    places, outputs = zip(*((units, output) for units, output, _ in scored), strict=True)
    order = np.concatenate([np.asarray(units) for units in places]).argsort()
    rewards_S = torch.cat([rewards for rewards, _ in outputs]).cpu().numpy()[order]
    states_SD = torch.cat([states.float() for _, states in outputs])
    return rewards_S, states_SD[torch.from_numpy(order).to(device)]
