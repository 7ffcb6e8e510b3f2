"""Store of the keys and values of cached tokens, layer by layer, and of the critic's value at each of them.

A slot of the store belongs to one token; `rlhf_critic.batching.prefix_cache` knows which. The forward pass of a batch
with slots reads the keys of its cached tokens from here, and writes those that it computes. Knows nothing about trees.

Shape legend: T computed tokens, C cached tokens of the batch, N = T + C, M computed tokens that are kept, K key/value
heads, E head size, P slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rlhf_critic.batching.prefix_tree_batch import BatchSlots


class KeyValueStore:
    """The tensors of a prefix cache, allocated once.

    Args:
        config: Config of the model, with one shape of keys and values in all layers.
        max_bytes: Maximum size in bytes of all tensors.
        dtype: Dtype of keys and values, the model's.
        device: Device of the model.

    Attributes:
        slots: Number of slots; 0 if not even one fits.
        bytes_per_slot: Bytes of a slot.
    """

    def __init__(self, config: PreTrainedConfig, max_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        self.bytes_per_slot = 2 * layers * heads * size * dtype.itemsize + torch.float32.itemsize
        self.slots = max_bytes // self.bytes_per_slot
        # Memory of a CPU that was never written is not resident.
        self._keys_PKE, self._values_PKE = (
            [torch.empty(self.slots, heads, size, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )
        self._token_values_P = torch.empty(self.slots, dtype=torch.float32, device=device)

    def extend(self, layer: int, key: Tensor, value: Tensor, slots: BatchSlots) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of the tokens that are kept, and adds those of the cached tokens.

        Args:
            layer: Index of the layer.
            key: ``[1, K, T, E]``.
            value: ``[1, K, T, E]``.
            slots: Slots of the batch.

        Returns:
            Keys and values, ``[1, K, N, E]``: the computed tokens, then the cached ones.
        """
        key, value = (
            _extend(store[layer], one[0].transpose(0, 1), slots).transpose(0, 1)[None]
            for store, one in ((self._keys_PKE, key), (self._values_PKE, value))
        )
        return key, value

    def extend_token_values(self, values_T: Tensor, slots: BatchSlots) -> Tensor:
        """Writes the critic's values at the tokens that are kept, and adds those of the cached tokens, fp32 ``[N]``."""
        return _extend(self._token_values_P, values_T, slots)

    def free(self) -> None:
        """Frees the memory at once."""
        for tensor in (*self._keys_PKE, *self._values_PKE, self._token_values_P):
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
