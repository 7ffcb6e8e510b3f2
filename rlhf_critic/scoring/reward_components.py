"""Rewards as a weighted sum of named components: the critic and rules.

Each component gives a number for every item. Answers also report its unweighted value. Knows nothing about how the
critic's reward is computed.

Shape legend: S items.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped]
from numpy.typing import NDArray

from rlhf_critic.config.serve import (
    Component,
    CriticComponent,
    LengthPenalty,
    PythonComponent,
    RegexComponent,
    UncertaintyComponent,
)
from rlhf_critic.data.conversation import Prompt, text_of
from rlhf_critic.errors import ComponentError, ConfigError, ScorerRejected, ScorerUnavailable
from rlhf_critic.scoring.items import Conversation, Item, Text

Rewards = NDArray[np.float32]
Rule = Callable[[Sequence[Prompt], Sequence[str]], Rewards]
CountTokens = Callable[[str], int]

REGEX_TIMEOUT_S = 10.0  # of the process's CPU time, for one text
CALLS_AT_ONCE = 32  # of one function


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
        self._functions: list[_TimeLimited] = []
        self._rules = {
            component.name: self._rule(component, count_tokens)
            for component in components
            if not isinstance(component, CriticComponent | UncertaintyComponent)
        }

    @property
    def is_critic_alone(self) -> bool:
        """Whether `combine` only weights numbers of the critic, which takes no time."""
        return not self._rules

    def check_healthy(self) -> None:
        """Checks that functions can still be called.

        Raises:
            ScorerUnavailable: As many calls of a function hang as may run at once.
        """
        for function in self._functions:
            function.check_healthy()

    def combine(
        self, items: Sequence[Item], critic_S: Rewards, stds_S: Rewards | None = None
    ) -> tuple[Rewards, dict[str, Rewards]]:
        """Returns the weighted sum and the unweighted components. The latter are empty if the critic is alone.

        Args:
            items: The scored items.
            critic_S: Rewards of the critic, fp32.
            stds_S: Their standard deviations, if the critic is calibrated, fp32.

        Raises:
            ScorerRejected: A component needs the response, and an item does not state it, or its text does not end
                with it.
            ComponentError: A function failed, took too long or did not return a finite number for each item, a regular
                expression took too long for an item, or a sum overflows.
        """
        values: dict[str, Rewards] = {}
        if self._rules:
            prompts, responses = _prompts_and_responses(items, self._ending)
            values = {name: rule(prompts, responses) for name, rule in self._rules.items()}
        for component in self._components:
            if isinstance(component, CriticComponent):
                values[component.name] = critic_S
            elif isinstance(component, UncertaintyComponent):
                assert stds_S is not None, "checked when the critic was loaded"
                values[component.name] = stds_S
        total_S = np.zeros(len(items), dtype=np.float32)
        by_name = {}
        for component in self._components:
            value_S = values[component.name]
            by_name[component.name] = value_S
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                total_S += np.float32(component.weight) * value_S
        if not np.isfinite(total_S).all():
            index = int(np.flatnonzero(~np.isfinite(total_S))[0])
            raise ComponentError(
                f"item {index}: the weighted sum of {', '.join(by_name)} is {total_S[index]}: lower the weights"
            )
        return total_S, by_name if len(by_name) > 1 else {}

    def _rule(self, component: Component, count_tokens: CountTokens) -> Rule:
        if isinstance(component, LengthPenalty):
            free = component.free_tokens
            return lambda _, responses: (
                -np.maximum([count_tokens(text) - free for text in responses], 0).astype(np.float32)
            )
        if isinstance(component, RegexComponent):
            return _regex_rule(component)
        assert isinstance(component, PythonComponent)
        function = _TimeLimited(component)
        self._functions.append(function)
        return _python_rule(component, function)


def _prompts_and_responses(items: Sequence[Item], ending: Callable[[], str]) -> tuple[list[Prompt], list[str]]:
    pairs: list[tuple[Prompt, str]] = []
    for index, item in enumerate(items):
        if isinstance(item, Conversation):
            pairs.append((item.prompt, text_of(item.response)))
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


def _regex_rule(component: RegexComponent) -> Rule:
    try:
        pattern = regex.compile(component.pattern)
    except regex.error as error:
        raise ConfigError(f"component {component.name!r}: the pattern is not a regular expression: {error}") from error

    def is_found(index: int, text: str) -> bool:
        try:
            # Releases the interpreter, which a pattern like (a+)+$ would hold for ever, and ends.
            return pattern.search(text, timeout=REGEX_TIMEOUT_S, concurrent=True) is not None
        except TimeoutError as error:
            raise ComponentError(
                f"item {index}: component {component.name!r}: the search for {component.pattern!r:.80} took longer "
                f"than {REGEX_TIMEOUT_S:g} s: write a pattern without nested repetitions"
            ) from error

    return lambda _, responses: np.array([float(is_found(*one)) for one in enumerate(responses)], np.float32)


class _TimeLimited:
    """A user's function. Each call has a thread and a time limit.

    A thread cannot be ended, so a call that hangs keeps its thread. The number of threads is limited.
    """

    def __init__(self, component: PythonComponent) -> None:
        self._name, self._limit_s = component.name, component.timeout_s
        self._function = _function_of(component)
        self._free = threading.Semaphore(CALLS_AT_ONCE)
        self._late: list[Future[Any]] = []

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        if not self._free.acquire(timeout=self._limit_s):
            raise self._too_slow()
        done: Future[Any] = Future()
        arguments = (done, list(prompts), list(responses))
        threading.Thread(target=self._run, args=arguments, name=f"component-{self._name}", daemon=True).start()
        wait([done], self._limit_s)
        if not done.done():
            self._late = [*(late for late in self._late if not late.done()), done]
            raise self._too_slow()
        return done.result()

    def check_healthy(self) -> None:
        """Raises `ScorerUnavailable` if every thread is taken by a call that hangs."""
        if sum(not late.done() for late in self._late) >= CALLS_AT_ONCE:
            raise ScorerUnavailable(f"component {self._name!r}: {CALLS_AT_ONCE} calls do not return")

    def _run(self, done: Future[Any], *arguments: Any) -> None:
        try:
            returned = self._function(*arguments)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(returned)
        finally:
            self._free.release()

    def _too_slow(self) -> ComponentError:
        return ComponentError(
            f"component {self._name!r}: no answer within {self._limit_s:g} s: raise timeout_s, or speed the function up"
        )


def _function_of(component: PythonComponent) -> Callable[..., Any]:
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
    return function


def _python_rule(component: PythonComponent, function: _TimeLimited) -> Rule:
    def rule(prompts: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
        try:
            returned_S = np.asarray(function(prompts, responses))
        except ComponentError:
            raise
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
