"""The critic: a transformer with a scalar head. Its output at a token is a value; at the last real token, the reward.

`Critic` wraps the family's own ``*ForSequenceClassification`` model, so its weights keep the names that plain
transformers reads. Sequences reach it as a `PrefixTreeBatch`, in which every shared prefix is computed once, or, where
the family cannot take that, as a `PaddedBatch`; the answers are the same. Where a sequence ends is known from its
length, never from a token id. Knows nothing of DeepSpeed, files, text or losses.

Shape legend: S sequences, L longest sequence, T tokens of a packed row, R runs of its tree, D hidden size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf_critic.attention import FAMILIES, AttentionPlan, enable_prefix_trees
from rlhf_critic.batching import MicroBatch, plan_sequences
from rlhf_critic.deepspeed_chat import Rows, preference_scores
from rlhf_critic.fused import fuse_norms_and_activations
from rlhf_critic.prefix_tree import PrefixTreeBatch, TokenIds

logger = logging.getLogger(__name__)

ROPE_OF_THE_BATCH = frozenset({"dynamic", "longrope"})
# Families that the same tests hold in padded batches, because their attention cannot follow a tree.
PADDED_FAMILIES = frozenset({"bloom"})


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
        cls, sequences: Sequence[TokenIds], pad_token_id: int, device: torch.device | str = "cpu"
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
            input_ids_SL[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
            attention_mask_SL[row, : len(sequence)] = 1
        return cls(input_ids_SL.to(device), attention_mask_SL.to(device))

    @property
    def position_ids_SL(self) -> Tensor:
        """Each real token's distance from its sequence's first token, int64 ``[S, L]``; 0 at padding."""
        return (self.attention_mask_SL.cumsum(dim=1) - 1).clamp(min=0) * self.attention_mask_SL

    @property
    def computed_tokens(self) -> int:
        """Tokens that a forward pass computes for it, padding included."""
        return self.input_ids_SL.numel()

    @property
    def ends_S(self) -> Tensor:
        """The column of each row's last real token, int64 ``[S]``."""
        columns_L = torch.arange(1, self.attention_mask_SL.shape[1] + 1, device=self.attention_mask_SL.device)
        return (self.attention_mask_SL * columns_L).argmax(dim=1)


