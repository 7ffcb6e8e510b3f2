"""DeepSpeed-Chat's interface to a reward model, for code that is ported from it: rows of token ids in, scores out.

`rlhf_critic.model.critic.Critic` has its ``forward(input_ids, attention_mask)``, ``forward_value`` and
``gradient_checkpointing_enable``; here is what lies between rows and sequences. A row is the sequence of the tokens
that its mask attends to, wherever in the row they stand. So a score is the critic's reward of that sequence by itself,
and what goes wrong in DeepSpeed-Chat (``reward_model.py``, which looks for the pad token's id) has an answer:

====================================  ===============================  =============================================
case                                  DeepSpeed-Chat                   here
====================================  ===============================  =============================================
a leading pad that is not announced   NaN: both rows seem empty        the mask says what is padding; the option
(OPT, ``num_padding_at_beginning=0``)                                  ``num_padding_at_beginning`` changes nothing
left padding                          NaN, a score of the last column  as right padding
pad = EOS inside the prompt           NaN: both seem to end there      a token as any other if attended, left out if
                                                                       masked; the row goes on behind it
first tokens that differ              assertion                        counted from the first token
identical rows                        the values of the last column    a tie: ln 2, without a gradient
past the end of the shorter row       values of its padding            its last value stands
``prompt_length`` of 0 or 1           assertion                        any; ends are the mask's: it changes nothing
an empty answer                       the prompt's last token          the same
a row without a token                 a score of the last column       ``ValueError``
====================================  ===============================  =============================================

Knows nothing of models, files or text.

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
    """Padded rows of token ids as sequences, and the way back.

    Attributes:
        ids_BL: Token ids, the attended ones of each row first and in their order, int64 ``[B, L]``.
        columns_BL: The column each of them came from, int64 ``[B, L]``.
        lengths_B: Attended tokens of each row, int64 ``[B]``.
    """

    ids_BL: Tensor
    columns_BL: Tensor
    lengths_B: Tensor

    @classmethod
    def from_padded(cls, input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> Rows:
        """Takes rows apart.

        Args:
            input_ids_BL: Token ids, int64 ``[B, L]``; anything where the mask is 0.
            attention_mask_BL: Not 0 at the tokens of the sequence, any dtype, ``[B, L]``.

        Raises:
            ValueError: There is no mask, or it is shaped otherwise.
        """
        if attention_mask_BL is None or attention_mask_BL.shape != input_ids_BL.shape:
            given = None if attention_mask_BL is None else tuple(attention_mask_BL.shape)
            raise ValueError(
                f"attention_mask must be shaped as input_ids, {tuple(input_ids_BL.shape)}, and is {given}: where a row "
                "ends is read from it, not from a token id"
            )
        real_BL = attention_mask_BL.bool()
        columns_BL = real_BL.int().argsort(dim=1, descending=True, stable=True)
        return cls(input_ids_BL.gather(1, columns_BL), columns_BL, real_BL.sum(dim=1))

    @cached_property
    def present_BL(self) -> Tensor:
        """Where `ids_BL` holds a token of the sequence, bool ``[B, L]``."""
        return torch.arange(self.ids_BL.shape[1], device=self.ids_BL.device) < self.lengths_B[:, None]

    @cached_property
    def sequences(self) -> list[IntArray]:
        """The token ids of each row's sequence."""
        ends_B = self.lengths_B.cumsum(0).cpu().numpy()
        return np.split(self.ids_BL[self.present_BL].cpu().numpy(), ends_B[:-1])

    def in_columns(self, values_BS: Tensor) -> Tensor:
        """Values of the sequences, from their first token on, at the columns of their tokens; 0 at padding, [B, L]."""
        values_BL = F.pad(values_BS, (0, self.ids_BL.shape[1] - values_BS.shape[1])).where(self.present_BL, 0.0)
        return torch.zeros_like(values_BL).scatter(1, self.columns_BL, values_BL)

    def at_ends(self, values_BS: Tensor) -> Tensor:
        """The values at the last token of each sequence, ``[B]``."""
        return values_BS.gather(1, self.lengths_B[:, None] - 1)[:, 0]


def preference_scores(rows: Rows, values_BS: Tensor) -> dict[str, Tensor]:
    """What DeepSpeed-Chat's reward model returns for chosen rows followed by as many rejected ones.

    Args:
        rows: The chosen rows, then the rejected rows in the same order.
        values_BS: Values of their sequences, from their first token on; anything past their end.

    Returns:
        ``loss``, the mean of `rlhf_critic.algorithms.preference_losses.per_token_loss` over preferences, and ``chosen_mean_scores`` and
        ``rejected_mean_scores``, ``[P]`` each: rewards, despite the names. All fp32.

    Raises:
        ValueError: The number of rows is odd.
    """
    if len(rows.ids_BL) % 2:
        raise ValueError(
            f"{len(rows.ids_BL)} rows cannot be chosen rows and as many rejected ones: their number is odd"
        )
    chosen_ids_PL, rejected_ids_PL = rows.ids_BL.chunk(2)
    chosen_values_PS, rejected_values_PS = values_BS.chunk(2)
    chosen_lengths_P, rejected_lengths_P = rows.lengths_B.chunk(2)
    both_present_PL = torch.logical_and(*rows.present_BL.chunk(2))
    same_PL = (chosen_ids_PL == rejected_ids_PL) & both_present_PL
    divergences_P = same_PL.long().cumprod(dim=1).sum(dim=1)
    loss_P = per_token_loss(chosen_values_PS, rejected_values_PS, divergences_P, chosen_lengths_P, rejected_lengths_P)
    chosen_rewards_P, rejected_rewards_P = rows.at_ends(values_BS).chunk(2)
    return {
        "loss": loss_P.mean(),
        "chosen_mean_scores": chosen_rewards_P,
        "rejected_mean_scores": rejected_rewards_P,
    }
