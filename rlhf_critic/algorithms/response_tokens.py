"""Positions of the response tokens in a batch of rollouts.

A response token is an action of the policy. As in `rlhf_critic.algorithms.ppo`, action t of a rollout with a prompt of
p tokens samples token ``p + t`` after reading token ``p + t - 1``. A training step omits the last token of a rollout,
because no loss reads an output there. A mask excludes response tokens that the policy did not sample, such as the
output of a tool between two turns. Knows nothing about models.

Shape legend: S rollouts, A response tokens (actions) of all rollouts, R response tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.batching.prefix_tree import IntArray, TokenIds

Masks: TypeAlias = Sequence[NDArray[np.bool_]]


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
    def of(
        cls, sequences: Sequence[TokenIds], prompt_lengths: Sequence[int], masks: Masks | None = None
    ) -> ResponseTokens:
        """Finds the response tokens of rollouts that `validate_rollouts` accepted, or those that masks select."""
        pairs = list(zip(sequences, prompt_lengths, strict=True))
        counts_S = [len(ids) - length for ids, length in pairs]
        tokens = cls(
            np.repeat(np.arange(len(sequences)), counts_S),
            np.concatenate([np.arange(length - 1, len(ids) - 1) for ids, length in pairs]).astype(np.int64),
            np.concatenate([np.asarray(ids, dtype=np.int64)[length:] for ids, length in pairs]),
        )
        if masks is None:
            return tokens
        mask_A = np.concatenate(masks)
        return cls(tokens.rows_A[mask_A], tokens.columns_A[mask_A], tokens.drawn_A[mask_A])

    @property
    def places(self) -> tuple[IntArray, IntArray]:
        """Rows and columns of the values or logits that belong to the response tokens."""
        return self.rows_A, self.columns_A


def validate_rollouts(
    sequences: Sequence[TokenIds],
    prompt_lengths: Sequence[int],
    masks: Masks | None = None,
    **of_tokens: Sequence[NDArray[np.floating]],
) -> None:
    """Validates rollouts and the numbers of their response tokens.

    Args:
        sequences: Token ids of prompt and response.
        prompt_lengths: Tokens of each prompt.
        masks: True at the response tokens that the policy sampled, bool ``[R]`` each. None if it sampled all.
        **of_tokens: Numbers of each response token, one array ``[R]`` per rollout, by name. They are finite where the
            masks are True.

    Raises:
        ValueError: A prompt is empty or longer than its sequence, or numbers are missing, too many or not finite, or a
            mask does not fit. Names the rollout.
    """
    columns = of_tokens if masks is None else {"masks": masks, **of_tokens}
    for name, rows in (("prompt_lengths", prompt_lengths), *columns.items()):
        if len(rows) != len(sequences):
            raise ValueError(f"{len(sequences)} rollouts, but {name} has {len(rows)} entries; give one for each")
    for rollout, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= length <= len(ids):
            raise ValueError(
                f"rollout {rollout}: a prompt of {length} tokens in a sequence of {len(ids)}; it must have at least "
                "one token and no more than the sequence"
            )
        for name, rows in columns.items():
            numbers = np.asarray(rows[rollout])
            if numbers.shape != (len(ids) - length,):
                raise ValueError(
                    f"rollout {rollout}: {name} has the shape {numbers.shape}, but the response has "
                    f"{len(ids) - length} tokens; give one number for each"
                )
            if name == "masks":
                if numbers.dtype != np.bool_:
                    raise ValueError(f"rollout {rollout}: the mask has the dtype {numbers.dtype}; it must be bool")
                continue
            is_bad = ~np.isfinite(numbers) if masks is None else ~np.isfinite(numbers) & masks[rollout]
            if is_bad.any():
                first = int(is_bad.argmax())
                raise ValueError(f"rollout {rollout}: {name} is {numbers[first]} at action {first}")


def action_counts(
    sequences: Sequence[TokenIds], prompt_lengths: Sequence[int], masks: Masks | None = None
) -> list[int]:
    """Returns the number of response tokens of each rollout; with masks, of those that they select."""
    if masks is not None:
        return [int(np.count_nonzero(mask)) for mask in masks]
    return [len(ids) - length for ids, length in zip(sequences, prompt_lengths, strict=True)]


def nonempty_responses(
    sequences: Sequence[TokenIds], prompt_lengths: Sequence[int], masks: Masks | None = None
) -> list[int]:
    """Returns the rollouts with at least one response token; an empty response has nothing to train on."""
    return [row for row, count in enumerate(action_counts(sequences, prompt_lengths, masks)) if count]
