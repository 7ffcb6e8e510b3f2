"""verl: this file is a custom reward function.

    custom_reward_function.path=.../rlhf_critic/integrations/verl.py
    custom_reward_function.name=compute_score    # or compute_scores, for reward_manager=batch

verl hands over the response and not what it answers, so the rows of the data need the prompt in ``extra_info``:
``extra_info["prompt"]``, a text or a list of turns. `rlhf_critic.integrations.pool` says how the pool is found. Written
after verl's documented signatures; not run with verl itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_critic.encoding import Prompt
from rlhf_critic.errors import DataError
from rlhf_critic.integrations.pool import client_from_environment


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
        DataError: There is no prompt.
        CriticError: See `rlhf_critic.scorer_client.ScorerClient.score`.
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
    return [float(reward) for reward in client_from_environment().score(prompts, list(solution_strs))]


def _prompt_of(data_source: str, extra_info: Mapping[str, Any] | None) -> Prompt:
    prompt = (extra_info or {}).get("prompt")
    if prompt is None:
        raise DataError(
            f"{data_source}: field 'extra_info.prompt' is missing, and a reward needs it: put each row's prompt "
            "there when you make the data"
        )
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
