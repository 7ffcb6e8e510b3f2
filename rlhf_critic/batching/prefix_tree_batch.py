"""Batches of sequences as a prefix tree on a device. Knows nothing about models.

Shape legend: S sequences, T tokens of the packed row, R runs, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhf_critic.batching.device_copy import copy_to_device, is_gpu
from rlhf_critic.batching.prefix_tree import PrefixTree, TokenIds
from rlhf_critic.batching.varlen_plan import TreeCalls, path_calls, plan_calls


@dataclass(frozen=True, eq=False)
class PrefixTreeBatch:
    """Sequences as one packed row on a device. The padded counterpart is `rlhf_critic.batching.padded.PaddedBatch`.

    Attributes:
        tree: Prefix tree of the sequences.
        input_ids_1T: Token ids, int64 ``[1, T]``.
        position_ids_1T: Positions, int64 ``[1, T]``.
        leaves_S: Index in the row of the last token of each sequence, int64 ``[S]``.
        leaf_tokens_R: Index in the row of the last token of each run, int64 ``[R]``. Every sequence ends in one.
        planned: Attention calls that came with the batch; None except on a GPU.
    """

    tree: PrefixTree
    input_ids_1T: Tensor
    position_ids_1T: Tensor
    leaves_S: Tensor
    leaf_tokens_R: Tensor
    planned: TreeCalls | None

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[TokenIds], device: torch.device | str = "cpu", *, paths_only: bool = False
    ) -> PrefixTreeBatch:
        """Builds the tree and copies it to a device, to a GPU with the attention calls and without waiting.

        Args:
            sequences: Token ids.
            device: Device of the batch.
            paths_only: See `rlhf_critic.batching.varlen_plan.plan_calls`.

        Raises:
            ValueError: There are no sequences, or one is empty.
        """
        tree = PrefixTree.build(sequences)
        arrays = (tree.input_ids_T[None], tree.position_ids_T[None], tree.leaves_S, tree.run_ends_R - 1)
        tensors = [torch.from_numpy(array) for array in arrays]
        calls = plan_calls(tree, paths_only=paths_only) if is_gpu(device) else None
        tensors += calls.tensors() if calls else []
        ids, positions, leaves_S, leaf_tokens_R, *of_calls = copy_to_device(tensors, device)
        planned = calls.with_tensors(of_calls) if calls else None
        return cls(tree, ids, positions, leaves_S, leaf_tokens_R, planned)

    @property
    def device(self) -> torch.device:
        """Device of the batch."""
        return self.input_ids_1T.device

    @property
    def computed_tokens(self) -> int:
        """Number of tokens in a forward pass."""
        return len(self.tree)

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
        """Index in the row of each token of each sequence, int64 ``[S, L]``; 0 past the end of a sequence."""
        tokens_SL = np.zeros((len(self.tree.lengths_S), int(self.tree.lengths_S.max())), dtype=np.int64)
        for row, leaf in enumerate(self.tree.leaves_S):
            tokens_SL[row, : self.tree.lengths_S[row]] = self.tree.path_tokens(int(leaf))
        return copy_to_device([torch.from_numpy(tokens_SL)], self.device)[0]
