"""A radix tree over token ids, in which sequences with a common prefix share its tokens.

`PrefixTree.build` takes any set of sequences and needs no prompt boundaries. It lays the tree out as one packed row of
tokens in depth-first order, each shared prefix once. In this order the *run* of a sequence (the tokens that it adds to
those before it) is contiguous, and so is the subtree below a token. A token attends to its ancestors and itself, so it
has the same position and context as in its sequence alone. Tokens that a cache has are in the tree, but are not
computed. Knows nothing about models.

Shape legend: S sequences, T tokens of the packed row, R runs, L longest sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
TokenIds = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A radix tree as one packed row of tokens.

    Attributes:
        input_ids_T: Token ids of the packed row.
        position_ids_T: Distance of each token from the first token of its sequence.
        run_starts_R: Index of the first token of each run. Runs follow each other without a gap.
        run_parents_R: Index of the token that each run continues; -1 if the run begins a sequence.
        leaves_S: Index of the last token of each sequence.
        lengths_S: Length of each sequence in tokens.
        run_sequences_R: Index of the sequence to which each run was added.
        is_cached_R: Whether a cache has the tokens of each run, bool. No run is cached in part.
    """

    input_ids_T: IntArray
    position_ids_T: IntArray
    run_starts_R: IntArray
    run_parents_R: IntArray
    leaves_S: IntArray
    lengths_S: IntArray
    run_sequences_R: IntArray
    is_cached_R: NDArray[np.bool_]

    @classmethod
    def build(cls, sequences: Sequence[TokenIds], cached_S: Sequence[int] | None = None) -> PrefixTree:
        """Builds the tree of any set of sequences.

        Sorting puts sequences with a common prefix next to each other. The longest prefix that a sequence shares with
        any earlier one is the prefix shared with its neighbour, so one pass over neighbours finds every branch.

        Args:
            sequences: Token ids. Duplicates and sequences that are prefixes of others are allowed.
            cached_S: Number of first tokens of each sequence that a cache has, less than its length. None without a
                cache.

        Raises:
            ValueError: There are no sequences, or one is empty or cached up to its end.
        """
        if not sequences or not all(len(sequence) for sequence in sequences):
            raise ValueError("a batch needs at least one sequence and every sequence at least one token")
        if cached_S is not None and not all(map(operator.lt, cached_S, map(len, sequences))):
            raise ValueError("the last token of every sequence must be computed")
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        order = lexicographic_order(arrays)
        shared = shared_lengths([arrays[index] for index in order])
        leaves_S = np.empty(len(arrays), dtype=np.int64)
        ids, positions, starts, parents, owners, are_cached = [], [], [], [], [], []
        path: list[tuple[int, int]] = []  # start of each run of the sequence added last, in it and in the row
        size = 0
        for index, common in zip(order, shared, strict=True):
            array = arrays[index]
            while path and path[-1][0] >= common:
                path.pop()
            parent = path[-1][1] + common - 1 - path[-1][0] if path else -1
            if common < len(array):
                ids.append(array[common:])
                positions.append(np.arange(common, len(array)))
            for first, end, is_cached in _runs_of(common, cached_S[index] if cached_S is not None else 0, len(array)):
                starts.append(size)
                parents.append(parent)
                owners.append(index)
                are_cached.append(is_cached)
                path.append((first, size))
                size += end - first
                parent = size - 1
            leaves_S[index] = parent
        return cls(
            np.concatenate(ids),
            np.concatenate(positions),
            np.array(starts, dtype=np.int64),
            np.array(parents, dtype=np.int64),
            leaves_S,
            np.array([len(array) for array in arrays], dtype=np.int64),
            np.array(owners, dtype=np.int64),
            np.array(are_cached, dtype=np.bool_),
        )

    def __len__(self) -> int:
        return len(self.input_ids_T)

    @cached_property
    def run_ends_R(self) -> IntArray:
        """Index after the last token of each run."""
        return np.append(self.run_starts_R[1:], len(self))

    @cached_property
    def run_of_T(self) -> IntArray:
        """Run of each token."""
        return np.repeat(np.arange(len(self.run_starts_R)), self.run_ends_R - self.run_starts_R)

    @cached_property
    def computed_runs(self) -> IntArray:
        """Runs that are computed, in order."""
        return np.flatnonzero(~self.is_cached_R)

    @cached_property
    def computed_before_T(self) -> IntArray:
        """Number of computed tokens before each token, and their number in all at the end, int64 ``[T + 1]``."""
        return np.concatenate([[0], np.cumsum(~self.is_cached_R[self.run_of_T])])

    @property
    def computed_tokens(self) -> int:
        """Number of tokens that are computed: all but the cached ones."""
        return int(self.computed_before_T[-1])

    @cached_property
    def places_T(self) -> IntArray:
        """Place of each token among those that queries read: first the computed tokens, then the cached ones."""
        before_T = self.computed_before_T[:-1]
        cached_places_T = self.computed_tokens + np.arange(len(self)) - before_T
        return np.where(self.is_cached_R[self.run_of_T], cached_places_T, before_T)

    @cached_property
    def subtree_ends_R(self) -> IntArray:
        """Index after the last token of the subtree below the first token of each run."""
        ends = self.run_ends_R.tolist()
        parent_runs = np.where(self.run_parents_R >= 0, self.run_of_T[self.run_parents_R], -1).tolist()
        for run in range(len(ends) - 1, -1, -1):
            if parent_runs[run] >= 0:
                ends[parent_runs[run]] = max(ends[parent_runs[run]], ends[run])
        return np.array(ends, dtype=np.int64)

    @cached_property
    def subtree_ends_T(self) -> IntArray:
        """End of the subtree below each token (exclusive): t attends to u if ``u <= t < subtree_ends_T[u]``."""
        # Deeper branches come first in the row, so the last branch at or below a token ends the subtree of the token.
        below_T = np.zeros(len(self), dtype=np.int64)
        branches = np.flatnonzero(self.run_parents_R >= 0)
        np.maximum.at(below_T, self.run_parents_R[branches], self.subtree_ends_R[branches])
        for start, end in zip(self.run_starts_R.tolist(), self.run_ends_R.tolist(), strict=True):
            below_T[start:end] = np.maximum.accumulate(below_T[start:end][::-1])[::-1]
        return np.maximum(self.run_ends_R[self.run_of_T], below_T)

    def path_tokens(self, token: int) -> IntArray:
        """Returns the indices of a token's ancestors and of the token, in order from the root."""
        pieces = []
        while token >= 0:
            run = self.run_of_T[token]
            pieces.append(np.arange(self.run_starts_R[run], token + 1))
            token = self.run_parents_R[run]
        return np.concatenate(pieces[::-1])


def _runs_of(start: int, cached: int, end: int) -> list[tuple[int, int, bool]]:
    """Returns first token, end and whether it is cached of each run that a sequence adds from ``start`` on."""
    cached = min(max(cached, start), end)
    return [run for run in ((start, cached, True), (cached, end, False)) if run[0] < run[1]]


def lexicographic_order(arrays: Sequence[IntArray]) -> list[int]:
    """Returns the order that puts sequences with a common prefix next to each other, shorter ones first."""
    # Big-endian bytes compare in the same order as the ids, and the comparison runs in C.
    keys = [array.astype(">u4").tobytes() for array in arrays]
    return sorted(range(len(arrays)), key=keys.__getitem__)


def shared_length(first: IntArray, second: IntArray) -> int:
    """Returns the length of the common prefix of two sequences, in tokens."""
    common = min(len(first), len(second))
    if not common:
        return 0
    differ = first[:common] != second[:common]
    place = int(differ.argmax())
    return place if differ[place] else common


def shared_lengths(arrays: Sequence[IntArray]) -> list[int]:
    """Returns the length of the prefix that each sequence shares with the one before it; 0 for the first."""
    return [0, *(shared_length(first, second) for first, second in pairwise(arrays))]
