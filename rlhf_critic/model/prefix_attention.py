"""Prefix attention: attention over a prefix tree inside Hugging Face models, with a reduced last layer.

`enable_prefix_trees` switches a model's attention to the implementations registered here. A forward pass with
``prefix_tree=AttentionPlan(...)`` runs linear layers over the packed row and attention over the tree. A forward pass
without it is plain transformers. The kernels are in `rlhf_critic.model.block_attention` for CPUs and in
`rlhf_critic.model.varlen_attention` for GPUs.
Knows the families it is tested with. Knows nothing about rewards or training.

Shape legend: T computed tokens, R computed runs, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from rlhf_critic.model.attention_plan import AttentionPlan
from rlhf_critic.model.block_attention import fused_attention, plain_attention
from rlhf_critic.model.varlen_attention import varlen_attention
from rlhf_critic.model.varlen_kernels import Scores, kernel_for

# Families, by config.model_type, for which tests check that values equal those of each sequence alone.
PREFIX_TREE_FAMILIES = frozenset(
    {
        *("gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gptj", "llama", "mistral", "olmo2", "olmo3", "opt"),
        *("phi", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
        *("deepseek_v3", "gpt_oss", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe"),  # mixtures of experts
    }
)
IMPLEMENTATIONS = {"sdpa": "prefix_tree_sdpa", "eager": "prefix_tree_eager"}
# Modules of a decoder layer that process each token separately and whose output only that token uses.
TOKENWISE_MODULES = (
    "self_attn.q_proj",
    *("self_attn.o_proj", "self_attn.out_proj", "attn.c_proj", "attention.dense"),
    *("mlp", "fc1", "fc2"),
)


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

    def _put_back(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> Any:
        if self.tokens is None:
            return None
        if isinstance(output, tuple):  # a mixture of experts may return its router's scores too
            return self._put_back(module, arguments, output[0]), *output[1:]
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
        **options: ``scaling``, ``dropout``, ``softcap``, ``sliding_window``, ``s_aux`` as transformers passes them.

    Returns:
        The output ``[1, T, H, E]`` and None for the attention weights.
    """
    is_sdpa = module.config._attn_implementation == IMPLEMENTATIONS["sdpa"]
    if prefix_tree is None:
        # A family's eager attention, for example with soft caps, is in the module that defines its attention class.
        plain = sdpa_attention_forward if is_sdpa else sys.modules[type(module).__module__].eager_attention_forward
        return plain(module, query, key, value, attention_mask, **options)
    key, value = prefix_tree.extend(module.layer_idx, key, value)
    attend = _attend_on_gpu if query.is_cuda else _attend_on_cpu
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


def _attend_on_cpu(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    for_leaves: bool,
    options: dict[str, Any],
) -> Tensor:
    is_sdpa = module.config._attn_implementation == IMPLEMENTATIONS["sdpa"]
    plain = not is_sdpa or _exceeded_window(plan, options) or _needs_plain_operations(query, value, options)
    return (plain_attention if plain else fused_attention)(module, query, key, value, plan, for_leaves, options)


def _attend_on_gpu(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    for_leaves: bool,
    options: dict[str, Any],
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
    scores = Scores(scale, _exceeded_window(plan, options), options.get("softcap"))
    kernel = None if _needs_plain_operations(query, value, options) else kernel_for(query, scores)
    if kernel is None:
        return plain_attention(module, query, key, value, plan, for_leaves, options)
    calls = plan.calls(for_leaves, paths_only=scores.window is not None or not kernel.packs_log_sum_exp)
    return varlen_attention(query, key, value, calls, kernel, scores)


def _needs_plain_operations(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Returns whether no kernel computes a layer: it has dropout, sinks, or values of another size than keys."""
    return bool(options.get("dropout")) or options.get("s_aux") is not None or query.shape[-1] != value.shape[-1]


def _exceeded_window(plan: AttentionPlan, options: dict[str, Any]) -> int | None:
    """Returns the window of a layer, if a sequence is longer."""
    window = options.get("sliding_window")
    return window if window is not None and int(plan.tree.lengths_S.max()) > window else None