class ScalarHead(nn.Module):
    """The ``score`` head, computed in fp32 whatever the body's dtype.

    It takes over the weight of the family's own head instead of making one, so that the name in a checkpoint and the
    partitioning by ZeRO stay as they are.
    """

    def __init__(self, weight_1D: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_1D

    def forward(self, hidden_D: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., 1]``, fp32."""
        return F.linear(hidden_D.float(), self.weight.float())


class Critic(nn.Module):
    """A scalar-headed transformer.

    Args:
        model: The family's ``*ForSequenceClassification`` model with ``num_labels=1`` and a head without bias.
        num_padding_at_beginning: As in DeepSpeed-Chat, tokens a tokenizer puts before every text (OPT: 1). Kept for
            code that reads it; ends are found from lengths here, so it changes nothing.
        prefix_tree: Compute shared prefixes once, where the family and its attention can.

    Attributes:
        prefix_tree: Whether `batch_of` makes prefix trees.

    Raises:
        ValueError: The model has no single-output ``score`` head.
    """

    def __init__(self, model: PreTrainedModel, num_padding_at_beginning: int = 0, *, prefix_tree: bool = True) -> None:
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
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if rope.get("rope_type") in ROPE_OF_THE_BATCH:
            logger.warning(
                "rope type %r takes its frequencies from the longest sequence of a batch, in transformers too: beyond "
                "the model's original length, scores depend on what shares the batch.",
                rope["rope_type"],
            )
        fuse_norms_and_activations(model)
        self.prefix_tree = prefix_tree and enable_prefix_trees(model)
        if model.config.model_type not in FAMILIES | PADDED_FAMILIES:
            logger.warning(
                "%s is not among the families this project is tested with (%s). It runs padded batches. Not tested for "
                "it: that the same text gets the same score in any batch, in training under every ZeRO stage and after "
                "saving. Compare some scores of a saved critic with plain transformers before you rely on them.",
                model.config.model_type,
                ", ".join(sorted(FAMILIES | PADDED_FAMILIES)),
            )
        elif prefix_tree and not self.prefix_tree:
            logger.warning(
                "%s with %s attention runs padded batches: prefix trees are not available for it. Scores are the same, "
                "shared prefixes are computed again for each sequence.",
                model.config.model_type,
                model.config._attn_implementation,
            )

    @property
    def config(self) -> object:
        """The model's Hugging Face config."""
        return self.model.config

    @property
    def pad_token_id(self) -> int:
        """The id that fills padded batches."""
        return int(self.model.config.pad_token_id)

    def batch_of(
        self, sequences: Sequence[TokenIds], device: torch.device | str = "cpu"
    ) -> PrefixTreeBatch | PaddedBatch:
        """The batch in which this critic computes sequences of token ids.

        Raises:
            ValueError: There is no sequence, or an empty one.
        """
        if self.prefix_tree:
            return PrefixTreeBatch.from_sequences(sequences, device)
        return PaddedBatch.from_sequences(sequences, self.pad_token_id, device)

    @overload
    def forward(self, input_ids: PrefixTreeBatch | PaddedBatch, *, rewards_only: bool = False) -> Tensor: ...

    @overload
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, *, use_cache: bool = False
    ) -> dict[str, Tensor]: ...

    def forward(
        self,
        input_ids: PrefixTreeBatch | PaddedBatch | Tensor,
        attention_mask: Tensor | None = None,
        *,
        rewards_only: bool = False,
        use_cache: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The values or the rewards of a batch; or, as in DeepSpeed-Chat, the loss and the rewards of padded pairs.

        Call the module, not this method, so that ZeRO's hooks run.

        Args:
            input_ids: A batch; or token ids, int64 ``[2P, L]``: the chosen rows, then the rejected rows.
            attention_mask: With token ids: 1 at the tokens of each row's sequence, 0 at padding, ``[2P, L]``.
            rewards_only: With a batch: see `values` and `rewards`.
            use_cache: DeepSpeed-Chat's callers pass it. Nothing is cached.

        Returns:
            See `values` and `rewards`; with token ids `rlhf_critic.deepspeed_chat.preference_scores`.

        Raises:
            ValueError: The mask is missing or shaped otherwise, the number of rows is odd, or one has no token.
        """
        if not isinstance(input_ids, Tensor):
            return self._forward_batch(input_ids, rewards_only)
        rows = Rows.from_padded(input_ids, attention_mask)
        values_BS = self._forward_batch(self.batch_of(rows.sequences, input_ids.device), rewards_only=False)
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
        """The values and rewards of padded rows, as DeepSpeed-Chat's PPO asks for them.

        Args:
            input_ids: Token ids, int64 ``[B, L]``.
            attention_mask: 1 at the tokens of each row's sequence, 0 at padding, ``[B, L]``.
            return_value_only: Leave the rewards out.
            prompt_length: Changes nothing: where an answer ends is read from the mask.
            num_padding_at_beginning: Changes nothing, for the same reason.
            use_cache: Changes nothing: nothing is cached.

        Returns:
            The values, fp32 ``[B, L]``, 0 at padding; or ``values`` and ``chosen_end_scores``, the rewards, ``[B]``.

        Raises:
            ValueError: The mask is shaped otherwise, or a row has no token.
        """
        rows = Rows.from_padded(input_ids, attention_mask)
        values_BS = self.values(self.batch_of(rows.sequences, input_ids.device))
        values_BL = rows.in_columns(values_BS)
        if return_value_only:
            return values_BL
        return {"values": values_BL, "chosen_end_scores": rows.at_ends(values_BS)}

    def gradient_checkpointing_enable(self) -> None:
        """Computes activations again in the backward pass instead of keeping them: less memory, slower."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self.model.gradient_checkpointing_disable()

    def _forward_batch(self, batch: PrefixTreeBatch | PaddedBatch, rewards_only: bool) -> Tensor:
        if isinstance(batch, PrefixTreeBatch):
            return self._forward_tree(batch, rewards_only)
        hidden_SLD = self._hidden(batch.input_ids_SL, batch.attention_mask_SL, batch.position_ids_SL)
        if rewards_only:
            hidden_SLD = hidden_SLD[torch.arange(len(hidden_SLD), device=hidden_SLD.device), batch.ends_S]
        return self.model.score(hidden_SLD).squeeze(-1)

    def values(self, batch: PrefixTreeBatch | PaddedBatch) -> Tensor:
        """The value at every token of every sequence, fp32 ``[S, L]``; meaningless where there is no real token.

        The rows of a prefix tree start with their sequences' first tokens; those of a padded batch are as it pads.
        """
        return self(batch)

    def rewards(self, batch: PrefixTreeBatch | PaddedBatch) -> Tensor:
        """The reward of every sequence, its value at the last real token, fp32 ``[S]``."""
        return self(batch, rewards_only=True)

    def _forward_tree(self, batch: PrefixTreeBatch, rewards_only: bool) -> Tensor:
        plan = AttentionPlan(batch.tree, rewards_only, batch.input_ids_1T.device)
        # transformers takes a 4-D mask as finished and makes none of its own; our attention does not look at it.
        no_mask = torch.zeros(1, 1, 1, 1, device=batch.input_ids_1T.device)
        hidden_1TD = self._hidden(batch.input_ids_1T, no_mask, batch.position_ids_1T, prefix_tree=plan)
        if rewards_only:
            return self.model.score(hidden_1TD[0, batch.leaves_S]).squeeze(-1)
        return self.model.score(hidden_1TD[0]).squeeze(-1)[batch.tokens_SL]

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **options: object) -> Tensor:
        positions = {"position_ids": position_ids} if self._takes_position_ids else {}
        backbone = getattr(self.model, self.model.base_model_prefix)
        outputs = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions, **options)
        return outputs.last_hidden_state


