"""Steps of a response: the token at which each step ends. Knows nothing about templates, models or files.

The steps of a response are joined by line breaks. The value of a step is the critic's output at the token that holds
the step's last character. So it has read the step and, at most, the white space that this token holds too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_critic.data.conversation import STEP_SEPARATOR
from rlhf_critic.errors import EncodingError


def join_steps(steps: Sequence[str]) -> str:
    """Returns the response that consists of these steps."""
    return STEP_SEPARATOR.join(steps)


def find_step_ends(text: str, steps: Sequence[str], endings: Sequence[str]) -> list[int]:
    """Returns the position after the last character of each step in a rendered text.

    Args:
        text: A text that ends with the joined steps and one of the endings. Otherwise the steps are searched, without
            outer white space, from the end of the text.
        steps: The steps.
        endings: Texts that may follow the response.

    Raises:
        EncodingError: A step is empty, or the text does not hold it.
    """
    bare = [step.rstrip() for step in steps]
    if not steps or not all(bare):
        raise EncodingError("a response needs at least one step, and every step a text")
    response = join_steps(steps)
    for ending in endings:
        if text.endswith(response + ending):
            start = len(text) - len(ending) - len(response)
            starts = start + np.cumsum([0, *(len(step) + len(STEP_SEPARATOR) for step in steps[:-1])])
            return [int(at) + len(step) for at, step in zip(starts, bare, strict=True)]
    ends, limit = [], len(text)
    for step in reversed(bare):
        at = text.rfind(step.lstrip(), 0, limit)
        if at < 0:
            raise EncodingError(
                f"the chat template changes the step {step[:40]!r}, so its end is unknown; give another template "
                "(encoding.chat_template)"
            )
        ends.append(at + len(step.lstrip()))
        limit = at
    return ends[::-1]


def tokens_at(ends: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the index of the token that holds the last character before each end.

    Args:
        ends: Positions in a text, ascending.
        offsets: Start and end of each token in the text.

    Raises:
        EncodingError: Two steps end in one token.
    """
    starts = np.array([start for start, _ in offsets])
    # Of the tokens of one character, the last one.
    tokens = (np.searchsorted(starts, np.asarray(ends), side="left") - 1).tolist()
    if len(set(tokens)) < len(tokens):
        raise EncodingError("two steps end in the same token; join them, or give each step a text")
    return tokens
