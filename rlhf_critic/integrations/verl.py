"""verl: this file is a custom reward function.

    reward.custom_reward_function.path=.../rlhf_critic/integrations/verl.py
    reward.custom_reward_function.name=compute_score

These are the options since verl 0.7.1; until 0.7.0 they begin with ``custom_reward_function.``, which 0.9.1 takes
without a word and does not use. `compute_scores` is for the batch reward manager, which verl had until 0.7.0.

verl hands over the response and not what it answers, so the rows of the data need the prompt in ``extra_info``:
``extra_info["prompt"]``, a text or a list of turns. `rlhf_critic.integrations.client_from_environment` says how the pool is found.

A failure raises, and what becomes of it is up to verl. The reward managers naive (the default), dapo, gdpo and remote
pass it on; limited, and the prime of older versions, turn it into a reward of 0, so do not use those. The trainer of
0.9.1 then logs it, leaves that prompt's rollouts out and counts them: watch training/rollout_failure/evicted_samples.

Written against the sources of verl 0.9.1, where the response is all that was generated, decoded without special tokens.
Not run with verl itself.
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
    """The reward of one response.

    Args:
        data_source: Named in errors.
        solution_str: The response.
        ground_truth: Not used.
        extra_info: Holds the prompt.

    Raises:
        DataError: There is no prompt, or it is neither a text nor turns.
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
    """`compute_score` for a batch, in one call; rollouts of a prompt share its computation."""
    prompts = [_prompt_of(*row) for row in zip(data_sources, extra_infos, strict=True)]
    rewards: list[float] = client_from_environment().score(prompts, list(solution_strs)).tolist()
    return rewards


def _prompt_of(data_source: str, extra_info: Mapping[str, Any] | None) -> Prompt:
    prompt = (extra_info or {}).get("prompt")
    if prompt is None:
        raise DataError(
            f"{data_source}: field 'extra_info.prompt' is missing, and a reward needs it: put each row's prompt "
            "there when you make the data"
        )
    try:
        return prompt if isinstance(prompt, str) else present_fields(prompt)
    except (AttributeError, TypeError) as error:
        raise DataError(
            f"{data_source}: field 'extra_info.prompt' must be a text, or a list of turns with 'role' and 'content', "
            f"and is a {type(prompt).__name__}: {error}"
        ) from error
