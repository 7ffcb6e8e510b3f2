"""Rewards as a weighted sum of named components: the critic and rules.

Each component gives a number for every item. Answers also report its unweighted value. Knows nothing about how the
critic's reward is computed.

Shape legend: S items.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.config.serve import Component, CriticComponent, LengthPenalty, PythonComponent, RegexComponent
from rlhf_critic.data.conversation import Prompt
from rlhf_critic.errors import ComponentError, ConfigError, ScorerRejected
from rlhf_critic.scoring.items import Conversation, Item, Text

Rewards = NDArray[np.float32]
Rule = Callable[[Sequence[Prompt], Sequence[str]], Rewards]
CountTokens = Callable[[str], int]


class RewardComponents:
    """Combines a critic's rewards with other components.

    Args:
        components: The components; exactly one is the critic.
        count_tokens: Counts the tokens of a text with the critic's tokenizer. Several threads may call it.
        ending: Returns the text that the critic's template puts after a response (`Encoder.ending`). Called on demand.

    Raises:
        ConfigError: A Python component's function cannot be imported or called.
    """

    def __init__(
        self, components: Sequence[Component], count_tokens: CountTokens, ending: Callable[[], str] = lambda: ""
    ) -> None:
        self._components = tuple(components)
        self._ending = ending
        self._rules = {
            component.name: _rule(component, count_tokens)
            for component in components
            if not isinstance(component, CriticComponent)
        }

    def combine(self, items: Sequence[Item], critic_S: Rewards) -> tuple[Rewards, dict[str, Rewards]]:
        """Returns the weighted sum and the unweighted components. The latter are empty if the critic is alone.

        Args:
            items: The scored items.
            critic_S: Rewards of the critic, fp32.

        Raises:
            ScorerRejected: A component needs the response, and an item does not state it, or its text does not end
                with it.
            ComponentError: A function failed or did not return a finite number for each item, or a sum overflows.
        """
        values = {}
        if self._rules:
            prompts, responses = _prompts_and_responses(items, self._ending)
            values = {name: rule(prompts, responses) for name, rule in self._rules.items()}
        total_S = np.zeros(len(items), dtype=np.float32)
        by_name = {}
        for component in self._components:
            value_S = critic_S if isinstance(component, CriticComponent) else values[component.name]
            by_name[component.name] = value_S
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                total_S += np.float32(component.weight) * value_S
        if not np.isfinite(total_S).all():
            index = int(np.flatnonzero(~np.isfinite(total_S))[0])
            raise ComponentError(
                f"item {index}: the weighted sum of {', '.join(by_name)} is {total_S[index]}: lower the weights"
            )
        return total_S, by_name if len(by_name) > 1 else {}


def _prompts_and_responses(items: Sequence[Item], ending: Callable[[], str]) -> tuple[list[Prompt], list[str]]:
    pairs: list[tuple[Prompt, str]] = []
    for index, item in enumerate(items):
        if isinstance(item, Conversation):
            pairs.append((item.prompt, item.response))
        elif isinstance(item, Text) and item.response is not None:
            pairs.append((_prompt_of(index, item.text, item.response, ending()), item.response))
        else:
            raise ScorerRejected(
                "no_response",
                f"item {index} does not state its response, and this reward has components that need one: send prompt "
                "and response",
                index,
            )
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def _prompt_of(index: int, text: str, response: str, ending: str) -> str:
    """Returns the text before a response. The response may be given with or without the ending after it."""
    for body in (text.removesuffix(ending), text):
        if body.endswith(response):
            return body.removesuffix(response)
    raise ScorerRejected(
        "not_the_end", f"item {index}: the text does not end with the response: give the exact end of the text", index
    )


def _rule(component: Component, count_tokens: CountTokens) -> Rule:
    if isinstance(component, LengthPenalty):
        free = component.free_tokens
        return lambda _, responses: -np.maximum([count_tokens(text) - free for text in responses], 0).astype(np.float32)
    if isinstance(component, RegexComponent):
        pattern = re.compile(component.pattern)
        return lambda _, responses: np.array([float(bool(pattern.search(text))) for text in responses], np.float32)
    assert isinstance(component, PythonComponent)
    return _python_function(component)


def _python_function(component: PythonComponent) -> Rule:
    module_name, _, name = component.function.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # importing a user's module may raise anything
        raise ConfigError(
            f"component {component.name!r}: function {component.function!r} cannot be imported: "
            f"{type(error).__name__}: {error}. Install its module where replicas run, or put it into their working "
            "directory"
        ) from error
    if not callable(function):
        raise ConfigError(f"component {component.name!r}: {component.function!r} is not callable: {function!r:.80}")

    def rule(prompts: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
        try:
            returned_S = np.asarray(function(list(prompts), list(responses)))
        except (Exception, SystemExit) as error:
            raise ComponentError(
                f"component {component.name!r}: {component.function} failed: {type(error).__name__}: {error}"
            ) from error
        is_numbers = returned_S.shape == (len(responses),) and returned_S.dtype.kind in "biuf"
        with np.errstate(over="ignore"):  # overflow gives infinity, which is rejected below
            value_S = returned_S.astype(np.float32) if is_numbers else np.full(len(responses), np.nan, np.float32)
        if not np.isfinite(value_S).all():
            where = f"; number {np.flatnonzero(~np.isfinite(value_S))[0]} is not finite" if is_numbers else ""
            raise ComponentError(
                f"component {component.name!r}: {component.function} must return a finite number for each of "
                f"{len(responses)} responses, and returned shape {returned_S.shape} of {returned_S.dtype}{where}"
            )
        return value_S

    return rule
