"""DeepSpeed's configuration as a dictionary. Knows neither torch nor deepspeed."""

from __future__ import annotations

from typing import Any

from rlhf_critic.config.model import BodyConfig, OptimizerConfig


def deepspeed_config(model: BodyConfig, options: OptimizerConfig) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for a model and an optimizer.

    DeepSpeed treats every micro-batch as a batch. `rlhf_critic.training.engine.TrainingEngine.take_step` decides where
    a step ends.
    """
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        # DeepSpeed's default bucket has 500 million elements. ZeRO-3 allocates it before there is anything to reduce.
        "reduce_bucket_size": 20_000_000,
    }
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
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
