"""Preference losses. Pure functions of rewards; they know nothing of models, batches or ranks.

Shape legend: P preferences.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen_rewards_P: Tensor, rejected_rewards_P: Tensor) -> Tensor:
    """Negative log-likelihood of each preference under the Bradley-Terry model.

    ``-log sigmoid(r_chosen - r_rejected)``, as in Ouyang et al., "Training language models to follow instructions with
    human feedback" (2022), equation 1, with one pair a prompt. Computed in fp32 whatever the input's dtype.

    Args:
        chosen_rewards_P: Rewards of the chosen responses, ``[P]``.
        rejected_rewards_P: Rewards of the rejected responses, ``[P]``.

    Returns:
        The loss of each preference, ``[P]``, fp32, not reduced.

    Raises:
        ValueError: The shapes differ.
    """
    if chosen_rewards_P.shape != rejected_rewards_P.shape:
        raise ValueError(
            f"chosen and rejected rewards differ in shape: {tuple(chosen_rewards_P.shape)}, "
            f"{tuple(rejected_rewards_P.shape)}"
        )
    return -F.logsigmoid(chosen_rewards_P.float() - rejected_rewards_P.float())
