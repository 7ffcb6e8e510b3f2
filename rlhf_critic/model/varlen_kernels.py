"""GPU kernels of attention for sequences of variable length ("varlen"), behind one interface.

| kernel | dtypes | head sizes | windows | soft caps | log-sum-exp |
|---|---|---|---|---|---|
| `FlashAttention`, of torch (FA2; FA3 if installed) | fp16, bf16 | to 256 | yes | no | packed |
| `FlashAttentionPackage`, of the package flash_attn | fp16, bf16 | to 256 | yes | yes | packed |
| `EfficientAttention`, of torch | fp16, bf16, fp32 | any | no | no | padded |

`kernel_for` chooses. Knows nothing about prefix trees or models.

Shape legend: Q queries, N keys, H heads, K key/value heads, E head size (a multiple of `HEAD_SIZE_MULTIPLE`).
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_critic.batching.varlen_plan import VarlenCall

logger = logging.getLogger(__name__)

HEAD_SIZE_MULTIPLE = 8
FLASH_HEAD_SIZE = 256  # maximum
CONSUMER_HEAD_SIZE = 192  # maximum of the backward pass on GPUs with less shared memory
DATA_CENTER_GPUS = frozenset({(8, 0), (9, 0), (10, 0)})  # compute capabilities of A100, H100 and B200
CAUSAL_FROM_BOTTOM_RIGHT = 2  # torch's number for this mask of efficient attention

Tensors = tuple[Tensor, ...]


class Scores(NamedTuple):
    """How scores are computed from queries and keys.

    Attributes:
        scale: Factor of the products.
        window: Number of keys that a query sees at most, its own included; None for all.
        softcap: Scores become ``softcap * tanh(score / softcap)``, unless None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def sides(self) -> dict[str, int]:
        """Numbers of keys to the left and to the right of the diagonal, as flash attention takes them; -1 for all."""
        if self.window is None:
            return {"window_size_left": -1, "window_size_right": -1}
        return {"window_size_left": self.window - 1, "window_size_right": 0}


class VarlenKernel(Protocol):
    """A kernel. Queries are ``[Q, H, E]``, keys and values ``[N, K, E]``, H a multiple of K.

    Attributes:
        packs_log_sum_exp: Whether the first saved tensor is the log-sum-exp ``[H, Q]``. Then `backward` also takes that
            of more keys than its own.
    """

    packs_log_sum_exp: bool

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scores: Scores
    ) -> tuple[Tensor, Tensors]:
        """Computes the output ``[Q, H, E]``, and tensors for `backward`."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        saved: Tensors,
        call: VarlenCall,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the gradients of query, key and value."""
        ...


