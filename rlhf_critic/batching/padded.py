"""Batches of sequences as padded rows. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_critic.batching.device_copy import copy_to_device
from rlhf_critic.batching.prefix_tree import TokenIds


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences padded to one length, on the left or the right.

    Attributes:
        input_ids_SL: Token ids, int64 ``[S, L]``; ignored where the mask is 0.
        attention_mask_SL: 1 at real tokens, 0 at padding, int64 ``[S, L]``. The real tokens of a row are contiguous.
    """

    input_ids_SL: Tensor
    attention_mask_SL: Tensor

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[TokenIds], pad_token_id: int, device: torch.device | str = "cpu"
    ) -> PaddedBatch:
        """Pads sequences on the right.

        Raises:
            ValueError: There are no sequences, or one is empty.
        """
        if not sequences or not all(len(sequence) for sequence in sequences):
            raise ValueError("a batch needs at least one sequence and every sequence at least one token")
        rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
        input_ids_SL = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        attention_mask_SL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return cls(*copy_to_device([input_ids_SL, attention_mask_SL], device))

    @property
    def position_ids_SL(self) -> Tensor:
        """Distance of each real token from the first token of its sequence, int64 ``[S, L]``; 0 at padding."""
        return (self.attention_mask_SL.cumsum(dim=1) - 1).clamp(min=0) * self.attention_mask_SL

    @property
    def computed_tokens(self) -> int:
        """Number of tokens in a forward pass, including padding."""
        return self.input_ids_SL.numel()

    @property
    def leaves_S(self) -> Tensor:
        """Index of the last token of each sequence among all computed tokens, int64 ``[S]``."""
        return (self.attention_mask_SL * self.tokens_SL).amax(dim=1)

    @property
    def tokens_SL(self) -> Tensor:
        """Index of each token among all computed tokens, int64 ``[S, L]``."""
        return torch.arange(self.computed_tokens, device=self.input_ids_SL.device).view(self.input_ids_SL.shape)
