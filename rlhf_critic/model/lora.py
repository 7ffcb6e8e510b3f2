"""LoRA: adds peft's low-rank adapters (Hu et al., "LoRA", 2021) and merges them weight by weight.

Files contain no adapters: `merged` returns the weights of a model without adapters. Knows nothing about files, data or
training.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_critic.config.model import ModelConfig
from rlhf_critic.errors import ConfigError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def add_adapters(model: PreTrainedModel, options: ModelConfig, seed: int) -> None:
    """Adds adapters to a model in place and freezes everything but them and the head.

    Call it before DeepSpeed initialises the model, because its optimizer holds the trainable parameters. Under ZeRO-3
    the adapters are created unpartitioned and identical on all ranks. DeepSpeed partitions them with the rest. The
    experts and the router of a mixture of experts are no linear layers, and get none.

    Raises:
        ConfigError: peft is missing, or a target names no module.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("model.lora_rank needs the package peft: pip install 'rlhf-critic[lora]', or set it to 0")
    from peft import LoraConfig, inject_adapter_in_model

    adapted, targets = _linear_layers(model, options)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        task_type="SEQ_CLS",  # makes peft exclude the head from "all-linear"
    )
    model.requires_grad_(False)
    # The state of the generator depends on the ZeRO stage; the adapters must not.
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, adapted)
    except ValueError as error:
        raise ConfigError(
            f"model.lora_target_modules {list(options.lora_target_modules)}: {error} Use names of linear layers of "
            f"{type(model).__name__}, or leave it empty for all of them"
        ) from error
    model.score.weight.requires_grad_(True)


def _linear_layers(model: PreTrainedModel, options: ModelConfig) -> tuple[nn.Module, str | list[str]]:
    """Returns the module to adapt and the names of the linear layers in it, as peft takes them.

    Of a mixture of experts it is the list of layers alone. peft reads the family from a model's config, and would add
    adapters to the tensors of the experts, which neither ZeRO-3 nor an export can merge tensor by tensor.
    """
    chosen = list(options.lora_target_modules)
    if "router_logits" not in (getattr(model.base_model, "_can_record_outputs", None) or {}):
        return model, chosen or "all-linear"
    layers = next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    linear = [name for name, module in layers.named_modules() if type(module) is nn.Linear]  # not a router
    return layers, chosen or linear


def adapters_of(module: nn.Module) -> dict[str, LoraLayer]:
    """Returns the layers with adapters, by the name of the weight that they adapt, ``...q_proj.base_layer.weight``."""
    if importlib.util.find_spec("peft") is None:
        return {}
    from peft.tuners.lora import LoraLayer

    return {
        f"{name}.base_layer.weight": layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)
    }


def adapter_parameters(layer: LoraLayer) -> list[Tensor]:
    """Returns the parameters of a layer's adapters."""
    base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in layer.parameters() if id(parameter) not in base]


def merged(weight: Tensor, layer: LoraLayer) -> Tensor:
    """Returns ``W + (alpha / r) B A``, summed in fp32, in the dtype of ``W``, the weight. All must be gathered."""
    deltas = (layer.get_delta_weight(adapter).detach().float() for adapter in layer.active_adapters)
    return sum(deltas, weight.detach().float()).to(weight.dtype)
