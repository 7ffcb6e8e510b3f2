"""Rewards of token ids from a critic in this process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from rlhf_critic.batching.planner import plan_sequences
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.model.backbone import forward_micro_batches
from rlhf_critic.model.critic import Critic


def score_sequences(critic: Critic, sequences: Sequence[TokenIds], token_budget: int) -> NDArray[np.float32]:
    """The reward of each sequence, computed by a whole critic on this process; shows its progress on a terminal.

    Args:
        critic: In evaluation mode.
        sequences: Token ids.
        token_budget: The most tokens that are computed at once.

    Returns:
        fp32 ``[S]``, in the order of ``sequences``.

    Raises:
        ValueError: There is no sequence, or an empty one.
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
