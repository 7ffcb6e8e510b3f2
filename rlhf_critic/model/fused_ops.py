"""Fused operations: RMS norms and gated activations with fewer passes over memory, for families with equal modules.

The results equal those of transformers' modules to rounding. On CPUs the gradients are explicit, so that no
intermediate result is kept that can be recomputed from kept tensors. On GPUs norms are torch's fused kernel, and
activations are compiled. Knows module classes by name, and nothing about batches or training.

Shape legend: T tokens (all leading dimensions), D hidden size, F intermediate size.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Classes with ``weight [D]`` and ``variance_epsilon``, whose output is weight * x / rms(x).
RMS_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
# Classes with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``, whose output is down(act(gate(x)) * up(x)).
GATED_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})


def fuse_norms_and_activations(model: nn.Module) -> None:
    """Replaces the forward passes of the modules listed above by those below."""
    for module in model.modules():
        name = type(module).__name__
        if name in RMS_NORMS:
            module.forward = types.MethodType(_rms_norm_forward, module)
        elif name in GATED_MLPS and getattr(module.config, "hidden_act", None) in {"silu", "swish"}:
            module.forward = types.MethodType(_gated_mlp_forward, module)


def _rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if _on_gpu(hidden_states) and hidden_states.dtype == self.weight.dtype:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)  # rounds once
    return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def _gated_mlp_forward(self: Any, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
    activate = compiled_gated_silu(hidden_states.device) if _on_gpu(hidden_states) else GatedSiLU.apply
    return self.down_proj(activate(gate, up))


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def gated_silu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Computes `GatedSiLU` in plain operations, for a compiler to fuse."""
    return F.silu(gate_TF) * up_TF


@cache
def compiled_gated_silu(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Compiles `gated_silu` for a GPU; returns `GatedSiLU` if that fails, for example without a C compiler."""
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(gated_silu, dynamic=True)
    try:
        with torch.enable_grad():
            probe = torch.ones(4, 16, device=device, requires_grad=True)
            compiled(probe, probe).sum().backward()
    except Exception as error:  # a compiler can fail in many ways, and results do not depend on it
        logger.warning("could not compile the gated activation, using separate kernels: %s", error)
        return GatedSiLU.apply
    return compiled


class RMSNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x^2) + epsilon)``, Zhang and Sennrich, "Root mean square layer normalization" (2019).

    The normalisation is computed in fp32 and rounded before it is scaled, as transformers does.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        """Computes the norm, ``[T, D]``, of ``[T, D]``."""
        mean_square_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse_T1 = mean_square_T1.div_(x_TD.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, inverse_T1)
        return (x_TD * inverse_T1).to(x_TD.dtype).mul_(weight_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        """Computes dx = r * (g w) - x * r^3 * mean(g w x) and dw = sum over tokens of g x r, r = 1 / rms, in fp32."""
        x_TD, weight_D, inverse_T1 = ctx.saved_tensors
        size = x_TD.shape[-1]
        x, grad, inverse = x_TD.reshape(-1, size), grad_TD.reshape(-1, size).float(), inverse_T1.reshape(-1, 1)
        product = grad * x
        weight_grad_D = (inverse.T @ product)[0].to(weight_D.dtype)
        pull_T1 = (product @ weight_D.float())[:, None].mul_(inverse.pow(3)).div_(-size)
        x_grad = torch.mul(grad, weight_D, out=product).mul_(inverse).addcmul_(x, pull_T1)
        return x_grad.to(x_TD.dtype).view_as(x_TD), weight_grad_D, None


class GatedSiLU(torch.autograd.Function):
    """``silu(gate) * up``, Shazeer, "GLU variants improve Transformer" (2020); keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """Computes ``[T, F]`` from gate and up, ``[T, F]`` each."""
        ctx.save_for_backward(gate_TF, up_TF)
        return F.silu(gate_TF).mul_(up_TF)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the gradients of gate and up."""
        gate_TF, up_TF = ctx.saved_tensors
        gate_grad_TF = grad_TF * up_TF
        torch.ops.aten.silu_backward.grad_input(gate_grad_TF, gate_TF, grad_input=gate_grad_TF)
        return gate_grad_TF, F.silu(gate_TF).mul_(grad_TF)
