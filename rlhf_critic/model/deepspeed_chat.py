"""Compatibility with DeepSpeed-Chat's reward model: padded rows of token ids in, scores out.

`rlhf_critic.model.critic.Critic` has its ``forward(input_ids, attention_mask)``, ``forward_value`` and
``gradient_checkpointing_enable``. This module converts between rows and sequences. The sequence of a row consists of
the tokens with mask 1, at any column. Its score is the critic's reward of that sequence alone. DeepSpeed-Chat's
``reward_model.py`` searches for the pad token's id instead, and fails in the cases below:

====================================  ===============================  =============================================
case                                  DeepSpeed-Chat                   here
====================================  ===============================  =============================================
an unannounced leading pad            NaN: both rows seem empty        the mask defines padding; the option
(OPT, ``num_padding_at_beginning=0``)                                  ``num_padding_at_beginning`` has no effect
left padding                          NaN, or the last column's score  same as right padding
pad = EOS inside the prompt           NaN: both seem to end there      an ordinary token with mask 1, omitted with
                                                                       mask 0; the row continues after it
different first tokens                assertion                        counted from the first token
identical rows                        the values of the last column    a tie: ln 2, without a gradient
past the end of the shorter row       values of its padding            its last value is repeated
``prompt_length`` of 0 or 1           assertion                        no effect; the mask defines the end
an empty response                     the prompt's last token          the prompt's last token
a row without a token                 the score of the last column     ``ValueError``
====================================  ===============================  =============================================

Knows nothing about models, files or text.

Shape legend: B rows, P preferences (B = 2P), L columns of the rows, S tokens of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_critic.algorithms.preference_losses import per_token_loss
from rlhf_critic.batching.prefix_tree import IntArray


@dataclass(frozen=True, eq=False)
class Rows:
    """Padded rows of token ids as sequences, with their original columns.

    Attributes:
        ids_BL: Token ids, those with mask 1 first and in their order, int64 ``[B, L]``.
        columns_BL: Original column of each token id, int64 ``[B, L]``.
        lengths_B: Number of tokens with mask 1 in each row, int64 ``[B]``.
    """

    ids_BL: Tensor
    columns_BL: Tensor
    lengths_B: Tensor

    @classmethod
    def from_padded(cls, input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> Rows:
        """Extracts the sequences of padded rows: the token ids, int64, at which the mask, of any dtype, is not 0.

        Raises:
            ValueError: There is no mask, or it has another shape.
        """
        if attention_mask_BL is None or attention_mask_BL.shape != input_ids_BL.shape:
            given = None if attention_mask_BL is None else tuple(attention_mask_BL.shape)
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids_BL.shape)}, not {given}: the end "
                "of a row is read from the mask, not from a token id"
            )
        real_BL = attention_mask_BL.bool()
        columns_BL = real_BL.int().argsort(dim=1, descending=True, stable=True)
        return cls(input_ids_BL.gather(1, columns_BL), columns_BL, real_BL.sum(dim=1))

    @cached_property
    def present_BL(self) -> Tensor:
        """Mask of the positions at which `ids_BL` holds a token of the sequence, bool ``[B, L]``."""
        return torch.arange(self.ids_BL.shape[1], device=self.ids_BL.device) < self.lengths_B[:, None]

    @cached_property
    def sequences(self) -> list[IntArray]:
        """Token ids of each row's sequence."""
        ends_B = self.lengths_B.cumsum(0).cpu().numpy()
        return np.split(self.ids_BL[self.present_BL].cpu().numpy(), ends_B[:-1])

    def in_columns(self, values_BS: Tensor) -> Tensor:
        """Moves values of sequences, which start at column 0, to the columns of their tokens; 0 at padding, [B, L]."""
        values_BL = F.pad(values_BS, (0, self.ids_BL.shape[1] - values_BS.shape[1])).where(self.present_BL, 0.0)
        return torch.zeros_like(values_BL).scatter(1, self.columns_BL, values_BL)

    def at_ends(self, values_BS: Tensor) -> Tensor:
        """Returns the values at the last token of each sequence, ``[B]``."""
        return values_BS.gather(1, self.lengths_B[:, None] - 1)[:, 0]


def preference_scores(rows: Rows, values_BS: Tensor) -> dict[str, Tensor]:
    """Computes the output of DeepSpeed-Chat's reward model for chosen rows followed by their rejected rows.

    ``values_BS`` are the values of their sequences, starting at column 0; arbitrary past their end.

    Returns:
        ``loss``, the mean of `rlhf_critic.algorithms.preference_losses.per_token_loss` over preferences, and
        ``chosen_mean_scores`` and ``rejected_mean_scores``, ``[P]``, which are rewards despite the names. All fp32.

    Raises:
        ValueError: The number of rows is odd.
    """
    if len(rows.ids_BL) % 2:
        raise ValueError(f"{len(rows.ids_BL)} rows: the number is odd, but each chosen row needs a rejected row")
    chosen_ids_PL, rejected_ids_PL = rows.ids_BL.chunk(2)
    chosen_values_PS, rejected_values_PS = values_BS.chunk(2)
    chosen_lengths_P, rejected_lengths_P = rows.lengths_B.chunk(2)
    both_present_PL = torch.logical_and(*rows.present_BL.chunk(2))
    same_PL = (chosen_ids_PL == rejected_ids_PL) & both_present_PL
    divergences_P = same_PL.long().cumprod(dim=1).sum(dim=1)
    loss_P = per_token_loss(chosen_values_PS, rejected_values_PS, divergences_P, chosen_lengths_P, rejected_lengths_P)
    chosen_P, rejected_P = rows.at_ends(values_BS).chunk(2)
    return {"loss": loss_P.mean(), "chosen_mean_scores": chosen_P, "rejected_mean_scores": rejected_P}
