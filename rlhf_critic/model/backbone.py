"""A transformer that computes batches of sequences: prefix trees, or padded rows where its family cannot take trees.

What `rlhf_critic.model.critic.Critic` and `rlhf_critic.model.policy.Policy` have in common. Where a sequence ends is known from its
length, never from a token id. Knows nothing of what is made of the hidden states, of DeepSpeed, files or text.

Shape legend: S sequences, L longest sequence, T tokens that are computed (padding included), D hidden size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_critic.batching.padded import PaddedBatch
from rlhf_critic.batching.planner import MicroBatch
from rlhf_critic.batching.prefix_tree import PrefixTreeBatch, TokenIds
from rlhf_critic.model.fused_ops import fuse_norms_and_activations
from rlhf_critic.model.prefix_attention import PREFIX_TREE_FAMILIES, AttentionPlan, enable_prefix_trees

logger = logging.getLogger(__name__)
OutputT = TypeVar("OutputT")

ROPE_OF_THE_BATCH = frozenset({"dynamic", "longrope"})
# Families that the same tests hold in padded batches, because their attention cannot follow a tree.
PADDED_FAMILIES = frozenset({"bloom"})


class Backbone(nn.Module):
    """A Hugging Face model whose body computes batches of sequences.

    Args:
        model: With a head of any kind, which is not used here.
        prefix_tree: Compute shared prefixes once, where the family and its attention can.

    Attributes:
        model: The model.
        prefix_tree: Whether `batch_of` makes prefix trees.
    """

    def __init__(self, model: PreTrainedModel, prefix_tree: bool) -> None:
        super().__init__()
        self.model = model
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
        if model.config.model_type not in PREFIX_TREE_FAMILIES | PADDED_FAMILIES:
            logger.warning(
                "%s is not among the families this project is tested with (%s). It runs padded batches. Not tested for "
                "it: that the same text gets the same score in any batch, in training under every ZeRO stage and after "
                "saving. Compare some scores of a saved critic with plain transformers before you rely on them.",
                model.config.model_type,
                ", ".join(sorted(PREFIX_TREE_FAMILIES | PADDED_FAMILIES)),
            )
        elif prefix_tree and not self.prefix_tree:
            logger.warning(
                "%s with %s attention runs padded batches: prefix trees are not available for it. Scores are the same, "
                "shared prefixes are computed again for each sequence.",
                model.config.model_type,
                model.config._attn_implementation,
            )

    @property
    def pad_token_id(self) -> int:
        """The id that fills padded batches."""
        return int(self.model.config.pad_token_id)

    def batch_of(
        self, sequences: Sequence[TokenIds], device: torch.device | str = "cpu"
    ) -> PrefixTreeBatch | PaddedBatch:
        """The batch in which this model computes sequences of token ids.

        Raises:
            ValueError: There is no sequence, or an empty one.
        """
        if self.prefix_tree:
            return PrefixTreeBatch.from_sequences(sequences, device)
        return PaddedBatch.from_sequences(sequences, self.pad_token_id, device)

    def hidden(self, batch: PrefixTreeBatch | PaddedBatch, leaves_only: bool = False) -> Tensor:
        """The last hidden states of all tokens that are computed, ``[T, D]``; ``batch.tokens_SL`` finds a sequence's.

        Args:
            batch: What `batch_of` made.
            leaves_only: Whether only those at ``batch.leaves_S`` will be read; the others may be undefined then.
        """
        if isinstance(batch, PaddedBatch):
            return self._run(batch.input_ids_SL, batch.attention_mask_SL, batch.position_ids_SL).flatten(0, 1)
        plan = AttentionPlan(batch.tree, leaves_only, batch.input_ids_1T.device)
        # transformers takes a 4-D mask as finished and makes none of its own; our attention does not look at it.
        no_mask = torch.zeros(1, 1, 1, 1, device=batch.input_ids_1T.device)
        return self._run(batch.input_ids_1T, no_mask, batch.position_ids_1T, prefix_tree=plan)[0]

    def gradient_checkpointing_enable(self) -> None:
        """Computes activations again in the backward pass instead of keeping them: less memory, slower."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self.model.gradient_checkpointing_disable()

    def _run(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **options: object) -> Tensor:
        positions = {"position_ids": position_ids} if self._takes_position_ids else {}
        backbone = getattr(self.model, self.model.base_model_prefix)
        outputs = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions, **options)
        return outputs.last_hidden_state


@torch.no_grad()
def forward_micro_batches(
    backbone: Backbone,
    sequences: Sequence[TokenIds],
    micro_batches: Sequence[MicroBatch],
    run: Callable[[PrefixTreeBatch | PaddedBatch, Sequence[int]], OutputT],
    device: torch.device | str = "cpu",
) -> Iterator[tuple[tuple[int, ...], OutputT, int]]:
    """Runs planned micro-batches without gradients: the one way sequences are computed, in training and outside it.

    Args:
        backbone: Which decides what a batch is.
        sequences: Token ids.
        micro_batches: Whose units index ``sequences``. Those of weight zero are run, for ZeRO's sake, and not yielded.
        run: Computes the batch of these units, on the model itself or the DeepSpeed engine around it.
        device: Where batches go.

    Yields:
        The units of a micro-batch, what ``run`` made of it, and the tokens computed for it.
    """
    for micro_batch in micro_batches:
        batch = backbone.batch_of([sequences[unit] for unit in micro_batch.units], device)
        output = run(batch, micro_batch.units)
        if micro_batch.weight:
            yield micro_batch.units, output, batch.computed_tokens
