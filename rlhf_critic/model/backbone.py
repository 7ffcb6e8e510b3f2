"""Backbone: a transformer that computes prefix trees, or padded batches if its family cannot compute trees.

`rlhf_critic.model.critic.Critic` and `rlhf_critic.model.policy.Policy` are built on it. The end of a sequence is known
from its length, never from a token id. Knows nothing about the use of hidden states, DeepSpeed, files or text.

Shape legend: S sequences, L longest sequence, T tokens that are computed (padding included), D hidden size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_critic.batching.padded import PaddedBatch
from rlhf_critic.batching.planner import MicroBatch
from rlhf_critic.batching.prefix_cache import Lease
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.batching.prefix_tree_batch import PrefixTreeBatch
from rlhf_critic.model.attention_plan import AttentionPlan
from rlhf_critic.model.fused_ops import fuse_norms_and_activations
from rlhf_critic.model.key_value_store import KeyValueStore, ShapeRecorder
from rlhf_critic.model.prefix_attention import PREFIX_TREE_FAMILIES, enable_prefix_trees

logger = logging.getLogger(__name__)
Batch: TypeAlias = PrefixTreeBatch | PaddedBatch
OutputT = TypeVar("OutputT")

# Families that the same tests check in padded batches, because their attention cannot follow a tree.
PADDED_FAMILIES = frozenset({"bloom", "falcon", "mpt", "stablelm"})


class Backbone(nn.Module):
    """A Hugging Face model whose body computes batches of sequences.

    Args:
        model: The model, with a head of any kind, which is not used here.
        prefix_tree: Whether to compute shared prefixes once, if the family and its attention support it. The attribute
            of this name tells whether they do.
    """

    def __init__(self, model: PreTrainedModel, prefix_tree: bool) -> None:
        super().__init__()
        self.model = model
        self._takes_position_ids = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self.store: KeyValueStore | None = None
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        self._positions_depend_on_the_batch = rope.get("rope_type") in {"dynamic", "longrope"}
        if self._positions_depend_on_the_batch:
            logger.warning(
                "rope type %r: frequencies depend on the longest sequence of a batch, as in transformers. Beyond the "
                "model's original length, scores depend on the other sequences of the batch.",
                rope["rope_type"],
            )
        fuse_norms_and_activations(model)
        self.prefix_tree = prefix_tree and enable_prefix_trees(model)
        tested = PREFIX_TREE_FAMILIES | PADDED_FAMILIES
        if model.config.model_type not in tested:
            logger.warning(
                "untested model family %s (tested: %s): using padded batches. Equal scores of a text in any batch, "
                "at any ZeRO stage and after saving are not tested. Compare some scores of a saved critic with plain "
                "transformers before you rely on them.",
                model.config.model_type,
                ", ".join(sorted(tested)),
            )
        elif prefix_tree and not self.prefix_tree:
            logger.warning(
                "no prefix trees for %s with %s attention: using padded batches. Scores are the same, but shared "
                "prefixes are computed once for each sequence.",
                model.config.model_type,
                model.config._attn_implementation,
            )

    @property
    def pad_token_id(self) -> int:
        """Token id that fills padded batches."""
        return int(self.model.config.pad_token_id)

    def create_store(self, max_bytes: int, device: torch.device) -> bool:
        """Allocates a store of keys and values of cached prefixes, if the model can use one; returns whether.

        Logs why it cannot.
        """
        if not self.prefix_tree:
            logger.warning("no prefix cache for %s: it computes padded batches", self.model.config.model_type)
        elif self._positions_depend_on_the_batch:
            logger.warning("no prefix cache: the keys of this rope type depend on the longest sequence of a batch")
        else:
            recorder = ShapeRecorder()
            with torch.no_grad():
                self._hidden_of_tree(PrefixTreeBatch.from_sequences([[0]], device), False, recorder)
            store = KeyValueStore(recorder.pairs, max_bytes)
            if store.slots:
                self.store = store
            else:
                logger.warning("no prefix cache: a token needs %d bytes of at most %d", store.bytes_per_slot, max_bytes)
        return self.store is not None

    def batch_of(
        self, sequences: Sequence[TokenIds], device: torch.device | str = "cpu", lease: Lease | None = None
    ) -> Batch:
        """Builds the batch in which this model computes sequences of token ids.

        Args:
            sequences: Token ids.
            device: Device of the batch.
            lease: Cached prefixes of the sequences, whose keys and values are in `store`.

        Raises:
            ValueError: There is no sequence, or one is empty.
        """
        if self.prefix_tree:
            # On a GPU, the kernel for fp32 computes only plans of this kind.
            paths_only = self.model.dtype == torch.float32
            return PrefixTreeBatch.from_sequences(sequences, device, paths_only=paths_only, lease=lease)
        return PaddedBatch.from_sequences(sequences, self.pad_token_id, device)

    def hidden(self, batch: Batch, leaves_only: bool = False) -> Tensor:
        """Computes the last hidden states of all computed tokens, ``[T, D]``.

        With ``leaves_only``, states other than those at ``batch.leaves_S`` may be undefined.
        """
        if isinstance(batch, PaddedBatch):
            return self._run(batch.input_ids_SL, batch.attention_mask_SL, batch.position_ids_SL).flatten(0, 1)
        return self._hidden_of_tree(batch, leaves_only, self.store if batch.slots else None)

    def _hidden_of_tree(
        self, batch: PrefixTreeBatch, leaves_only: bool, store: KeyValueStore | ShapeRecorder | None
    ) -> Tensor:
        plan = AttentionPlan(batch, leaves_only, store)
        # transformers uses a 4-D mask as it is and builds none. This project's attention ignores it.
        no_mask = torch.zeros(1, 1, 1, 1, device=batch.input_ids_1T.device)
        return self._run(batch.input_ids_1T, no_mask, batch.position_ids_1T, prefix_tree=plan)[0]

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes activations in the backward pass instead of keeping them: less memory, slower."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations for the backward pass."""
        self.model.gradient_checkpointing_disable()

    def _run(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **options: object) -> Tensor:
        positions = {"position_ids": position_ids} if self._takes_position_ids else {}
        return self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions, **options
        ).last_hidden_state


@torch.no_grad()
def forward_micro_batches(
    backbone: Backbone,
    sequences: Sequence[TokenIds],
    micro_batches: Sequence[MicroBatch],
    run: Callable[[Batch, Sequence[int]], OutputT],
    device: torch.device | str = "cpu",
) -> Iterator[tuple[tuple[int, ...], OutputT, int]]:
    """Runs planned micro-batches, whose units index ``sequences``, without gradients. All scoring uses it.

    ``run`` computes a batch and its units, on the model or the DeepSpeed engine around it. Micro-batches of weight zero
    are computed, because ZeRO needs equal numbers on all ranks, but not yielded.

    Yields:
        The units of a micro-batch, the output of ``run``, and the number of computed tokens.
    """
    batches = (backbone.batch_of([sequences[unit] for unit in one.units], device) for one in micro_batches)
    batch = next(batches, None)
    for micro_batch in micro_batches:
        assert batch is not None, "there is a batch for each micro-batch"
        output, computed_tokens = run(batch, micro_batch.units), batch.computed_tokens
        # The caller waits for the output. On a GPU the next batch is built before, while the GPU computes.
        batch = next(batches, None)
        if micro_batch.weight:
            yield micro_batch.units, output, computed_tokens
