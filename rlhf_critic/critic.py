"""The critic: a transformer with a scalar head. Its output at a token is a value; at the last real token, the reward.

`Critic` wraps the family's own ``*ForSequenceClassification`` model, so its weights keep the names that plain
transformers reads. Where a sequence ends is known from its length (the attention mask), never from a token id.
Knows nothing of DeepSpeed, files, text or losses.

Shape legend: S sequences, L padded length, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf_critic.batching import MicroBatch, plan_sequences


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences padded to one length, on either side.

    Attributes:
        input_ids_SL: Token ids, int64 ``[S, L]``; anything where the mask is 0.
        attention_mask_SL: 1 at real tokens, 0 at padding, int64 ``[S, L]``; the real tokens of a row are contiguous.
    """

    input_ids_SL: Tensor
    attention_mask_SL: Tensor

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu"
    ) -> PaddedBatch:
        """Pads sequences on the right.

        Raises:
            ValueError: There is no sequence, or an empty one.
        """
        if not sequences or not all(len(sequence) for sequence in sequences):
            raise ValueError("a batch needs at least one sequence and every sequence at least one token")
        longest = max(len(sequence) for sequence in sequences)
        input_ids_SL = torch.full((len(sequences), longest), pad_token_id, dtype=torch.int64)
        attention_mask_SL = torch.zeros((len(sequences), longest), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            input_ids_SL[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
            attention_mask_SL[row, : len(sequence)] = 1
        return cls(input_ids_SL.to(device), attention_mask_SL.to(device))

    @property
    def position_ids_SL(self) -> Tensor:
        """Each real token's distance from its sequence's first token, int64 ``[S, L]``; 0 at padding."""
        return (self.attention_mask_SL.cumsum(dim=1) - 1).clamp(min=0) * self.attention_mask_SL

    def at_end(self, values_SL: Tensor) -> Tensor:
        """The entry of each row at its last real token, ``[S]``."""
        columns_L = torch.arange(1, self.attention_mask_SL.shape[1] + 1, device=self.attention_mask_SL.device)
        ends_S = (self.attention_mask_SL * columns_L).argmax(dim=1)
        return values_SL.gather(1, ends_S[:, None]).squeeze(1)


class ScalarHead(nn.Module):
    """The ``score`` head, computed in fp32 whatever the body's dtype.

    It takes over the weight of the family's own head instead of making one, so that the name in a checkpoint and the
    partitioning by ZeRO stay as they are.
    """

    def __init__(self, weight_1D: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_1D

    def forward(self, hidden_SLD: Tensor) -> Tensor:
        """``[S, L, D]`` to ``[S, L, 1]``, fp32."""
        return F.linear(hidden_SLD.float(), self.weight.float())


class Critic(nn.Module):
    """A scalar-headed transformer.

    Args:
        model: The family's ``*ForSequenceClassification`` model with ``num_labels=1`` and a head without bias.
        num_padding_at_beginning: As in DeepSpeed-Chat, tokens a tokenizer puts before every text (OPT: 1). Kept for
            code that reads it; ends are found from lengths here, so it changes nothing.

    Raises:
        ValueError: The model has no single-output ``score`` head.
    """

    def __init__(self, model: PreTrainedModel, num_padding_at_beginning: int = 0) -> None:
        super().__init__()
        head = getattr(model, "score", None)
        if model.config.num_labels != 1 or head is None or getattr(head, "bias", None) is not None:
            raise ValueError(f"{type(model).__name__} has no bias-free 'score' head with one output")
        if not isinstance(head, ScalarHead):
            model.score = ScalarHead(head.weight)
        self.model = model
        self.num_padding_at_beginning = num_padding_at_beginning
        backbone_parameters = inspect.signature(getattr(model, model.base_model_prefix).forward).parameters
        self._takes_position_ids = "position_ids" in backbone_parameters

    @property
    def config(self) -> object:
        """The model's Hugging Face config."""
        return self.model.config

    @property
    def pad_token_id(self) -> int:
        """The id that fills padded batches."""
        return int(self.model.config.pad_token_id)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """The values; see `values`. Call the module, not this method, so that ZeRO's hooks run."""
        backbone = getattr(self.model, self.model.base_model_prefix)
        positions = {"position_ids": batch.position_ids_SL} if self._takes_position_ids else {}
        hidden_SLD = backbone(
            input_ids=batch.input_ids_SL, attention_mask=batch.attention_mask_SL, use_cache=False, **positions
        ).last_hidden_state
        return self.model.score(hidden_SLD).squeeze(-1)

    def values(self, batch: PaddedBatch) -> Tensor:
        """The value at every token, fp32 ``[S, L]``; meaningless where the mask is 0."""
        return self(batch)

    def rewards(self, batch: PaddedBatch) -> Tensor:
        """The reward of every sequence, its value at the last real token, fp32 ``[S]``."""
        return batch.at_end(self(batch))


@torch.no_grad()
def forward_micro_batches(
    module: nn.Module,
    sequences: Sequence[Sequence[int]],
    micro_batches: Sequence[MicroBatch],
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[tuple[int, ...], PaddedBatch, Tensor]]:
    """Runs planned micro-batches without gradients: the one way sequences are scored, in training and outside it.

    Args:
        module: A `Critic`, or the DeepSpeed engine around one.
        sequences: Token ids.
        micro_batches: Whose units index ``sequences``. Those of weight zero are run, for ZeRO's sake, and not yielded.
        pad_token_id: Fills the padding.
        device: Where the module's inputs go.

    Yields:
        The units of a micro-batch, its batch, and its values, fp32 ``[S, L]``.
    """
    for micro_batch in micro_batches:
        rows = [sequences[unit] for unit in micro_batch.units]
        batch = PaddedBatch.from_sequences(rows, pad_token_id, device)
        values_SL = module(batch)
        if micro_batch.weight:
            yield micro_batch.units, batch, values_SL


def score_sequences(critic: Critic, sequences: Sequence[Sequence[int]], token_budget: int) -> NDArray[np.float32]:
    """The reward of each sequence, computed by a whole critic on this process; shows its progress on a terminal.

    Args:
        critic: In evaluation mode.
        sequences: Token ids.
        token_budget: The most padded tokens that go through the critic at once.

    Returns:
        fp32 ``[S]``, in the order of ``sequences``.

    Raises:
        ValueError: There is no sequence, or an empty one.
    """
    device = next(critic.parameters()).device
    (micro_batches,) = plan_sequences(sequences, 1, token_budget)
    rewards_S = torch.zeros(len(sequences), dtype=torch.float32)
    with tqdm(total=len(sequences), desc="scoring", unit="text", disable=None) as bar:
        for units, batch, values_SL in forward_micro_batches(
            critic, sequences, micro_batches, critic.pad_token_id, device
        ):
            rewards_S[list(units)] = batch.at_end(values_SL).cpu()
            bar.update(len(units))
    return rewards_S.numpy()
