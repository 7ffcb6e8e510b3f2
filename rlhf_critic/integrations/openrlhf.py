"""Custom reward for OpenRLHF (``--reward.remote_url .../rlhf_critic/integrations/openrlhf.py``).

Until OpenRLHF 0.9 the option is ``--remote_rm_url``. The value ``http://HOST:8000/get_reward`` needs no file, but
cannot send a token. This file sends one, retries until a deadline and raises typed errors. The address of the pool
comes from `rlhf_critic.integrations.client_from_environment`.

OpenRLHF catches exceptions of a reward and continues without it, so the run fails a little later with another error
("reward_model_group is required when rewards are not precomputed", or one about None). The reason is in the log of the
vLLM engine: "Failed to fetch reward from remote RM".

Written against the sources of OpenRLHF 0.11.2, which sends one query per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_critic.integrations.client_from_environment import client_from_environment
from rlhf_critic.scoring.items import Text


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Any = None, **_: Any) -> dict[str, Any]:
    """Returns the rewards of a batch.

    A query is scored unchanged, in the policy's chat template, except that it gets the critic's own ending. Policy and
    critic must share a template.

    Args:
        queries: Prompts and responses together, with special tokens.
        prompts: Prompt at the start of each query.
        labels: Not used.

    Returns:
        ``rewards`` and ``scores``, fp32 ``[S]``, and ``extra_logs`` with the components of the reward and
        ``std`` of a calibrated critic.

    Raises:
        CriticError: See `rlhf_critic.scoring.client.ScorerClient.score`.
    """
    items = [
        Text(query, query[len(prompt) :] if query.startswith(prompt) else None, finish=True)
        for query, prompt in zip(queries, prompts, strict=True)
    ]
    scores = client_from_environment().score_items(items)
    rewards_S = torch.from_numpy(scores.rewards_S)
    logs = {name: torch.from_numpy(value_S) for name, value_S in scores.logs().items()}
    return {"rewards": rewards_S, "scores": rewards_S, "extra_logs": logs}
