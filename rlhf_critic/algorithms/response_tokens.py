"""Positions of the response tokens in a batch of rollouts.

A response token is an action of the policy. As in `rlhf_critic.algorithms.ppo`, action t of a rollout with a prompt of
p tokens samples token ``p + t`` after reading token ``p + t - 1``. A training step omits the last token of a rollout,
because no loss reads an output there. Knows nothing about models.

Shape legend: S rollouts, A response tokens (actions) of all rollouts, R response tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.batching.prefix_tree import IntArray, TokenIds


@dataclass(frozen=True, eq=False)
class ResponseTokens:
    """Response tokens of rollouts, rollout by rollout.

    Attributes:
        rows_A: Rollout of each response token, int64.
        columns_A: Index, in its rollout, of the token before the response token, int64.
        drawn_A: Id of the response token, int64.
    """

    rows_A: IntArray
    columns_A: IntArray
    drawn_A: IntArray

    @classmethod
    def of(cls, sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]) -> ResponseTokens:
        """Finds the response tokens of rollouts that `validate_rollouts` accepted."""
        pairs = list(zip(sequences, prompt_lengths, strict=True))
        counts_S = [len(ids) - length for ids, length in pairs]
        return cls(
            np.repeat(np.arange(len(sequences)), counts_S),
            np.concatenate([np.arange(length - 1, len(ids) - 1) for ids, length in pairs]).astype(np.int64),
            np.concatenate([np.asarray(ids, dtype=np.int64)[length:] for ids, length in pairs]),
        )

    @property
    def places(self) -> tuple[IntArray, IntArray]:
        """Rows and columns of the values or logits that belong to the response tokens."""
        return self.rows_A, self.columns_A


def validate_rollouts(
    sequences: Sequence[TokenIds], prompt_lengths: Sequence[int], **of_tokens: Sequence[NDArray[np.floating]]
) -> None:
    """Validates rollouts and the numbers of their response tokens.

    Args:
        sequences: Token ids of prompt and response.
        prompt_lengths: Tokens of each prompt.
        **of_tokens: Finite numbers of each response token, one array ``[R]`` per rollout, by name.

    Raises:
        ValueError: A prompt is empty or longer than its sequence, or numbers are missing, too many or not finite. Names
            the rollout.
    """
    for name, rows in (("prompt_lengths", prompt_lengths), *of_tokens.items()):
        if len(rows) != len(sequences):
            raise ValueError(f"{len(sequences)} rollouts, but {name} has {len(rows)} entries; give one for each")
    for rollout, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= length <= len(ids):
            raise ValueError(
                f"rollout {rollout}: a prompt of {length} tokens in a sequence of {len(ids)}; it must have at least "
                "one token and no more than the sequence"
            )
        for name, rows in of_tokens.items():
            numbers = np.asarray(rows[rollout])
            if numbers.shape != (len(ids) - length,):
                raise ValueError(
                    f"rollout {rollout}: {name} has the shape {numbers.shape}, but the response has "
                    f"{len(ids) - length} tokens; give one number for each"
                )
            if not np.isfinite(numbers).all():
                first = int(np.isfinite(numbers).argmin())
                raise ValueError(f"rollout {rollout}: {name} is {numbers[first]} at action {first}")


def nonempty_responses(sequences: Sequence[TokenIds], prompt_lengths: Sequence[int]) -> list[int]:
    """Returns the rollouts with at least one response token; an empty response has nothing to train on."""
    return [row for row, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)) if len(ids) > length]
