"""Store of the keys and values of cached tokens, layer by layer, and of the critic's value at each of them.

A slot of the store belongs to one token; `rlhf_critic.batching.prefix_cache` knows which. The forward pass of a batch
with slots reads the keys of its cached tokens from here, and writes those that it computes. Knows nothing about trees.

Shape legend: T computed tokens, C cached tokens of the batch, N = T + C, M computed tokens that are kept, K key/value
heads, E head size, P slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_critic.batching.prefix_tree_batch import BatchSlots


class ShapeRecorder:
    """Stands in for a store in one forward pass, and records the keys and values of one token of each layer.

    Attributes:
        pairs: By layer, tensors like the key and the value of one token, each ``[K, E]``. E may differ between them.
    """

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor, slots: BatchSlots | None) -> tuple[Tensor, Tensor]:
        """Records the shapes of keys and values, ``[1, K, T, E]``, and returns them."""
        self.pairs[layer] = (key[0, :, 0], value[0, :, 0])
        return key, value


class KeyValueStore:
    """The tensors of a prefix cache, allocated once.

    Args:
        pairs: See `ShapeRecorder`.
        max_bytes: Maximum size in bytes of all tensors.

    Attributes:
        slots: Number of slots; 0 if not even one fits.
        bytes_per_slot: Bytes of a slot.
    """

    def __init__(self, pairs: Mapping[int, tuple[Tensor, Tensor]], max_bytes: int) -> None:
        self.bytes_per_slot = torch.float32.itemsize + sum(one.nbytes for pair in pairs.values() for one in pair)
        self.slots = max_bytes // self.bytes_per_slot
        # Memory of a CPU that was never written is not resident.
        self._layers = {
            layer: (key.new_empty(self.slots, *key.shape), value.new_empty(self.slots, *value.shape))
            for layer, (key, value) in pairs.items()
        }
        key, _ = pairs[0]
        self._token_values_P = key.new_empty(self.slots, dtype=torch.float32)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, the memory of the store."""
        return [*(tensor for pair in self._layers.values() for tensor in pair), self._token_values_P]

    def extend(self, layer: int, key: Tensor, value: Tensor, slots: BatchSlots | None) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of the tokens that are kept, and adds those of the cached tokens.

        Args:
            layer: Index of the layer.
            key: ``[1, K, T, E]``.
            value: ``[1, K, T, E]``.
            slots: Slots of the batch.

        Returns:
            Keys and values, ``[1, K, N, E]``: the computed tokens, then the cached ones.
        """
        assert slots is not None, "only a batch with slots has a store"
        key, value = (
            _extend(stored, one[0].transpose(0, 1), slots).transpose(0, 1)[None]
            for stored, one in zip(self._layers[layer], (key, value), strict=True)
        )
        return key, value

    def extend_token_values(self, values_T: Tensor, slots: BatchSlots) -> Tensor:
        """Writes the critic's values at the tokens that are kept, and adds those of the cached tokens, fp32 ``[N]``."""
        return _extend(self._token_values_P, values_T, slots)

    def free(self) -> None:
        """Frees the memory at once."""
        for tensor in self.tensors:
            tensor.data = tensor.new_empty(0)


def _extend(stored_P: Tensor, computed_T: Tensor, slots: BatchSlots) -> Tensor:
    """Writes the rows of computed tokens to their slots; returns them, followed by the rows of cached tokens."""
    stored_P.index_copy_(0, slots.kept_M, computed_T[: len(slots.kept_M)])
    if not len(slots.cached_C):
        return computed_T
    computed = len(computed_T)
    extended_N = computed_T.new_empty(computed + len(slots.cached_C), *computed_T.shape[1:])
    extended_N[:computed] = computed_T
    torch.index_select(stored_P, 0, slots.cached_C, out=extended_N[computed:])
    return extended_N