class FlashAttention:
    """FlashAttention-2 as torch ships it, or the implementation that `torch.nn.attention` has activated."""

    packs_log_sum_exp = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scores: Scores
    ) -> tuple[Tensor, Tensors]:
        """See `VarlenKernel`."""
        output, lse_HQ, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *_sequences(call), 0.0, call.causal, False, scale=scores.scale, **scores.sides
        )
        return output, (lse_HQ, rng_state, unused)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        saved: Tensors,
        call: VarlenCall,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VarlenKernel`."""
        lse_HQ, rng_state, unused = saved
        return torch.ops.aten._flash_attention_backward(
            *(grad, query, key, value, output, lse_HQ, *_sequences(call), 0.0, call.causal, rng_state, unused),
            scale=scores.scale,
            **scores.sides,
        )


class FlashAttentionPackage:
    """FlashAttention-2 of the package flash_attn, 2.6 or later, which has soft caps."""

    packs_log_sum_exp = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scores: Scores
    ) -> tuple[Tensor, Tensors]:
        """See `VarlenKernel`."""
        output, lse_HQ, *_ = self._module()._flash_attn_varlen_forward(
            *(query, key, value, *_sequences(call)),
            dropout_p=0.0,
            softmax_scale=scores.scale,
            causal=call.causal,
            softcap=scores.softcap or 0.0,
            **scores.sides,
        )
        return output, (lse_HQ,)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        saved: Tensors,
        call: VarlenCall,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VarlenKernel`."""
        gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        self._module()._flash_attn_varlen_backward(
            *(grad, query, key, value, output, *saved, *gradients, *_sequences(call)),
            dropout_p=0.0,
            softmax_scale=scores.scale,
            causal=call.causal,
            softcap=scores.softcap or 0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **scores.sides,
        )
        return gradients

    @staticmethod
    def _module() -> Any:
        return import_module("flash_attn.flash_attn_interface")


class EfficientAttention:
    """The memory-efficient attention of torch, which has fp32.

    It takes no windows: in torch 2.13 and earlier, its backward pass counts a window from the top left, although its
    forward pass counts from the bottom right. Key and value heads are repeated, because it has no grouped heads.
    """

    packs_log_sum_exp = False

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scores: Scores
    ) -> tuple[Tensor, Tensors]:
        """See `VarlenKernel`."""
        mask = CAUSAL_FROM_BOTTOM_RIGHT if call.causal else 0
        output, lse, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
            *(query[None], *_repeated(query, key, value), None, *_sequences(call), 0.0, mask, True), scale=scores.scale
        )
        return output[0], (lse, seed, offset)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        saved: Tensors,
        call: VarlenCall,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VarlenKernel`."""
        mask = CAUSAL_FROM_BOTTOM_RIGHT if call.causal else 0
        lse, seed, offset = saved
        query_grad, *repeated_grads, _ = torch.ops.aten._efficient_attention_backward(
            *(grad[None], query[None], *_repeated(query, key, value), None, output[None], *_sequences(call)),
            *(lse, 0.0, seed, offset, mask, False),
            scale=scores.scale,
        )
        key_grad, value_grad = (x[0].unflatten(1, (key.shape[1], -1)).sum(2) for x in repeated_grads)
        return query_grad[0], key_grad, value_grad


def kernel_for(query: Tensor, scores: Scores) -> VarlenKernel | None:
    """Returns the kernel for queries on a GPU, or None if there is none for their dtype, window or soft cap.

    Args:
        query: Queries on a GPU, ``[..., E]``.
        scores: How scores are computed. A window here is one that sequences exceed.
    """
    capability = _capability(query.device)
    largest = FLASH_HEAD_SIZE if capability in DATA_CENTER_GPUS else CONSUMER_HEAD_SIZE
    is_half = query.dtype in {torch.float16, torch.bfloat16}
    if is_half and capability >= (8, 0) and query.shape[-1] <= largest:
        if scores.softcap is not None:
            return FlashAttentionPackage() if _has_flash_attention_package() else None
        activate_flash_attention_3(capability)
        return FlashAttention()
    return EfficientAttention() if scores.window is None and scores.softcap is None else None


@cache  # every layer of every forward pass asks
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has_flash_attention_package() -> bool:
    return find_spec("flash_attn") is not None


@cache
def activate_flash_attention_3(capability: tuple[int, int]) -> None:
    """Lets torch use FlashAttention-3 in this process, on GPUs that have it, if its package is installed."""
    if capability != (9, 0) or not find_spec("flash_attn_interface"):
        return
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (AttributeError, ImportError, RuntimeError, ValueError) as error:
        logger.warning("could not activate FlashAttention-3, using FlashAttention-2: %s", error)
    else:
        logger.info("activated attention=FlashAttention-3")


def _sequences(call: VarlenCall) -> tuple[Tensor, Tensor, int, int]:
    return call.query_starts_B, call.key_starts_B, call.max_queries, call.max_keys


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns keys and values with as many heads as queries, and a batch dimension."""
    group = query.shape[1] // key.shape[1]
    repeated = [x if group == 1 else x.repeat_interleave(group, 1, output_size=query.shape[1]) for x in (key, value)]
    return repeated[0][None], repeated[1][None]
