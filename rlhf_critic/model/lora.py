"""Low-rank adapters (Hu et al., "LoRA", 2021), which are peft's: adding them, and merging them weight by weight.

Files know none: `merged` gives weights as a model without adapters has them. Knows nothing of files, data or training.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_critic.config.model import ModelConfig
from rlhf_critic.errors import ConfigError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


ALL_LINEAR = "all-linear"


def add_adapters(model: PreTrainedModel, options: ModelConfig, seed: int) -> None:
    """Adds adapters to a model in place and freezes all but them and the head.

    Call it before DeepSpeed takes the model: its optimizer holds what can be trained. Under ZeRO-3 the adapters are
    made whole and alike on all ranks, and partitioned by DeepSpeed with the rest.

    Args:
        model: With a ``score`` head; of any ZeRO stage.
        options: ``lora_rank`` (above 0) and what follows it.
        seed: Of the adapters.

    Raises:
        ConfigError: peft is missing, or a target names no module.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("model.lora_rank needs the package peft: pip install 'rlhf-critic[lora]', or set it to 0")
    from peft import LoraConfig, inject_adapter_in_model

    targets: Any = list(options.lora_target_modules) or ALL_LINEAR
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        task_type="SEQ_CLS",  # with it peft leaves the head out of "all-linear"
    )
    # How many numbers were drawn before depends on the ZeRO stage; the adapters must not.
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(
            f"model.lora_target_modules {list(options.lora_target_modules)}: {error} Name linear layers of "
            f"{type(model).__name__}, or none for all of them"
        ) from error
    model.score.weight.requires_grad_(True)


def adapters_of(module: nn.Module) -> dict[str, LoraLayer]:
    """The layers with adapters, by the name of the weight that they adapt: ``...q_proj.base_layer.weight``."""
    if importlib.util.find_spec("peft") is None:
        return {}
    from peft.tuners.lora import LoraLayer

    return {
        f"{name}.base_layer.weight": layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)
    }


def adapter_parameters(layer: LoraLayer) -> list[Tensor]:
    """What a layer's adapters are made of."""
    base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    return [parameter for parameter in layer.parameters() if id(parameter) not in base]


def merged(weight: Tensor, layer: LoraLayer) -> Tensor:
    """A weight with its adapters added, in the weight's dtype; all of them whole.

    ``W + (alpha / r) B A``, summed in fp32.
    """
    whole = weight.detach().float()
    for adapter in layer.active_adapters:
        whole = whole + layer.get_delta_weight(adapter).detach().float()
    return whole.to(weight.dtype)
