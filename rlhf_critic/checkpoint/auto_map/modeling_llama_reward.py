"""Llama with a scalar reward head, for ``AutoModelForSequenceClassification`` and ``trust_remote_code=True``.

Needs only torch and transformers. The weights are named as in ``LlamaForSequenceClassification`` with one label, so
the directory also loads without this file. This file adds a value at every token, sequence ends found from the
attention mask, positions that left padding does not shift, and a head computed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput


@dataclass
class RewardModelOutput(ModelOutput):
    """The output of `LlamaRewardModel`.

    Attributes:
        loss: Mean squared error against ``labels``, if they were given.
        logits: Reward of each sequence, its value at the last real token, fp32 ``[batch, 1]``.
        token_values: Value at every token, fp32 ``[batch, length]``; meaningless at padding. Not named ``values``,
            because that is a method of every output, which DeepSpeed calls.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_values: torch.Tensor | None = None


class RewardHead(nn.Linear):
    """A linear layer with one output and no bias, computed in fp32 whatever the dtype of its weight.

    It is a separate module, so that code that wraps or hooks modules (adapters, for example) handles it too.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., width]`` to ``[..., 1]``, fp32."""
        return F.linear(hidden.float(), self.weight.float())


class LlamaRewardModel(LlamaPreTrainedModel):
    """A Llama backbone with a reward head."""

    config_class = LlamaConfig
    base_model_prefix = "model"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.num_labels = 1
        self.model = LlamaModel(config)
        self.score = RewardHead(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RewardModelOutput | tuple[Any, ...]:
        """Scores sequences padded on either side.

        Args:
            input_ids: Token ids, ``[batch, length]``.
            attention_mask: 1 at real tokens, ``[batch, length]``. Without it, all tokens from the first to the last one
                that is not ``config.pad_token_id`` count as real.
            inputs_embeds: Embeddings instead of ``input_ids``, ``[batch, length, width]``.
            labels: Target rewards ``[batch]`` for a regression loss.
            return_dict: False returns a tuple.
            **kwargs: Arguments passed to the backbone.

        Raises:
            ValueError: Neither ``input_ids`` nor ``inputs_embeds`` is given.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError("give input_ids or inputs_embeds")
        columns = torch.arange(inputs.shape[1], device=inputs.device)
        if attention_mask is not None:
            real = attention_mask.long()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = (input_ids != self.config.pad_token_id).long()
        else:
            real = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        first = real.argmax(dim=1, keepdim=True)
        last = (real * (columns + 1)).argmax(dim=1, keepdim=True)
        # A pad token within a text is part of the text, as in the classes of transformers.
        real = ((columns >= first) & (columns <= last)).long()
        # Counted from each row's first real token.
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (columns - first) * real
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=real,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "use_cache": False, "return_dict": True},
        ).last_hidden_state
        values = self.score(hidden).squeeze(-1)
        rewards = values.gather(1, last)
        loss = None if labels is None else F.mse_loss(rewards.squeeze(-1), labels.float().view(-1))
        output = RewardModelOutput(loss=loss, logits=rewards, token_values=values)
        return output if return_dict is not False else output.to_tuple()
