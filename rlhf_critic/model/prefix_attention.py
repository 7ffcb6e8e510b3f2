"""Prefix attention: attention over a prefix tree inside Hugging Face models, with a reduced last layer.

`enable_prefix_trees` switches a model's attention to the implementations registered here. A forward pass with
``prefix_tree=AttentionPlan(...)`` runs linear layers over the packed row and attention block by block. A forward pass
without it is plain transformers. The plan has one block for each run attending to itself and one for each branch
attending to the run it continues. Blocks are slices of the packed row, so the fused path copies nothing and needs no
T x T mask. Soft caps, dropout and windows shorter than a sequence use a plain path, which gathers the keys of each run.

If a token attends to several blocks, their outputs are combined by their log-sum-exp, which is exact (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018). The backward pass gives every block the combined output
and log-sum-exp, as ring attention does (Liu et al., 2023).
Knows the families it is tested with. Knows nothing about rewards or training.

Shape legend: T tokens of the packed row, R runs, Q queries, N keys, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from rlhf_critic.batching.prefix_tree import PrefixTree

# Families, by config.model_type, for which tests check that values equal those of each sequence alone.
PREFIX_TREE_FAMILIES = frozenset({"gemma2", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"})
IMPLEMENTATIONS = {"sdpa": "prefix_tree_sdpa", "eager": "prefix_tree_eager"}
# Modules of a decoder layer that process each token separately and whose output only that token uses.
TOKENWISE_MODULES = (
    "self_attn.q_proj",
    *("self_attn.o_proj", "self_attn.out_proj", "attn.c_proj", "attention.dense"),
    *("mlp", "fc1", "fc2"),
)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Block:
    """Range of computed queries, and the range of tokens of the packed row that are their keys."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Attention pattern of a prefix tree, shared by all layers of a forward pass.

    With ``leaves_only``, the last layer computes only the last token of every run and leaves the rest undefined.
    """

    tree: PrefixTree
    leaves_only: bool
    device: torch.device

    @cached_property
    def leaf_tokens_R(self) -> Tensor:
        """Index of the last token of each run. Every sequence ends in one of them."""
        return torch.from_numpy(self.tree.run_ends_R - 1).to(self.device)

    @cached_property
    def own_blocks(self) -> list[Block]:
        """Causal blocks of every run attending to itself."""
        runs = zip(self.tree.run_starts_R.tolist(), self.tree.run_ends_R.tolist(), strict=True)
        return [Block(start, end, start, end) for start, end in runs]

    @cached_property
    def branch_blocks(self) -> list[Block]:
        """Blocks of branches: for every branching token, its descendants attend to its run up to that token."""
        tree = self.tree
        branches: dict[int, tuple[int, int]] = {}
        # Runs that branch off at the same token, and their descendants, are adjacent in the row.
        columns = (tree.run_parents_R.tolist(), tree.run_starts_R.tolist(), tree.subtree_ends_R.tolist())
        for parent, start, end in zip(*columns, strict=True):
            if parent >= 0:
                branches[parent] = (branches.get(parent, (start, end))[0], end)
        run_starts = tree.run_starts_R[tree.run_of_T[list(branches)]].tolist()
        return [
            Block(start, end, run_start, parent + 1)
            for run_start, (parent, (start, end)) in zip(run_starts, branches.items(), strict=True)
        ]

    @cached_property
    def leaf_blocks(self) -> tuple[list[Block], list[Block]]:
        """`own_blocks` and `branch_blocks` for the last token of each run only; query r belongs to run r."""
        own = [Block(run, run + 1, block.key_start, block.key_end) for run, block in enumerate(self.own_blocks)]
        first_run_at = {start: run for run, start in enumerate([*self.tree.run_starts_R.tolist(), len(self.tree)])}
        branches = [
            Block(first_run_at[block.query_start], first_run_at[block.query_end], block.key_start, block.key_end)
            for block in self.branch_blocks
        ]
        return own, branches

    def block_mask(self, for_leaves: bool, sliding_window: int | None) -> BlockMask:
        """Returns the tree as a mask for flex attention, created once for each kind of layer."""
        masks: dict[tuple[bool, int | None], BlockMask] = self.__dict__.setdefault("_block_masks", {})
        if (for_leaves, sliding_window) not in masks:
            token_of_query = self.leaf_tokens_R if for_leaves else torch.arange(len(self.tree), device=self.device)
            subtree_ends_T = torch.from_numpy(self.tree.subtree_ends_T).to(self.device)
            position_ids_T = torch.from_numpy(self.tree.position_ids_T).to(self.device)

            def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                token = token_of_query[query]
                visible = (key <= token) & (token < subtree_ends_T[key])
                if sliding_window is not None:
                    visible &= position_ids_T[token] - position_ids_T[key] < sliding_window
                return visible

            sizes = (len(token_of_query), len(self.tree))
            compiled = self.device.type == "cuda"  # otherwise the full mask is materialised temporarily
            masks[for_leaves, sliding_window] = create_block_mask(
                attends, None, None, *sizes, device=str(self.device), _compile=compiled
            )
        return masks[for_leaves, sliding_window]


class _LeavesOnly:
    """Hooks that restrict modules of the last layer to the last token of each run, if the plan is ``leaves_only``.

    They select these tokens before a module and fill the other positions with zeros, which are not read, after it.
    Every pass of the layer's attention sets the plan again, including recomputation by gradient checkpointing.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module) -> None:
        self.tokens: Tensor | None = None
        self._size = 0
        attention.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name, module in layer.named_modules():
            if name in TOKENWISE_MODULES:
                module.register_forward_pre_hook(self._pick)
                module.register_forward_hook(self._put_back)

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        plan = options.get("prefix_tree")
        self.tokens = plan.leaf_tokens_R if plan is not None and plan.leaves_only else None

    def _pick(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.tokens is None:
            return None
        self._size = arguments[0].shape[-2]
        return (arguments[0].index_select(-2, self.tokens), *arguments[1:])

    def _put_back(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.tokens is None:
            return None
        padded = output.new_zeros(*output.shape[:-2], self._size, output.shape[-1])
        return padded.index_copy(-2, self.tokens, output)


def enable_prefix_trees(model: PreTrainedModel) -> bool:
    """Switches a model's attention to `prefix_tree_forward`, if its family and kernel are tested; returns whether."""
    if model.config._attn_implementation in IMPLEMENTATIONS.values():
        return True  # already enabled by an earlier critic of this model
    implementation = IMPLEMENTATIONS.get(model.config._attn_implementation)
    if model.config.model_type not in PREFIX_TREE_FAMILIES or implementation is None:
        return False
    model.set_attn_implementation(implementation)
    if model.config._attn_implementation != implementation:
        return False  # transformers only warns about classes it cannot switch
    layers = next(
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )
    names = ("self_attn", "attn", "attention")
    attention = next(getattr(layers[-1], name) for name in names if hasattr(layers[-1], name))
    attention.leaves_only = _LeavesOnly(layers[-1], attention)
    return True


def prefix_tree_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix_tree: AttentionPlan | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes attention for models: transformers' ``sdpa`` or ``eager``, or its equivalent over a prefix tree.

    In the last layer it computes leaves only, if the plan is ``leaves_only``.

    Args:
        module: The layer's attention module.
        query: ``[1, H, T, E]``.
        key: ``[1, K, T, E]``; heads are grouped, H is a multiple of K.
        value: ``[1, K, T, E]``.
        attention_mask: Mask of plain transformers, ignored if there is a tree.
        prefix_tree: Plan of this forward pass, if it has a tree.
        **options: ``scaling``, ``dropout``, ``softcap``, ``sliding_window`` as transformers passes them.

    Returns:
        The output ``[1, T, H, E]`` and None for the attention weights.
    """
    is_sdpa = module.config._attn_implementation == IMPLEMENTATIONS["sdpa"]
    if prefix_tree is None:
        # A family's eager attention, for example with soft caps, is in the module that defines its attention class.
        plain = sdpa_attention_forward if is_sdpa else sys.modules[type(module).__module__].eager_attention_forward
        return plain(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    exceeds_window = window is not None and int(prefix_tree.tree.lengths_S.max()) > window
    if options.get("dropout"):  # flex attention has none
        attend = _eager
    elif query.is_cuda:
        attend = _flex
    else:
        attend = _fused if is_sdpa and not exceeds_window else _eager
    if not (prefix_tree.leaves_only and hasattr(module, "leaves_only")):
        return attend(module, query, key, value, prefix_tree, False, options), None
    leaves_R = prefix_tree.leaf_tokens_R
    output_1RHE = attend(module, query.index_select(2, leaves_R), key, value, prefix_tree, True, options)
    output = output_1RHE.new_zeros(1, query.shape[2], *output_1RHE.shape[2:])
    return output.index_copy(1, leaves_R, output_1RHE), None


AttentionInterface.register(IMPLEMENTATIONS["sdpa"], prefix_tree_forward)
AttentionInterface.register(IMPLEMENTATIONS["eager"], prefix_tree_forward)
AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], sdpa_mask)
AttentionMaskInterface.register(IMPLEMENTATIONS["eager"], eager_mask)


def _flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, for_leaves: bool, options: Any
) -> Tensor:
    """Computes flex attention with the tree as block mask."""
    mask = plan.block_mask(for_leaves, options.get("sliding_window"))
    return flex_attention_forward(
        module, query, key, value, mask, scaling=options.get("scaling"), softcap=options.get("softcap")
    )[0]


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, for_leaves: bool, options: Any
) -> Tensor:
    """Computes attention run by run in plain operations, for soft caps, dropout and windows shorter than a sequence."""
    group = query.shape[1] // key.shape[1]
    scaling, softcap, window = (options.get(name) for name in ("scaling", "softcap", "sliding_window"))
    outputs = []
    for run, block in enumerate(plan.own_blocks):
        path_N = torch.from_numpy(plan.tree.path_tokens(block.key_end - 1)).to(query.device)
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
        weights = scores.masked_fill(hidden_QN, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, options.get("dropout") or 0.0, training=module.training)
        outputs.append((weights @ value_K1NE).flatten(0, 1))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def _fused(
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
