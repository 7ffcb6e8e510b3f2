"""Batches of sequences as a prefix tree on a device. Knows nothing about models.

Shape legend: S sequences, T computed tokens in the order of the tree, R computed runs, L longest sequence, C tokens of
the tree that a cache has, M computed tokens that are kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhf_critic.batching.device_copy import copy_to_device, is_gpu
from rlhf_critic.batching.prefix_cache import Lease
from rlhf_critic.batching.prefix_tree import IntArray, PrefixTree, TokenIds
from rlhf_critic.batching.varlen_plan import TreeCalls, path_calls, plan_calls


@dataclass(frozen=True, eq=False)
class BatchSlots:
    """Slots of the tokens of a batch in the store of a cache.

    Attributes:
        cached_C: Slots of the cached tokens of the tree, int64 ``[C]``.
        kept_M: Slots for the first M computed tokens, int64 ``[M]``.
    """

    cached_C: Tensor
    kept_M: Tensor


@dataclass(frozen=True, eq=False)
class PrefixTreeBatch:
    """Sequences as one packed row on a device. The padded counterpart is `rlhf_critic.batching.padded.PaddedBatch`.

    Attributes:
        tree: Prefix tree of the sequences.
        input_ids_1T: Token ids, int64 ``[1, T]``.
        position_ids_1T: Positions, int64 ``[1, T]``.
        leaves_S: Index of the last token of each sequence, int64 ``[S]``.
        leaf_tokens_R: Index of the last token of each run, int64 ``[R]``. Every sequence ends in one.
        planned: Attention calls that came with the batch; None except on a GPU.
        slots: Slots of a cache; None without one.
    """

    tree: PrefixTree
    input_ids_1T: Tensor
    position_ids_1T: Tensor
    leaves_S: Tensor
    leaf_tokens_R: Tensor
    planned: TreeCalls | None
    slots: BatchSlots | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[TokenIds],
        device: torch.device | str = "cpu",
        *,
        paths_only: bool = False,
        lease: Lease | None = None,
    ) -> PrefixTreeBatch:
        """Builds the tree and copies it to a device, to a GPU with the attention calls and without waiting.

        Args:
            sequences: Token ids.
            device: Device of the batch.
            paths_only: See `rlhf_critic.batching.varlen_plan.plan_calls`.
            lease: Prefixes of the sequences that a cache has. Slots are reserved for the computed tokens.

        Raises:
            ValueError: There are no sequences, or one is empty.
        """
        tree = PrefixTree.build(sequences, [len(slots) for slots in lease.slots_S] if lease else None)
        ids_T, positions_T = tree.input_ids_T, tree.position_ids_T
        if tree.is_cached_R.any():
            is_computed_T = ~tree.is_cached_R[tree.run_of_T]
            ids_T, positions_T = ids_T[is_computed_T], positions_T[is_computed_T]
        leaves_R = tree.places_T[tree.run_ends_R[tree.computed_runs] - 1]
        arrays = [ids_T[None], positions_T[None], tree.places_T[tree.leaves_S], leaves_R]
        arrays += [_cached_slots(tree, lease), lease.reserve(tree.computed_tokens)] if lease else []
        tensors = [torch.from_numpy(array) for array in arrays]
        calls = plan_calls(tree, paths_only=paths_only) if is_gpu(device) else None
        tensors += calls.tensors() if calls else []
        ids, positions, leaves_S, leaf_tokens_R, *rest = copy_to_device(tensors, device)
        slots = BatchSlots(*rest[:2]) if lease else None
        planned = calls.with_tensors(rest[2:] if lease else rest) if calls else None
        return cls(tree, ids, positions, leaves_S, leaf_tokens_R, planned, slots)

    @property
    def device(self) -> torch.device:
        """Device of the batch."""
        return self.input_ids_1T.device

    @property
    def computed_tokens(self) -> int:
        """Number of tokens in a forward pass."""
        return self.tree.computed_tokens

    @cached_property
    def cheaper_calls(self) -> TreeCalls:
        """The cheaper plan of attention."""
        return self.planned or plan_calls(self.tree).to(self.device)

    @cached_property
    def path_calls(self) -> TreeCalls:
        """The plan of attention in which each run asks its whole path."""
        is_one_call = len(self.cheaper_calls.every) == 1
        return self.cheaper_calls if is_one_call else path_calls(self.tree).to(self.device)

    @cached_property
    def tokens_SL(self) -> Tensor:
        """Index of each token of each sequence, int64 ``[S, L]``; 0 past the end of a sequence.

        Indices from T on are those of cached tokens.
        """
        tokens_SL = np.zeros((len(self.tree.lengths_S), int(self.tree.lengths_S.max())), dtype=np.int64)
        for row, leaf in enumerate(self.tree.leaves_S):
            tokens_SL[row, : self.tree.lengths_S[row]] = self.tree.places_T[self.tree.path_tokens(int(leaf))]
        return copy_to_device([torch.from_numpy(tokens_SL)], self.device)[0]


def _cached_slots(tree: PrefixTree, lease: Lease) -> IntArray:
    """Returns the slots of the cached tokens of a tree, in its order."""
    slots: list[IntArray] = [np.empty(0, dtype=np.int64)]
    for run in np.flatnonzero(tree.is_cached_R).tolist():
        first = int(tree.position_ids_T[tree.run_starts_R[run]])
        length = int(tree.run_ends_R[run] - tree.run_starts_R[run])
        slots.append(lease.slots_S[int(tree.run_sequences_R[run])][first : first + length])
    return np.concatenate(slots)
