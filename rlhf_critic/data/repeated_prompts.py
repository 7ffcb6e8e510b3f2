"""Responses that repeat their prompt: a whole conversation, or a whole text, where only the answer is expected.

Turns say who speaks, so a row alone shows what is repeated. Texts do not: an answer may begin with the question. So
texts count as whole texts only if those of most rows of a source begin with their prompt, and then all must.

Knows nothing about files, tokens or models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_critic.data.conversation import Turn, Turns
from rlhf_critic.errors import DataError

Rejection = Callable[[str, str], DataError]  # of a field, with a message


def separate_turns(
    prompt: Turns, responses: Sequence[Turns], names: Sequence[str], reject: Rejection
) -> tuple[Turns, tuple[Turns, ...]]:
    """Returns the turns that all responses share, and the turns that each adds to them.

    A response that holds the prompt after its first turns is a whole conversation: its turns replace the prompt. A
    response that begins with the last turns of the prompt, such as the question without the system turn, loses these.
    Turns are equal if they differ in outer white space at most.

    Args:
        prompt: At least one turn.
        responses: At least one turn each.
        names: Field of each response.
        reject: Returns the error about a field.

    Raises:
        DataError: A response begins with a question that the prompt does not end with, or two responses are
            conversations that differ before the end of the prompt.
    """
    whole: list[tuple[str, Turns]] = []
    added = []
    for name, turns in zip(names, responses, strict=True):
        end = _end_of(prompt, turns)
        if end is not None:
            whole.append((name, turns[:end]))
            added.append(turns[end:])
            continue
        common = max(
            n for n in range(min(len(prompt), len(turns) - 1) + 1) if _same(prompt[len(prompt) - n :], turns[:n])
        )
        first, last = turns[common].role, prompt[-1].role
        if first == "system" or first == last == "user":
            raise reject(
                name,
                f"begins with a turn of the {first} that 'prompt' does not hold; give the answer's turns only, or a "
                "whole conversation and no 'prompt'",
            )
        added.append(turns[common:])
    for name, turns in whole[1:]:
        if not _same(turns, whole[0][1]):
            raise reject(
                name,
                f"begins with other turns than {whole[0][0]!r} before the end of 'prompt'; give both the same turns "
                "there, or leave out 'prompt'",
            )
    return whole[0][1] if whole else prompt, tuple(added)


def _end_of(prompt: Turns, turns: Turns) -> int | None:
    """Returns the number of turns up to the end of the prompt, if they are a whole conversation that holds it."""
    for start in range(len(turns) - len(prompt)):
        if start and turns[0].role == "assistant":
            return None  # an answer, and later turns of it
        if _same(turns[start : start + len(prompt)], prompt):
            return start + len(prompt)
    return None


def _same(left: Sequence[Turn], right: Sequence[Turn]) -> bool:
    def bare(turns: Sequence[Turn]) -> list[Turn]:
        return [
            turn.model_copy(update={"content": turn.content.strip()}) if isinstance(turn.content, str) else turn
            for turn in turns
        ]

    return left == right or bare(left) == bare(right)


@dataclass(frozen=True)
class TextRow:
    """A prompt and its responses, all of them texts.

    Attributes:
        place: Position of the row, as ``file:line``, for errors.
        prompt: The prompt.
        responses: The responses.
        names: Field of each response, for errors.
    """

    place: str
    prompt: str
    responses: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def repeats(self) -> list[bool]:
        """Whether each response begins with the prompt, as words, and says something after it."""
        prompt = self.prompt.strip()
        if not prompt:
            return [False] * len(self.responses)
        rests = [text.lstrip().removeprefix(prompt) for text in self.responses]
        return [
            text.lstrip().startswith(prompt) and bool(rest.strip()) and not (prompt[-1].isalnum() and rest[0].isalnum())
            for text, rest in zip(self.responses, rests, strict=True)
        ]

    def separated(self) -> tuple[str, tuple[str, ...]]:
        """Returns the prompt and the rest of each response. White space that all have after it goes to the prompt."""
        prompt = self.prompt.strip()
        rests = [text.lstrip().removeprefix(prompt) for text in self.responses]
        spaces = {rest[: len(rest) - len(rest.lstrip())] for rest in rests}
        space = spaces.pop() if len(spaces) == 1 else ""
        return self.prompt.rstrip() + space, tuple(rest.removeprefix(space) for rest in rests)


@dataclass
class RepeatCount:
    """Number of rows with a response that begins with its prompt, counted row by row.

    Attributes:
        rows: Number of rows.
        repeating: Number of rows with such a response.
        exception: Place and field of the first response that does not begin with its prompt, in a row where another
            does or none does; None if all do.
    """

    rows: int = 0
    repeating: int = 0
    exception: tuple[str, str] | None = None

    def add(self, row: TextRow) -> None:
        """Counts one row."""
        repeats = row.repeats
        self.rows += 1
        self.repeating += any(repeats)
        if self.exception is None and not all(repeats):
            self.exception = row.place, row.names[repeats.index(False)]

    def join(self, later: RepeatCount) -> None:
        """Adds the count of later rows."""
        self.rows += later.rows
        self.repeating += later.repeating
        self.exception = self.exception or later.exception

    def are_whole_texts(self) -> bool:
        """Returns whether all texts are whole texts.

        Raises:
            DataError: In most rows a response begins with the prompt, and in one row another response does not.
        """
        if 2 * self.repeating <= self.rows:
            return False
        if self.exception is not None:
            place, field = self.exception
            raise DataError(
                f"{place}: field {field!r}: does not begin with the prompt, but {self.repeating} of {self.rows} rows "
                "have a response that does. Remove the prompt from all responses, or let all begin with it. If answers "
                'really say it again, give prompts as turns ([{"role": "user", ...}])'
            )
        return True


def count_repeats(rows: Sequence[TextRow]) -> tuple[int, bool]:
    """Counts the rows with a response that begins with its prompt; returns also whether all texts are whole texts.

    Raises:
        DataError: In most rows a response begins with the prompt, and in one row another response does not.
    """
    count = RepeatCount()
    for row in rows:
        count.add(row)
    return count.repeating, count.are_whole_texts()
