"""Fused norms and activations, and their gradients, equal those of transformers to rounding."""

import shutil

import pytest
import torch

from rlhf_critic.model.fused_ops import (
    GATED_MLPS,
    RMS_NORMS,
    GatedSiLU,
    compiled_gated_silu,
    fuse_norms_and_activations,
)
from tests.rlhf_critic.families import family_configs, random_model

FUSED = [name for name in family_configs() if name in {"llama", "mistral", "qwen2", "qwen3"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FUSED)
def test_outputs_and_gradients_are_those_of_transformers(name, dtype):
    outputs, gradients, patched = [], [], []
    for fused in (False, True):
        model = random_model(family_configs()[name], "sdpa").to(dtype)
        if fused:
            fuse_norms_and_activations(model)
        patched.append({type(module).__name__ for module in model.modules() if "forward" in vars(module)})
        hidden = model.model(input_ids=torch.arange(3, 33).view(2, 15)).last_hidden_state
        (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        outputs.append(hidden.float())
        gradients.append({n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None})
    assert patched[0] == set()
    assert len(patched[1]) == 2
    assert patched[1] <= RMS_NORMS | GATED_MLPS
    tolerance = 1e-5 if dtype == torch.float32 else 0.03  # bf16 keeps 8 bits

    def differ(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other).norm() / other.norm()).item()

    assert differ(outputs[1], outputs[0]) < tolerance
    for parameter, gradient in gradients[0].items():
        if not parameter.endswith("k_proj.bias"):  # its gradient is only rounding noise
            assert differ(gradients[1][parameter], gradient) < tolerance, parameter


def test_other_norms_and_activations_are_left_alone():
    for name in ("gemma2", "gpt2", "opt"):
        model = random_model(family_configs()[name], "eager")
        fuse_norms_and_activations(model)
        assert not [module for module in model.modules() if "forward" in vars(module)]
    config = family_configs()["llama"]
    config.hidden_act = "gelu"
    model = random_model(config, "sdpa")
    fuse_norms_and_activations(model)
    assert {type(m).__name__ for m in model.modules() if "forward" in vars(m)} == {"LlamaRMSNorm"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_compiled_activation_of_gpus_computes_the_same_for_any_number_of_tokens(dtype):
    compiled = compiled_gated_silu(torch.device("cpu"))
    assert compiled is not GatedSiLU.apply, "compilation failed"
    for tokens in (1, 7, 130):
        gate, up = (torch.randn(tokens, 32, dtype=dtype, requires_grad=True) for _ in range(2))
        found, expected = [], []
        for activate, results in ((compiled, found), (GatedSiLU.apply, expected)):
            output = activate(gate, up)
            results += [output.detach(), *torch.autograd.grad(output.float().sin().sum(), (gate, up))]
        tolerance = 1e-6 if dtype == torch.float32 else 0.04  # a few roundings to 8 bits
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
