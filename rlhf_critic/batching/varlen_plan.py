"""Plans of attention over a prefix tree by kernels for sequences of variable length ("varlen").

Such a kernel takes packed rows of queries and keys, and where each sequence begins in them. Two plans compute the same:

- *paths*: one call, in which each run asks its whole path. The mask is causal, aligned at the bottom right, because the
  tokens of a run are the last of their path. Windows stay exact. Keys are copied once for each run below them.
- *levels*: one causal call, in which each run asks itself, and one call for each level of branching, in which all that
  is below a token asks the run of that token up to it. Their outputs are joined by log-sum-exp.

`plan_calls` takes the cheaper one. Queries are the computed tokens in order. Keys are these, followed by the tokens
that a cache has. Knows nothing about models or kernels.

Shape legend: T tokens of the packed row, R runs of the tree or those that are computed, Q queries, N keys, B sequences
of a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_critic.batching.device_copy import copy_to_device
from rlhf_critic.batching.prefix_tree import IntArray, PrefixTree

# Copied keys per query of all levels at which levels become cheaper than paths: a level moves its queries, outputs and
# log-sum-exps, which have more heads than keys.
LEVELS_FROM = 4


@dataclass(frozen=True, eq=False)
class VarlenCall:
    """One call of a varlen kernel: B pairs of a sequence of queries and a sequence of keys.

    Attributes:
        queries_Q: Positions of the queries among all queries, int64; None if the call has all of them in order.
        keys_N: Places of the keys, int64; None if the call has all of them in order.
        query_starts_B: Position of the first query of each sequence, and the end of the last, int32 ``[B + 1]``.
        key_starts_B: Position of the first key of each sequence, and the end of the last, int32 ``[B + 1]``.
        max_queries: Length of the longest sequence of queries.
        max_keys: Length of the longest sequence of keys.
        causal: Whether query i of q sees the first n - q + i + 1 of its n keys. Otherwise it sees all.
    """

    queries_Q: Tensor | None
    keys_N: Tensor | None
    query_starts_B: Tensor
    key_starts_B: Tensor
    max_queries: int
    max_keys: int
    causal: bool

    def tensors(self) -> dict[str, Tensor]:
        """Returns the arrays of the call by the names of their attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True, eq=False)
class TreeCalls:
    """The calls of one plan. If there are several, they are those of levels, and the first one covers all queries.

    Attributes:
        every: Calls in which all tokens are queries.
        leaves: Calls in which the last token of each run is a query; query r belongs to run r.
    """

    every: tuple[VarlenCall, ...]
    leaves: tuple[VarlenCall, ...]

    def to(self, device: torch.device | str) -> TreeCalls:
        """Copies all arrays to a device together."""
        return self.with_tensors(copy_to_device(self.tensors(), device))

    def tensors(self) -> list[Tensor]:
        """Returns all arrays."""
        return [tensor for call in (*self.every, *self.leaves) for tensor in call.tensors().values()]

    def with_tensors(self, tensors: Iterable[Tensor]) -> TreeCalls:
        """Returns the same calls with other tensors, in the order of `tensors`."""
        rest = iter(tensors)

        def replaced(call: VarlenCall) -> VarlenCall:
            moved: dict[str, Any] = dict(zip(call.tensors(), rest, strict=False))
            return replace(call, **moved)

        return TreeCalls(tuple(map(replaced, self.every)), tuple(map(replaced, self.leaves)))


def plan_calls(tree: PrefixTree, *, paths_only: bool = False) -> TreeCalls:
    """Plans attention over a tree, on the host.

    Args:
        tree: The tree.
        paths_only: Whether the kernel needs *paths*: for windows that sequences exceed, or because it does not return
            the log-sum-exp.
    """
    runs = tree.computed_runs
    lengths_R = (tree.run_ends_R - tree.run_starts_R)[runs]
    asked = max(tree.computed_tokens, int((lengths_R * run_depths(tree)[runs]).sum()))
    copied = int((tree.position_ids_T[tree.run_ends_R[runs] - 1] + 1).sum())
    return path_calls(tree) if paths_only or copied <= LEVELS_FROM * asked else level_calls(tree)


