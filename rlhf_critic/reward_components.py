"""A reward as a weighted sum of named components: the critic, and rules beside it.

Each component gives a number for every item and is reported by itself, before its weight. Knows nothing of how the
critic's reward is computed.

Shape legend: S items.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.encoding import Prompt
from rlhf_critic.errors import ComponentError, ConfigError, ScorerRejected
from rlhf_critic.scorer_config import Component, CriticComponent, LengthPenalty, PythonComponent, RegexComponent
from rlhf_critic.scoring import Conversation, Item, Text

Rewards = NDArray[np.float32]
Rule = Callable[[Sequence[Prompt], Sequence[str]], Rewards]
CountTokens = Callable[[str], int]


class RewardComponents:
    """Adds components to a critic's rewards.

    Args:
        components: With exactly one critic among them.
        count_tokens: Of a text, by the critic's tokenizer; may be called by several threads.

    Raises:
        ConfigError: A Python component's function cannot be imported.
    """

    def __init__(self, components: Sequence[Component], count_tokens: CountTokens) -> None:
        self._components = tuple(components)
        self._rules = {
            component.name: _rule(component, count_tokens)
            for component in components
            if not isinstance(component, CriticComponent)
        }

    def combine(self, items: Sequence[Item], critic_S: Rewards) -> tuple[Rewards, dict[str, Rewards]]:
        """The weighted sum, and each component before its weight; no components where the critic is the only one.

        Args:
            items: What was scored.
            critic_S: The critic's rewards, fp32.

        Raises:
            ScorerRejected: A component needs the response, and an item does not say what that is.
            ComponentError: A function failed, or did not return a finite number for each item.
        """
        values = {}
        if self._rules:
            prompts, responses = _prompts_and_responses(items)
            values = {name: rule(prompts, responses) for name, rule in self._rules.items()}
        total_S = np.zeros(len(items), dtype=np.float32)
        by_name = {}
        for component in self._components:
            value_S = critic_S if isinstance(component, CriticComponent) else values[component.name]
            by_name[component.name] = value_S
            total_S += np.float32(component.weight) * value_S
        return total_S, by_name if len(by_name) > 1 else {}


def _prompts_and_responses(items: Sequence[Item]) -> tuple[list[Prompt], list[str]]:
    pairs: list[tuple[Prompt, str]] = []
    for index, item in enumerate(items):
        if isinstance(item, Conversation):
            pairs.append((item.prompt, item.response))
        elif isinstance(item, Text) and item.response is not None:
            pairs.append((item.text.removesuffix(item.response), item.response))
        else:
            raise ScorerRejected(
                "no_response",
                f"item {index} does not say which part of it is the response, and this reward has components that "
                "judge responses: send prompt and response",
            )
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def _rule(component: Component, count_tokens: CountTokens) -> Rule:
    if isinstance(component, LengthPenalty):
        return _length_penalty(component, count_tokens)
    if isinstance(component, RegexComponent):
        pattern = re.compile(component.pattern)
        return lambda _, responses: np.array([float(bool(pattern.search(text))) for text in responses], np.float32)
    assert isinstance(component, PythonComponent)
    return _python_function(component)


def _length_penalty(component: LengthPenalty, count_tokens: CountTokens) -> Rule:
    def penalty(_: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
        lengths_S = np.array([count_tokens(text) for text in responses])
        return -np.maximum(lengths_S - component.free_tokens, 0).astype(np.float32)

    return penalty


def _python_function(component: PythonComponent) -> Rule:
    module_name, _, name = component.function.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"component {component.name!r}: function {component.function!r} cannot be imported: {error}. Its module "
            "must be installed, or in the working directory, where replicas run"
        ) from error

    def rule(prompts: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
        try:
            returned_S = np.asarray(function(list(prompts), list(responses)), dtype=np.float32)
        except Exception as error:
            raise ComponentError(
                f"component {component.name!r}: {component.function} failed: {type(error).__name__}: {error}"
            ) from error
        if returned_S.shape != (len(responses),) or not np.isfinite(returned_S).all():
            raise ComponentError(
                f"component {component.name!r}: {component.function} must return a finite number for each of "
                f"{len(responses)} responses, and returned shape {returned_S.shape}"
            )
        return returned_S

    return rule
