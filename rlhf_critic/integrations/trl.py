"""TRL: rewards for ``GRPOTrainer`` (and RLOO) from a pool of scorers.

    from actors.scorer_handle import connect
    trainer = GRPOTrainer(model=..., reward_funcs=reward_function(connect()), ...)

Written against TRL 1.16, whose trainers call reward functions with ``prompts`` and ``completions`` as lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rlhf_critic.encoding import Prompt
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scorer_client import ScorerClient
from rlhf_critic.scoring import Conversation

Completion: TypeAlias = "str | Sequence[dict[str, Any]]"
RewardFunction: TypeAlias = Callable[..., list[float]]


def reward_function(client: ScorerClient, name: str = "critic") -> RewardFunction:
    """A reward function that asks scorers.

    A failure raises: TRL would take a missing reward for one that it leaves out of the mean.

    Args:
        client: Of the pool.
        name: What TRL logs the rewards under.
    """

    def critic_reward(prompts: Sequence[Prompt], completions: Sequence[Completion], **_: Any) -> list[float]:
        items = [_conversation(*pair) for pair in zip(prompts, completions, strict=True)]
        return [float(reward) for reward in client.score_items(items).rewards_S]

    critic_reward.__name__ = name
    return critic_reward


def _conversation(prompt: Prompt, completion: Completion) -> Conversation:
    """The last turn of a conversational completion is the response; turns before it (of tools) belong to the prompt."""
    if isinstance(completion, str):
        return Conversation(prompt, completion)
    if isinstance(prompt, str) or not completion or completion[-1].get("role") != "assistant":
        raise ScorerRejected(
            "not_text",
            "a conversational completion needs a conversational prompt and must end with an assistant's turn",
        )
    *before, last = completion
    return Conversation([*prompt, *before], last["content"])
