"""Where in a batch of rollouts the policy's actions are: which token each drew, and after which token.

The alignment is that of `rlhf_critic.algorithms.ppo`: action t of a rollout with a prompt of p tokens draws token ``p + t`` after
reading token ``p + t - 1``. The last token of a rollout is read by nobody who is fitted, so a fit leaves it out. Knows
nothing of models.

Shape legend: S rollouts, A actions of all of them, R actions of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.batching.prefix_tree import IntArray, TokenIds


@dataclass(frozen=True, eq=False)
class ResponseTokens:
    """The actions of some rollouts, rollout by rollout.

    Attributes:
        rows_A: The rollout of each, int64.
        columns_A: The index in it of the token before the one that is drawn, int64.
        drawn_A: The id of the token that is drawn, int64.
    """

    rows_A: IntArray
    columns_A: IntArray
    drawn_A: IntArray

    @classmethod
    def of(cls, sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]) -> ResponseTokens:
        """Finds the actions of rollouts that `validate_rollouts` has seen."""
        pairs = list(zip(sequences, prompt_lengths, strict=True))
        counts_S = [len(ids) - length for ids, length in pairs]
        return cls(
            np.repeat(np.arange(len(sequences)), counts_S),
            np.concatenate([np.arange(length - 1, len(ids) - 1) for ids, length in pairs]).astype(np.int64),
            np.concatenate([np.asarray(ids, dtype=np.int64)[length:] for ids, length in pairs]),
        )

    @property
    def places(self) -> tuple[IntArray, IntArray]:
        """Rows and columns of the values or logits that belong to the actions."""
        return self.rows_A, self.columns_A


def validate_rollouts(
    sequences: Sequence[TokenIds], prompt_lengths: Sequence[int], **of_actions: Sequence[NDArray[np.floating]]
) -> None:
    """Checks that rollouts, and numbers of their actions, fit together.

    Args:
        sequences: Token ids of prompt and response.
        prompt_lengths: Tokens of each prompt.
        **of_actions: By what they are called: for each rollout a finite number for each action, ``[R]``.

    Raises:
        ValueError: Names the rollout whose prompt is empty or longer than its sequence, or whose numbers are too few,
            too many or not finite.
    """
    for name, rows in (("prompt_lengths", prompt_lengths), *of_actions.items()):
        if len(rows) != len(sequences):
            raise ValueError(f"{len(sequences)} rollouts, but {name} has {len(rows)} entries: give one for each")
    for rollout, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= length <= len(ids):
            raise ValueError(
                f"rollout {rollout}: a prompt of {length} tokens in a sequence of {len(ids)}: it must have at least "
                "one token and no more than the sequence"
            )
        for name, rows in of_actions.items():
            numbers = np.asarray(rows[rollout])
            if numbers.shape != (len(ids) - length,):
                raise ValueError(
                    f"rollout {rollout}: {name} has the shape {numbers.shape}, but the response has "
                    f"{len(ids) - length} tokens: give one number for each"
                )
            if not np.isfinite(numbers).all():
                first = int(np.isfinite(numbers).argmin())
                raise ValueError(f"rollout {rollout}: {name} is {numbers[first]} at action {first}")


def nonempty_responses(sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]) -> list[int]:
    """The rollouts that have an action; an empty response has nothing to be fitted to."""
    return [row for row, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)) if len(ids) > length]
