"""GPU operators of attention for sequences of variable length, in plain operations on the CPU.

`emulated_operators` registers them as torch's own operators, so that torch checks every call against their schemas.
They keep the layouts and corner cases of the kernels: causal masks and windows aligned at the bottom right, output 0
and log-sum-exp +inf for queries without keys, log-sum-exps in fp32 (fp64 for fp64). They reject arguments that the
kernels reject or misread, and leave NaN in rows that no sequence covers.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

PADDED_TO = 32  # rows of the log-sum-exp of efficient attention
NOTHING = -1


def scores_of(query, key, scale, causal, left, right, softcap):
    """Scores [H, Q, N] with minus infinity where a query sees no key, and their slopes under a soft cap."""
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhe,nhe->hqn", query, key.repeat_interleave(group, 1)) * scale
    slope = torch.ones_like(scores)
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh.square()
    to_the_left = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))
    hidden = torch.zeros_like(to_the_left, dtype=torch.bool)
    if causal:
        right = 0
    if right >= 0:
        hidden |= -to_the_left > right
    if left >= 0:
        hidden |= to_the_left > left
    return scores.masked_fill(hidden, float("-inf")), slope


def pieces(
    cu_q: Tensor, cu_k: Tensor, query: Tensor, key: Tensor, max_q: int, max_k: int
) -> Iterator[tuple[slice, slice]]:
    for starts, rows, longest in ((cu_q, query, max_q), (cu_k, key, max_k)):
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        assert starts[0] == 0
        assert starts[-1] == len(rows), "the kernel would leave rows as they are"
        assert int(starts.diff().max()) == longest
    assert len(cu_q) == len(cu_k)
    edges = zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False)
    for query_start, query_end, key_start, key_end in edges:
        yield slice(query_start, query_end), slice(key_start, key_end)


def check(query: Tensor, key: Tensor, value: Tensor) -> None:
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0
    assert query.shape[2] == key.shape[2]
    assert query.shape[2] % 8 == 0, "torch's operator does not pad heads"
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))


def unwritten(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"), memory_format=torch.contiguous_format)


def forward(query, key, value, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap) -> tuple[Tensor, Tensor]:
    check(query, key, value)
    group, wide = query.shape[1] // key.shape[1], torch.promote_types(query.dtype, torch.float32)
    output = unwritten(query)
    lse = torch.full((query.shape[1], len(query)), float("nan"), dtype=wide)
    for queries, keys in pieces(cu_q, cu_k, query, key, max_q, max_k):
        scores, _ = scores_of(query[queries].to(wide), key[keys].to(wide), scale, causal, left, right, softcap)
        sees = (scores > float("-inf")).any(-1)
        sums = scores.logsumexp(-1).masked_fill(~sees, float("inf"))
        values = value[keys].to(wide).repeat_interleave(group, 1)
        output[queries] = torch.einsum("hqn,nhe->qhe", (scores - sums[..., None]).exp(), values).to(query.dtype)
        lse[:, queries] = sums
    return output, lse


def backward(grad, query, key, value, output, lse, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
    check(query, key, value)
    assert grad.is_contiguous()
    assert lse.shape == (query.shape[1], len(query))
    assert lse.is_contiguous()
    group, wide = query.shape[1] // key.shape[1], lse.dtype
    grads = [unwritten(tensor) for tensor in (query, key, value)]
    for queries, keys in pieces(cu_q, cu_k, query, key, max_q, max_k):
        q, g, o = (tensor[queries].to(wide) for tensor in (query, grad, output))
        k, v = (tensor[keys].to(wide) for tensor in (key, value))
        scores, slope = scores_of(q, k, scale, causal, left, right, softcap)
        weights = (scores - lse[:, queries, None]).exp()
        pull = torch.einsum("qhe,nhe->hqn", g, v.repeat_interleave(group, 1)) - (g * o).sum(-1).T[..., None]
        of_scores = weights * pull * slope * scale
        parts = (
            torch.einsum("hqn,nhe->qhe", of_scores, k.repeat_interleave(group, 1)),
            torch.einsum("hqn,qhe->nhe", of_scores, q).unflatten(1, (-1, group)).sum(2),
            torch.einsum("hqn,qhe->nhe", weights, g).unflatten(1, (-1, group)).sum(2),
        )
        for full, rows, part in zip(grads, (queries, keys, keys), parts, strict=True):
            full[rows] = part.to(full.dtype)
    return tuple(grads)


# torch's flash attention.


def flash_forward(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    **newer,
):
    assert not newer, "an argument that older versions of torch have not"
    assert dropout_p == 0.0
    sides = (window_size_left, window_size_right)
    output, lse = forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, *sides, None)
    return output, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(0), torch.zeros(0)


def flash_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    sides = (window_size_left, window_size_right)
    sequences = (cum_seq_q, cum_seq_k, max_q, max_k)
    return backward(grad_out, query, key, value, out, logsumexp, *sequences, scale, is_causal, *sides, None)


# torch's efficient attention: a batch dimension, no grouped heads, a padded log-sum-exp for each sequence.


def efficient_forward(
    query,
    key,
    value,
    bias,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    custom_mask_type,
    compute_log_sumexp=False,
    *,
    scale=None,
    seqlen_k=None,
    window_size=None,
):
    assert window_size is None, "the backward pass of torch 2.13 counts windows from the top left"
    assert query.shape[2] == key.shape[2], "no grouped heads"
    assert compute_log_sumexp
    rows = (query[0], key[0], value[0])
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output, lse = forward(*rows, *sequences, scale, custom_mask_type == 2, NOTHING, NOTHING, None)
    padded = torch.full((len(cu_seqlens_q) - 1, lse.shape[0], -(-max_seqlen_q // PADDED_TO) * PADDED_TO), float("inf"))
    padded = padded.to(lse.dtype)
    for sequence, (queries, _) in enumerate(pieces(cu_seqlens_q, cu_seqlens_k, *rows[:2], max_seqlen_q, max_seqlen_k)):
        padded[sequence, :, : queries.stop - queries.start] = lse[:, queries]
    seed = torch.zeros((), dtype=torch.int64)
    return output[None], padded, seed, seed.clone(), max_seqlen_q, max_seqlen_k


def efficient_backward(
    grad_out_,
    query,
    key,
    value,
    bias,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    logsumexp,
    dropout_p,
    philox_seed,
    philox_offset,
    custom_mask_type,
    bias_requires_grad,
    *,
    scale=None,
    num_splits_key=None,
    window_size=None,
    shared_storage_dqdkdv=False,
):
    rows = (query[0], key[0], value[0])
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    lse = torch.empty(query.shape[2], query.shape[1], dtype=logsumexp.dtype)
    for sequence, (queries, _) in enumerate(pieces(cu_seqlens_q, cu_seqlens_k, *rows[:2], max_seqlen_q, max_seqlen_k)):
        lse[:, queries] = logsumexp[sequence, :, : queries.stop - queries.start]
    masks = (custom_mask_type == 2, NOTHING, NOTHING, None)
    grads = backward(grad_out_[0], *rows, out[0], lse, *sequences, scale, *masks)
    return *(grad[None] for grad in grads), torch.zeros(())


# The package flash_attn 2.8.


def package_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output, lse = forward(q, k, v, *sequences, softmax_scale, causal, window_size_left, window_size_right, softcap)
    return output, lse, None, torch.zeros(2)


def package_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    masks = (causal, window_size_left, window_size_right, softcap)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    grads = backward(dout, q, k, v, out, softmax_lse, *sequences, softmax_scale, *masks)
    for full, part in zip((dq, dk, dv), grads, strict=True):
        full.copy_(part)


@contextmanager
def emulated_operators() -> Iterator[None]:
    """Makes torch's operators, and those of the package flash_attn, work on CPU tensors."""
    package = types.ModuleType("flash_attn.flash_attn_interface")
    package._flash_attn_varlen_forward = package_forward
    package._flash_attn_varlen_backward = package_backward
    with torch.library._scoped_library("aten", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        library.impl("_efficient_attention_forward", efficient_forward, "CPU")
        library.impl("_efficient_attention_backward", efficient_backward, "CPU")
        patch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        patch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)
        yield
