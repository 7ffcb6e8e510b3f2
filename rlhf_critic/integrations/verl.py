"""Custom reward function for verl.

    reward.custom_reward_function.path=.../rlhf_critic/integrations/verl.py
    reward.custom_reward_function.name=compute_score

These options exist since verl 0.7.1. Until 0.7.0 they begin with ``custom_reward_function.``; 0.9.1 silently ignores
those names. `compute_scores` serves the batch reward manager, which verl had until 0.7.0.

verl passes the response without its prompt, so rows of the data need the prompt in ``extra_info["prompt"]``, as a text
or a list of turns. The address of the pool comes from `rlhf_critic.integrations.client_from_environment`.

Failures raise, and verl handles the exception. The reward managers naive (the default), dapo, gdpo and remote pass it
on. Do not use rate_limited (limited in older versions) or prime: they turn it into a reward of 0. The trainer of 0.9.1
logs it, drops the rollouts of that prompt and counts them in training/rollout_failure/evicted_samples: watch that
metric.

Written against the sources of verl 0.9.1, where the response is the whole generation, decoded without special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_critic.data.conversation import Prompt, present_fields
from rlhf_critic.errors import DataError
from rlhf_critic.integrations.client_from_environment import client_from_environment


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **_: Any
) -> float:
    """Returns the reward of one response.

    Args:
        data_source: Name of the data, for errors.
        solution_str: Text of the response.
        ground_truth: Not used.
        extra_info: Fields of the row, with ``prompt``.

    Raises:
        DataError: The prompt is missing, or is neither a text nor turns.
        CriticError: See `rlhf_critic.scoring.client.ScorerClient.score`.
    """
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info])[0]


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | None],
    **_: Any,
) -> list[float]:
    """Returns the rewards of a batch by one call, in which rollouts of a prompt share its computation."""
    prompts = [_prompt_of(*row) for row in zip(data_sources, extra_infos, strict=True)]
    return client_from_environment().score(prompts, list(solution_strs)).tolist()


def _prompt_of(data_source: str, extra_info: Mapping[str, Any] | None) -> Prompt:
    prompt = (extra_info or {}).get("prompt")
    if prompt is None:
        raise DataError(
            f"{data_source}: field 'extra_info.prompt' is missing, and a reward needs it: store each row's prompt "
            "there when you create the data"
        )
    try:
        return prompt if isinstance(prompt, str) else present_fields(prompt)
    except (AttributeError, TypeError) as error:
        raise DataError(
            f"{data_source}: field 'extra_info.prompt' must be a text, or a list of turns with 'role' and 'content', "
            f"not {type(prompt).__name__}: {error}"
        ) from error
