"""Rewards for TRL's ``GRPOTrainer`` (and RLOO) from a pool of scorers.

    from actors import connect
    trainer = GRPOTrainer(model=..., reward_funcs=reward_function(connect()), ...)

``reward_funcs="my-critic"`` would load the critic in TRL itself, which scores prompts that are texts without the
critic's template and without EOS: use the function.

Written against TRL 1.16, whose trainers call reward functions with ``prompts`` and ``completions`` as lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from pydantic import ValidationError

from rlhf_critic.data.conversation import Prompt, Turn, present_fields, turns_of
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Conversation

Completion: TypeAlias = "str | Sequence[dict[str, Any]]"


class CriticReward:
    """A reward function that calls scorers; `reward_function` creates one.

    It is an object instead of a closure, because TRL's asynchronous trainers pickle reward functions. It does not
    return a coroutine, because some of TRL's trainers do not await one.
    """

    def __init__(self, client: ScorerClient, name: str) -> None:
        self._client = client
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        """Returns the reward of each completion.

        Args:
            prompts: Turns, or texts that the critic's template renders as a user's turn. They must not be rendered
                with the policy's template already, because the critic's template is applied too.
            completions: Texts, or, for prompts of turns, turns that end with the assistant's. The content and the
                tool calls of the last turn are scored, without reasoning that TRL has parsed out. Earlier turns (of
                tools) extend the prompt.
            log_metric: TRL's function that logs a number. It gets the mean of each component and of ``std``.

        Raises:
            ScorerRejected: A completion is not text, or cannot be scored.
            CriticError: See `rlhf_critic.scoring.client.ScorerClient.score`. It stops the training, because TRL would
                treat a missing reward as not applicable and train without it.
        """
        pairs = zip(prompts, completions, strict=True)
        items = [_conversation(index, prompt, completion) for index, (prompt, completion) in enumerate(pairs)]
        scores = self._client.score_items(items)
        if log_metric is not None:
            for part, value_S in scores.logs().items():
                log_metric(f"{self.__name__}/{part}", float(value_S.mean()))
        return scores.rewards_S.tolist()


def reward_function(client: ScorerClient, name: str = "critic") -> CriticReward:
    """Returns a reward function for ``reward_funcs``.

    Args:
        client: Client of the pool.
        name: Name of the rewards in TRL's logs.
    """
    return CriticReward(client, name)


def _conversation(index: int, prompt: Prompt, completion: Completion) -> Conversation:
    if isinstance(completion, str):
        return Conversation(prompt if isinstance(prompt, str) else present_fields(turns_of(prompt)), completion)
    if isinstance(prompt, str):
        raise _not_text(index, "consists of turns, but its prompt is a text")
    *before, last = present_fields([*turns_of(prompt), *completion])
    if not completion or last.get("role") != "assistant":
        raise _not_text(index, "does not end with an assistant's turn")
    scored = {name: last[name] for name in ("role", "content", "tool_calls") if name in last}
    try:
        return Conversation(before, Turn.model_validate(scored).to_reply())
    except ValidationError as error:
        raise _not_text(index, f"ends with a turn that is not text ({error.errors()[0]['msg']})") from error


def _not_text(index: int, why: str) -> ScorerRejected:
    return ScorerRejected(
        "not_text",
        f"completion {index} {why}: this critic scores the text of an assistant's turn. Train without such "
        "completions, or wrap the reward function and return None for them, which TRL treats as 'not applicable'",
        item=index,
    )
