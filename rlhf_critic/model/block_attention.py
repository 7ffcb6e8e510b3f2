"""Attention over a prefix tree without a GPU kernel: block by block on CPUs, and run by run in plain operations.

`fused_attention` slices the packed row into blocks: one for each run attending to itself and one for each branch
attending to the run it continues. It copies nothing and needs no T x T mask. If a token attends to several blocks,
their outputs are combined by their log-sum-exp, which is exact (Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018). The backward pass gives every block the combined output and log-sum-exp, as ring attention does
(Liu et al., 2023). `plain_attention` gathers the keys of each run, and computes soft caps, dropout and windows on any
device. Knows nothing about models.

Shape legend: T computed tokens, R computed runs, Q queries, N keys, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_critic.model.attention_plan import AttentionPlan, Block

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, for_leaves: bool, options: Any
) -> Tensor:
    """Computes attention run by run in plain operations, for what kernels lack.

    These are soft caps, dropout, windows shorter than a sequence, and sinks (``s_aux``, ``[H]``): learned scores that
    take a share of every token's attention, as in gpt-oss.
    """
    group = query.shape[1] // key.shape[1]
    names = ("scaling", "softcap", "sliding_window", "s_aux")
    scaling, softcap, window, sinks_H = (options.get(name) for name in names)
    outputs = []
    for run, block in enumerate(plan.own_blocks):
        path_N = plan.paths_R[run]
        first = run if for_leaves else block.query_start
        last = run + 1 if for_leaves else block.query_end
        query_KGQE = query[0, :, first:last].unflatten(0, (-1, group))
        key_K1NE, value_K1NE = key[0, :, path_N, None].transpose(1, 2), value[0, :, path_N, None].transpose(1, 2)
        scores = query_KGQE @ key_K1NE.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        # A key's position is its index on the path; the queries are the path's last tokens.
        position_N = torch.arange(len(path_N), device=query.device)
        distance_QN = position_N[len(path_N) - (last - first) :, None] - position_N
        hidden_QN = distance_QN < 0 if window is None else (distance_QN < 0) | (distance_QN >= window)
        scores = scores.masked_fill(hidden_QN, float("-inf"))
        if sinks_H is not None:
            sinks_KGQ1 = sinks_H.view(-1, group, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks_KGQ1.to(scores.dtype)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32)[..., : len(path_N)].to(query.dtype)
        weights = nn.functional.dropout(weights, options.get("dropout") or 0.0, training=module.training)
        outputs.append((weights @ value_K1NE).flatten(0, 1))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, for_leaves: bool, options: Any
) -> Tensor:
    """Computes attention block by block with torch's fused kernel for CPUs."""
    return _FusedBlocks.apply(query, key, value, plan, for_leaves, options.get("scaling")).transpose(1, 2)


class _FusedBlocks(torch.autograd.Function):
    """Attention over a plan's blocks: every query's own block first, then the branches are combined with it."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, for_leaves: bool, scaling: Any
    ) -> Tensor:
        own, branches = plan.leaf_blocks if for_leaves else (plan.own_blocks, plan.branch_blocks)
        outputs, lses = [], []
        for block in own:
            output, lse = _flash(*_of_block(block, query, key, value), 0.0, not for_leaves, scale=scaling)
            outputs.append(output.transpose(1, 2))
            lses.append(lse)
        # [1, T, H, E] in memory, the layout that the output projection reads.
        output_1HQE, lse_1HQ = torch.cat(outputs, dim=1).transpose(1, 2), torch.cat(lses, dim=2)
        for block in branches:
            part, part_lse = _flash(*_of_block(block, query, key, value), 0.0, False, scale=scaling)
            joined, joined_lse = (x[:, :, block.query_start : block.query_end] for x in (output_1HQE, lse_1HQ))
            total = torch.logaddexp(joined_lse, part_lse)
            share, part_share = ((x - total).exp_().to(part.dtype)[..., None] for x in (joined_lse, part_lse))
            joined.mul_(share).addcmul_(part, part_share)
            joined_lse.copy_(total)
        ctx.save_for_backward(query, key, value, output_1HQE, lse_1HQ)
        ctx.blocks, ctx.causal, ctx.scaling = (own, branches), not for_leaves, scaling
        return output_1HQE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_1HQE: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output_1HQE, lse_1HQ = ctx.saved_tensors
        own, branches = ctx.blocks

        def of_block(block: Block, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            grad, output, lse = (
                x[:, :, block.query_start : block.query_end] for x in (grad_1HQE, output_1HQE, lse_1HQ)
            )
            tensors = _of_block(block, query, key, value)
            return _flash_backward(grad, *tensors, output, lse, 0.0, causal, scale=ctx.scaling)

        # Every query and key is in exactly one own block, so these fill the row. The layout is token-major, as the
        # projections read it.
        parts = zip(*(of_block(block, ctx.causal) for block in own), strict=True)
        grads = [torch.cat([part.transpose(1, 2) for part in column], dim=1).transpose(1, 2) for column in parts]
        for block in branches:
            for full, part in zip(_of_block(block, *grads), of_block(block, False), strict=True):
                full.add_(part)
        return (*grads, None, None, None)


def _of_block(block: Block, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a block's slices, which are views of the packed row."""
    return (
        query[:, :, block.query_start : block.query_end],
        key[:, :, block.key_start : block.key_end],
        value[:, :, block.key_start : block.key_end],
    )
