"""Attention over a prefix tree on a GPU, by kernels for sequences of variable length.

`rlhf_critic.batching.varlen_plan` has the plans. The outputs of several calls are combined by their log-sum-exp, which
is exact (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), and the backward pass gives every
call the combined output and log-sum-exp, as ring attention does (Liu et al., 2023). Gradients of keys that several
calls or runs read are added in fp32. Knows nothing about models.

Shape legend: T tokens of the packed row, Q queries, N keys, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_critic.batching.varlen_plan import VarlenCall
from rlhf_critic.model.varlen_kernels import HEAD_SIZE_MULTIPLE, Scores, VarlenKernel


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, calls: tuple[VarlenCall, ...], kernel: VarlenKernel, scores: Scores
) -> Tensor:
    """Computes attention by the calls of a plan.

    Args:
        query: ``[1, H, Q, E]``.
        key: ``[1, K, T, E]``; H is a multiple of K. Keys of cached tokens may follow.
        value: ``[1, K, T, E]``.
        calls: One call of *paths*, or the calls of *levels*.
        kernel: The kernel; for *levels* one that packs the log-sum-exp.
        scores: How scores are computed.

    Returns:
        The output ``[1, Q, H, E]``.
    """
    size = query.shape[-1]
    if missing := -size % HEAD_SIZE_MULTIPLE:  # zeros change no product
        query, key, value = (F.pad(x, (0, missing)) for x in (query, key, value))
    packed = (x[0].transpose(0, 1) for x in (query, key, value))  # views, contiguous in each head
    plan = _Paths if len(calls) == 1 else _Levels
    output_QHE: Tensor = plan.apply(*packed, calls, kernel, scores)
    return output_QHE[None, ..., :size]


class _Paths(torch.autograd.Function):
    """One call. Its keys are gathered again in the backward pass instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: tuple[VarlenCall, ...],
        kernel: VarlenKernel,
        scores: Scores,
    ) -> Tensor:
        (call,) = calls
        output, saved = kernel.forward(query, _rows(key, call.keys_N), _rows(value, call.keys_N), call, scores)
        ctx.save_for_backward(query, key, value, output, *saved)
        ctx.arguments = (call, kernel, scores)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *saved = ctx.saved_tensors
        call, kernel, scores = ctx.arguments
        gathered = (_rows(key, call.keys_N), _rows(value, call.keys_N))
        query_grad, *grads_N = kernel.backward(grad.contiguous(), query, *gathered, output, tuple(saved), call, scores)
        if call.keys_N is not None:
            sums = (_zeros_fp32(key).index_add_(0, call.keys_N, grad_N.to(_wide(key))) for grad_N in grads_N)
            grads_N = [total.to(key.dtype) for total in sums]
        return query_grad, *grads_N, None, None, None


class _Levels(torch.autograd.Function):
    """A causal call of all runs on themselves, then one call for each level, which are combined with it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: tuple[VarlenCall, ...],
        kernel: VarlenKernel,
        scores: Scores,
    ) -> Tensor:
        own, *levels = calls
        output, (lse_HQ, *rest) = kernel.forward(*_of_call(own, query, key, value), own, scores)
        joined_QHE = output.to(_wide(query))  # rounded once, after all levels
        for call in levels:
            queries_Q = _queries(call)
            part, (part_lse, *_) = kernel.forward(*_of_call(call, query, key, value), call, scores)
            old_lse = lse_HQ.index_select(1, queries_Q)
            new_lse = torch.logaddexp(old_lse, part_lse)
            share, part_share = ((lse - new_lse).exp_().T[..., None] for lse in (old_lse, part_lse))
            combined = joined_QHE.index_select(0, queries_Q).mul_(share).addcmul_(part, part_share)
            joined_QHE.index_copy_(0, queries_Q, combined)  # a query is once in a level
            lse_HQ.index_copy_(1, queries_Q, new_lse)
        output = joined_QHE.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse_HQ, *rest)
        ctx.arguments = (calls, kernel, scores)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse_HQ, *rest = ctx.saved_tensors
        (own, *levels), kernel, scores = ctx.arguments
        grad = grad.contiguous()
        grads = kernel.backward(grad, query, key, value, output, (lse_HQ, *rest), own, scores)
        sums = [part.to(_wide(query)) for part in grads]
        for call in levels:
            queries_Q = _queries(call)
            saved = (lse_HQ.index_select(1, queries_Q), *rest)
            own_rows = (grad.index_select(0, queries_Q), *_of_call(call, query, key, value))
            parts = kernel.backward(*own_rows, output.index_select(0, queries_Q), saved, call, scores)
            for total, part, rows in zip(sums, parts, (queries_Q, call.keys_N, call.keys_N), strict=True):
                total.index_add_(0, rows, part.to(total.dtype))
        return *(total.to(query.dtype) for total in sums), None, None, None


def _queries(call: VarlenCall) -> Tensor:
    assert call.queries_Q is not None, "only the first call of levels covers all queries"
    return call.queries_Q


def _of_call(call: VarlenCall, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(query, call.queries_Q), _rows(key, call.keys_N), _rows(value, call.keys_N)


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _zeros_fp32(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=_wide(like), device=like.device)