@torch.no_grad()
def forward_micro_batches(
    critic: Critic,
    module: nn.Module,
    sequences: Sequence[TokenIds],
    micro_batches: Sequence[MicroBatch],
    rewards_only: bool,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[tuple[int, ...], Tensor, int]]:
    """Runs planned micro-batches without gradients: the one way sequences are scored, in training and outside it.

    Args:
        critic: Which decides what a batch is.
        module: The critic itself, or the DeepSpeed engine around it.
        sequences: Token ids.
        micro_batches: Whose units index ``sequences``. Those of weight zero are run, for ZeRO's sake, and not yielded.
        rewards_only: Compute rewards ``[S]`` instead of values ``[S, L]``.
        device: Where the module's inputs go.

    Yields:
        The units of a micro-batch, its rewards or values, fp32, and the tokens computed for it.
    """
    for micro_batch in micro_batches:
        batch = critic.batch_of([sequences[unit] for unit in micro_batch.units], device)
        output = module(batch, rewards_only=rewards_only)
        if micro_batch.weight:
            yield micro_batch.units, output, batch.computed_tokens


def score_sequences(critic: Critic, sequences: Sequence[TokenIds], token_budget: int) -> NDArray[np.float32]:
    """The reward of each sequence, computed by a whole critic on this process; shows its progress on a terminal.

    Args:
        critic: In evaluation mode.
        sequences: Token ids.
        token_budget: The most tokens that are computed at once.

    Returns:
        fp32 ``[S]``, in the order of ``sequences``.

    Raises:
        ValueError: There is no sequence, or an empty one.
    """
    device = next(critic.parameters()).device
    (micro_batches,) = plan_sequences(sequences, 1, token_budget, critic.prefix_tree)
    rewards_S = torch.zeros(len(sequences), dtype=torch.float32)
    with tqdm(total=len(sequences), desc="scoring", unit="text", disable=None) as bar:
        for units, rewards_U, _ in forward_micro_batches(critic, critic, sequences, micro_batches, True, device):
            rewards_S[list(units)] = rewards_U.cpu()
            bar.update(len(units))
    return rewards_S.numpy()
