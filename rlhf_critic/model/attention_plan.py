"""Attention pattern of a prefix tree: which queries attend to which keys, in the forms that kernels take.

The plan is shared by all layers of a forward pass. Knows nothing about models or kernels.

Shape legend: T computed tokens, R computed runs, Q queries, N keys, B branching tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhf_critic.batching.prefix_tree import PrefixTree
from rlhf_critic.batching.prefix_tree_batch import PrefixTreeBatch
from rlhf_critic.batching.varlen_plan import VarlenCall
from rlhf_critic.model.key_value_store import KeyValueStore, ShapeRecorder


@dataclass(frozen=True)
class Block:
    """Range of computed queries, and the range of the tokens that are their keys: computed ones, or cached ones."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Attention pattern of the prefix tree of a batch.

    With ``leaves_only``, the last layer computes only the last token of every run and leaves the rest undefined.
    ``store`` has the keys and values of the batch's cached tokens.
    """

    batch: PrefixTreeBatch
    leaves_only: bool
    store: KeyValueStore | ShapeRecorder | None = None

    @property
    def tree(self) -> PrefixTree:
        """The tree."""
        return self.batch.tree

    @property
    def leaf_tokens_R(self) -> Tensor:
        """Index of the last token of each run. Every sequence ends in one of them."""
        return self.batch.leaf_tokens_R

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of a layer, ``[1, K, T, E]``, with those of cached tokens behind them."""
        if self.store is None:
            return key, value
        return self.store.extend(layer, key, value, self.batch.slots)

    def calls(self, for_leaves: bool, *, paths_only: bool) -> tuple[VarlenCall, ...]:
        """Returns the calls of varlen kernels for all tokens, or for the last token of each run."""
        calls = self.batch.path_calls if paths_only else self.batch.cheaper_calls
        return calls.leaves if for_leaves else calls.every

    @cached_property
    def paths_R(self) -> tuple[Tensor, ...]:
        """Indices of the tokens of each run and of their ancestors, in order from the root, on the device."""
        tree = self.tree
        (call,) = self.batch.path_calls.every
        keys_N = torch.arange(len(tree), device=self.batch.device) if call.keys_N is None else call.keys_N
        return keys_N.split((tree.position_ids_T[tree.run_ends_R[tree.computed_runs] - 1] + 1).tolist())

    @cached_property
    def own_blocks(self) -> list[Block]:
        """Causal blocks of every computed run attending to itself."""
        tree = self.tree
        starts, ends = (
            tree.computed_before_T[edges_R[tree.computed_runs]].tolist()
            for edges_R in (tree.run_starts_R, tree.run_ends_R)
        )
        return [Block(start, end, start, end) for start, end in zip(starts, ends, strict=True)]

    @cached_property
    def branch_blocks(self) -> list[Block]:
        """Blocks of branches: for every branching token, its descendants attend to its run up to that token."""
        tree = self.tree
        branches: dict[int, tuple[int, int]] = {}
        # Runs that branch off at the same token, and their descendants, are adjacent in the row.
        columns = (tree.run_parents_R.tolist(), tree.run_starts_R.tolist(), tree.subtree_ends_R.tolist())
        for parent, start, end in zip(*columns, strict=True):
            if parent >= 0:
                branches[parent] = (branches.get(parent, (start, end))[0], end)
        parents_B = np.array(list(branches), dtype=np.int64)
        queries_B2 = tree.computed_before_T[np.array(list(branches.values()), dtype=np.int64).reshape(-1, 2)]
        first_keys_B = tree.places_T[tree.run_starts_R[tree.run_of_T[parents_B]]]
        blocks = np.column_stack([queries_B2, first_keys_B, tree.places_T[parents_B] + 1])
        return [Block(*block) for block in blocks.tolist()]

    @cached_property
    def leaf_blocks(self) -> tuple[list[Block], list[Block]]:
        """`own_blocks` and `branch_blocks` for the last token of each run only; query r belongs to computed run r."""
        own = [Block(run, run + 1, block.key_start, block.key_end) for run, block in enumerate(self.own_blocks)]
        starts = [block.query_start for block in self.own_blocks]
        first_run_at = {start: run for run, start in enumerate([*starts, self.batch.computed_tokens])}
        branches = [
            Block(first_run_at[block.query_start], first_run_at[block.query_end], block.key_start, block.key_end)
            for block in self.branch_blocks
        ]
        return own, branches
