"""Critic: a transformer with a scalar head. Its output at a token is a value; at the last real token, the reward.

`Critic` wraps the family's own ``*ForSequenceClassification`` model, so its weights keep the names that plain
transformers reads. Its results are the same for prefix trees and padded batches. Knows nothing about DeepSpeed, files,
text or losses.

Shape legend: S sequences, L longest sequence, T tokens that are computed, D hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_critic.batching.prefix_tree_batch import PrefixTreeBatch
from rlhf_critic.model.backbone import Backbone, Batch
from rlhf_critic.model.deepspeed_chat import Rows, preference_scores


class ScalarHead(nn.Module):
    """The ``score`` head, computed in fp32 for any dtype of the body.

    It uses the weight of the family's own head, so its name in a checkpoint and its partitioning by ZeRO do not change.
    ``bias``, of another system's head, is a constant: it is neither trained nor saved.
    """

    def __init__(self, weight_1D: nn.Parameter, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = weight_1D
        self.bias = bias

    def forward(self, hidden_D: Tensor) -> Tensor:
        """Computes values fp32 ``[..., 1]`` from hidden states ``[..., D]``."""
        values_1 = F.linear(hidden_D.float(), self.weight.float())
        return values_1 + self.bias if self.bias else values_1


class Critic(Backbone):
    """A scalar-headed transformer.

    Args:
        model: The family's ``*ForSequenceClassification`` model with ``num_labels=1`` and a head without bias.
        num_padding_at_beginning: Number of tokens that a tokenizer puts before every text (OPT: 1), as in
            DeepSpeed-Chat. Kept for code that reads it. It has no effect, because ends are found from lengths.
        prefix_tree: See `Backbone`.
        head_bias: A number that is added to every value and reward; see `ScalarHead`.

    Raises:
        ValueError: The model has no single-output ``score`` head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_padding_at_beginning: int = 0,
        *,
        prefix_tree: bool = True,
        head_bias: float = 0.0,
    ) -> None:
        head = getattr(model, "score", None)
        has_bias = not isinstance(head, ScalarHead) and getattr(head, "bias", None) is not None
        if model.config.num_labels != 1 or head is None or has_bias:
            raise ValueError(f"{type(model).__name__} has no bias-free 'score' head with one output")
        super().__init__(model, prefix_tree)
        if not isinstance(head, ScalarHead):
            model.score = ScalarHead(head.weight, head_bias)
        self.num_padding_at_beginning = num_padding_at_beginning
        self.config = model.config  # for code that saves DeepSpeed-Chat's models

    def forward(
        self,
        input_ids: Batch | Tensor,
        attention_mask: Tensor | None = None,
        *,
        rewards_only: bool = False,
        every_token: bool = False,
        with_states: bool = False,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Computes values or rewards of a batch; or, as in DeepSpeed-Chat, loss and rewards of padded pairs.

        Call the module, not this method, so that ZeRO's hooks run.

        Args:
            input_ids: A batch; or token ids, int64 ``[2P, L]``: the chosen rows, then the rejected rows.
            attention_mask: Mask of token ids: 1 at the tokens of each row's sequence, 0 at padding, ``[2P, L]``.
            rewards_only: Whether to compute `rewards` instead of `values`, for a batch.
            every_token: Whether all layers compute every token, even if only rewards are read.
            with_states: Whether to return the last hidden states as well, for a batch.
            use_cache: Ignored; DeepSpeed-Chat's callers pass it, and nothing is cached.

        Returns:
            Values or rewards, and with ``with_states`` the hidden state at the last real token of every sequence,
            ``[S, D]``; for token ids see `rlhf_critic.model.deepspeed_chat.preference_scores`.

        Raises:
            ValueError: The mask is missing or has another shape, the number of rows is odd, or a row has no token.
        """
        if not isinstance(input_ids, Tensor):
            outputs, states_SD = self._forward_batch(input_ids, rewards_only, every_token)
            return (outputs, states_SD) if with_states else outputs
        rows = Rows.from_padded(input_ids, attention_mask)
        values_BS, _ = self._forward_batch(self.batch_of(rows.sequences, input_ids.device), rewards_only=False)
        return preference_scores(rows, values_BS)

    def forward_value(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        return_value_only: bool = False,
        prompt_length: int = 0,
        num_padding_at_beginning: int = 0,
        use_cache: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Computes values and rewards of padded rows, with the interface of DeepSpeed-Chat's PPO.

        Token ids are int64 ``[B, L]``; the mask, ``[B, L]``, is 1 at the tokens of each row's sequence, else 0.
        The last three arguments are ignored: ends are read from the mask, and nothing is cached.

        Returns:
            ``values``, fp32 ``[B, L]``, 0 at padding, and ``chosen_end_scores``, the rewards, ``[B]``; or, with
            ``return_value_only``, the values alone.

        Raises:
            ValueError: The mask has another shape, or a row has no token.
        """
        rows = Rows.from_padded(input_ids, attention_mask)
        values_BS = self.values(self.batch_of(rows.sequences, input_ids.device))
        values_BL = rows.in_columns(values_BS)
        if return_value_only:
            return values_BL
        return {"values": values_BL, "chosen_end_scores": rows.at_ends(values_BS)}

    def _forward_batch(self, batch: Batch, rewards_only: bool, every_token: bool = False) -> tuple[Tensor, Tensor]:
        hidden_TD = self.hidden(batch, leaves_only=rewards_only and not every_token)
        states_SD = hidden_TD[batch.leaves_S]
        if rewards_only:
            return self.model.score(states_SD).squeeze(-1), states_SD
        values_T = self.model.score(hidden_TD).squeeze(-1)
        if self.store is not None and isinstance(batch, PrefixTreeBatch) and batch.slots is not None:
            values_T = self.store.extend_token_values(values_T, batch.slots)
        return values_T[batch.tokens_SL], states_SD

    def values(self, batch: Batch) -> Tensor:
        """Computes the value at every token of every sequence, fp32 ``[S, L]``; undefined at padding.

        Rows of a prefix tree start with the first token of their sequence. Rows of a padded batch are padded like it.
        """
        return self(batch)

    def rewards_and_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Computes the reward of every sequence, fp32 ``[S]``, and the hidden state that gives it, ``[S, D]``."""
        return self(batch, rewards_only=True, with_states=True)

    def rewards(self, batch: Batch) -> Tensor:
        """Computes the reward of every sequence, its value at the last real token, fp32 ``[S]``."""
        return self(batch, rewards_only=True)
