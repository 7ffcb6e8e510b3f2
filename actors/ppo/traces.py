"""Traces: responses of one or several turns, between which an environment, such as a tool, answers.

Shape legend: R tokens of one response, in all its turns and answers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.data.conversation import Prompt
from rlhf_critic.errors import ConfigError
from rlhf_critic.model.generation import Response, TransformersGenerator, VllmGenerator

# Takes prompts and transcripts, which are the texts of each trace: turn, answer, turn and so on. Returns for each trace
# a text that answers the last turn, or None if the trace has ended; or a pair of that and the reward of the turn.
Environment: TypeAlias = Callable[[list[Prompt], list[list[str]]], Sequence[Any]]


@dataclass
class Trace:
    """A response while it is sampled.

    Attributes:
        texts: Texts of the turns and of the answers between them.
        truncated: Whether the response was cut before its end.
    """

    texts: list[str] = field(default_factory=list)
    truncated: bool = False
    _ids: list[NDArray[np.int64]] = field(default_factory=list)
    _log_probs: list[NDArray[np.float32]] = field(default_factory=list)
    _is_sampled: list[bool] = field(default_factory=list)
    _rewards: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self._ids))

    @property
    def ids(self) -> NDArray[np.int64]:
        """Token ids of turns and answers, int64 ``[R]``."""
        return np.concatenate(self._ids) if self._ids else np.zeros(0, dtype=np.int64)

    @property
    def log_probs(self) -> NDArray[np.float32]:
        """Log-probabilities of the sampled tokens, in nats, fp32 ``[R]``; 0 in answers."""
        return np.concatenate(self._log_probs)

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """True at the tokens that the policy sampled, bool ``[R]``; None if it sampled all."""
        return None if all(self._is_sampled) else np.repeat(self._is_sampled, [len(ids) for ids in self._ids])

    @property
    def token_rewards(self) -> NDArray[np.float32] | None:
        """Rewards of the turns at the last token of each, fp32 ``[R]``; None if there are none."""
        if not any(self._rewards):
            return None
        rewards = np.zeros(len(self), dtype=np.float32)
        rewards[np.cumsum([len(ids) for ids in self._ids]) - 1] = self._rewards
        return rewards

    def add_turn(self, response: Response, room: int, text_of: Callable[[NDArray[np.int64], bool], str]) -> None:
        """Adds a turn of the policy, cut to the tokens that there is room for."""
        ids, self.truncated = response.ids[:room], response.truncated or len(response.ids) > room
        self._add(ids, response.log_probs[:room], True, text_of(ids, self.truncated))

    def add_answer(self, ids: Sequence[int], text: str) -> None:
        """Adds an answer of the environment."""
        self._add(np.array(ids, dtype=np.int64), np.zeros(len(ids), dtype=np.float32), False, text)

    def reward_turn(self, reward: float) -> None:
        """Gives a reward to the last turn."""
        self._rewards[-1] = reward

    def _add(self, ids: NDArray[np.int64], log_probs: NDArray[np.float32], is_sampled: bool, text: str) -> None:
        self._ids.append(ids)
        self._log_probs.append(log_probs)
        self._is_sampled.append(is_sampled)
        self._rewards.append(0.0)
        self.texts.append(text)


def load_environment(function: str | None) -> Environment | None:
    """Imports the function ``MODULE:FUNCTION`` of the option ``rollout.environment``.

    Raises:
        ConfigError: It cannot be imported, or is not callable.
    """
    if function is None:
        return None
    module, _, name = function.partition(":")
    try:
        environment = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a user's module may raise anything
        raise ConfigError(
            f"rollout.environment: {function!r} cannot be imported: {type(error).__name__}: {error}. Write it as "
            "MODULE:FUNCTION, and install its module where rollout workers run"
        ) from error
    if not callable(environment):
        raise ConfigError(f"rollout.environment: {function!r} is not a function")
    return environment


def decode_turn(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64], truncated: bool) -> str:
    """Decodes a turn without the token that ends it. Special tokens stay visible, because they are part of the text."""
    content = ids if truncated else ids[:-1]
    return str(tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def sample_traces(
    generator: TransformersGenerator | VllmGenerator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[TokenIds],
    max_tokens: int,
    seed: int,
    environment: Environment | None = None,
    max_turns: int = 1,
) -> list[Trace]:
    """Samples a trace for each prompt: turns of the policy, between which the environment answers.

    Args:
        generator: Generator with the policy's weights.
        tokenizer: Tokenizer of the policy.
        prompts: Prompts, which the environment gets.
        prompt_ids: Token ids of the prompts.
        max_tokens: Maximum tokens of a response, answers included.
        seed: Random seed; turn k of the traces has ``seed + k``.
        environment: Answers turns; None samples one turn.
        max_turns: Maximum number of turns, after which a trace counts as truncated.

    Raises:
        ConfigError: The environment failed, or returned something else than answers.
        DivergedError: The policy's output is NaN or infinite.
    """
    traces, active = [Trace() for _ in prompts], list(range(len(prompts)))

    def text_of(ids: NDArray[np.int64], truncated: bool) -> str:
        return decode_turn(tokenizer, ids, truncated)

    for turn in range(max_turns if environment else 1):
        room = [max_tokens - len(traces[row]) for row in active]
        read = [[*prompt_ids[row], *traces[row].ids.tolist()] for row in active]
        for row, left, response in zip(active, room, generator.generate(read, max(room), seed + turn), strict=True):
            traces[row].add_turn(response, left, text_of)
        if environment is None:
            break
        asked = [prompts[row] for row in active], [list(traces[row].texts) for row in active]
        answered = []
        for row, (text, reward) in zip(active, _ask(environment, *asked), strict=True):
            trace = traces[row]
            trace.reward_turn(reward)
            if text is None or trace.truncated:
                continue
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if turn + 1 == max_turns or len(trace) + len(ids) >= max_tokens:
                trace.truncated = True
                continue
            trace.add_answer(ids, text)
            answered.append(row)
        active = answered
        if not active:
            break
    return traces


def _ask(
    environment: Environment, prompts: list[Prompt], transcripts: list[list[str]]
) -> list[tuple[str | None, float]]:
    try:
        answers = list(environment(prompts, transcripts))
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(f"rollout.environment failed: {type(error).__name__}: {error}") from error
    pairs = [answer if isinstance(answer, tuple) else (answer, 0.0) for answer in answers]
    for pair in pairs:
        is_answer = len(pair) == 2 and isinstance(pair[0], str | None) and isinstance(pair[1], int | float)
        if not is_answer or not np.isfinite(pair[1]):
            raise ConfigError(
                f"rollout.environment returned {pair!r:.80}: return a text, None, or a pair of one of them and a reward"
            )
    if len(pairs) != len(prompts):
        raise ConfigError(f"rollout.environment returned {len(pairs)} answers for {len(prompts)} traces")
    return pairs