def path_calls(tree: PrefixTree) -> TreeCalls:
    """Plans one call: every run, or its last token, asks its whole path."""
    owners, starts, ends = [], [], []
    runs = run = tree.computed_runs
    owner = np.arange(len(runs))
    end = tree.run_ends_R[runs]
    while len(run):  # one step towards the root at a time, for all runs together
        owners.append(owner)
        starts.append(tree.run_starts_R[run])
        ends.append(end)
        parent = tree.run_parents_R[run]
        below = parent >= 0
        owner, run, end = owner[below], tree.run_of_T[parent[below]], parent[below] + 1
    # Run by run, the part of the path nearest the root first.
    order = np.argsort(np.concatenate(owners[::-1]), kind="stable")
    starts_P, ends_P = (np.concatenate(parts[::-1])[order] for parts in (starts, ends))
    shared = len(owners) > 1
    keys_N = torch.from_numpy(_ranges(tree.places_T[starts_P], ends_P - starts_P)) if shared else None
    path_lengths_R = tree.position_ids_T[tree.run_ends_R[runs] - 1] + 1
    every = _call(None, keys_N, (tree.run_ends_R - tree.run_starts_R)[runs], path_lengths_R, causal=True)
    return TreeCalls((every,), (_for_leaves(every, np.ones_like(path_lengths_R)),))


def level_calls(tree: PrefixTree) -> TreeCalls:
    """Plans a causal call of all runs on themselves, and a call for each level of branching, from the root on."""
    lengths_R = (tree.run_ends_R - tree.run_starts_R)[tree.computed_runs]
    computed_T = torch.arange(tree.computed_tokens) if tree.is_cached_R.any() else None
    own = _call(None, computed_T, lengths_R, lengths_R, causal=True)
    every, leaves = [own], [_for_leaves(own, np.ones_like(lengths_R))]
    branching_C = np.flatnonzero(tree.run_parents_R >= 0)
    # Runs that branch off at the same token, and their descendants, are adjacent in the row.
    parents_A, index_C = np.unique(tree.run_parents_R[branching_C], return_inverse=True)
    starts_A, ends_A = np.full(len(parents_A), len(tree)), np.zeros(len(parents_A), dtype=np.int64)
    np.minimum.at(starts_A, index_C, tree.run_starts_R[branching_C])
    np.maximum.at(ends_A, index_C, tree.subtree_ends_R[branching_C])
    runs_A = tree.run_of_T[parents_A]
    key_starts_A, key_lengths_A = tree.places_T[tree.run_starts_R[runs_A]], parents_A + 1 - tree.run_starts_R[runs_A]
    starts_A, ends_A = tree.computed_before_T[starts_A], tree.computed_before_T[ends_A]
    run_starts_R = tree.computed_before_T[tree.run_starts_R[tree.computed_runs]]
    first_runs_A, last_runs_A = (np.searchsorted(run_starts_R, edges_A) for edges_A in (starts_A, ends_A))
    depths_A = run_depths(tree)[runs_A]
    for level in np.unique(depths_A).tolist():
        chosen = np.flatnonzero(depths_A == level)
        chosen = chosen[np.argsort(starts_A[chosen])]
        keys_N = torch.from_numpy(_ranges(key_starts_A[chosen], key_lengths_A[chosen]))
        for calls, edges in ((every, (starts_A, ends_A)), (leaves, (first_runs_A, last_runs_A))):
            query_starts, query_lengths = edges[0][chosen], (edges[1] - edges[0])[chosen]
            queries_Q = torch.from_numpy(_ranges(query_starts, query_lengths))
            calls.append(_call(queries_Q, keys_N, query_lengths, key_lengths_A[chosen], causal=False))
    return TreeCalls(tuple(every), tuple(leaves))


def run_depths(tree: PrefixTree) -> IntArray:
    """Returns the number of runs above each run, int64 ``[R]``."""
    depths_R = np.zeros(len(tree.run_starts_R), dtype=np.int64)
    parent = tree.run_parents_R
    while (below := parent >= 0).any():
        depths_R += below
        parent = np.where(below, tree.run_parents_R[tree.run_of_T[parent]], -1)
    return depths_R


def _call(
    queries_Q: Tensor | None, keys_N: Tensor | None, query_lengths_B: IntArray, key_lengths_B: IntArray, *, causal: bool
) -> VarlenCall:
    starts = (_starts(query_lengths_B), _starts(key_lengths_B))
    return VarlenCall(queries_Q, keys_N, *starts, int(query_lengths_B.max()), int(key_lengths_B.max()), causal)


def _for_leaves(call: VarlenCall, ones_R: IntArray) -> VarlenCall:
    return replace(call, query_starts_B=_starts(ones_R), max_queries=1)


def _starts(lengths_B: IntArray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int32))


def _ranges(starts_B: IntArray, lengths_B: IntArray) -> IntArray:
    """Returns start, start + 1, ... of each range, one range after the other."""
    ends_B = np.cumsum(lengths_B)
    return np.repeat(starts_B - (ends_B - lengths_B), lengths_B) + np.arange(ends_B[-1])
