"""DeepSpeed's configuration as a dictionary. Knows neither torch nor deepspeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_critic.config.model import BodyConfig, OptimizerConfig

# Reduction buffers in elements. DeepSpeed's default has 500 million. ZeRO-3 allocates it before there is anything to
# reduce.
CPU_BUCKET = 20_000_000
MAX_GPU_BUCKET = 200_000_000
BUCKET_PER_RANK = 5_000_000  # an estimate; smaller parts of a rank make NCCL wait instead of moving bytes

# Timers of DeepSpeed would wait for the device twice in every micro-batch.
TIMERS_OFF = {"throughput": {"enabled": False}}


@dataclass(frozen=True)
class Hardware:
    """The devices of the ranks.

    Attributes:
        on_gpu: Whether each rank has a GPU.
        ranks: Number of ranks.
    """

    on_gpu: bool = False
    ranks: int = 1


CPU = Hardware()


def bucket_elements(parameters: int | None, hardware: Hardware) -> int:
    """Returns the size of the buffer in which gradients are reduced, in elements.

    Args:
        parameters: Number of trained parameters, above which a buffer has no use on a GPU; None if unknown.
        hardware: The devices of the ranks.
    """
    if not hardware.on_gpu:
        return CPU_BUCKET
    size = min(max(CPU_BUCKET, BUCKET_PER_RANK * hardware.ranks), MAX_GPU_BUCKET)
    return size if parameters is None else max(1, min(size, parameters))


def deepspeed_config(
    model: BodyConfig, options: OptimizerConfig, hardware: Hardware = CPU, parameters: int | None = None
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for a model and an optimizer.

    DeepSpeed treats every micro-batch as a batch. `rlhf_critic.training.engine.TrainingEngine.take_step` decides where
    a step ends.

    Args:
        model: Options of the model.
        options: Options of the optimizer.
        hardware: The devices of the ranks.
        parameters: Number of trained parameters; None before the model exists.
    """
    in_bf16 = model.resolved(hardware.on_gpu).dtype == "bfloat16"
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "reduce_bucket_size": bucket_elements(parameters, hardware),
    }
    if hardware.on_gpu:
        zero["overlap_comm"] = hardware.ranks > 1  # communication beside the backward pass
    if options.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if options.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.max_grad_norm,
        "zero_optimization": zero,
        # The optimizer is torch's fused AdamW, on CPUs too; DeepSpeed's own would have to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": in_bf16},
        "timers": TIMERS_OFF,
        "steps_per_print": 10**9,
    }
