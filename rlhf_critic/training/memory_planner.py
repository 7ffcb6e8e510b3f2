"""A search for training setups that fit a GPU, over the memory that `memory_estimate` calculates.

Knows nothing about clusters or the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from transformers import PreTrainedConfig

from rlhf_critic.config.deepspeed import Hardware
from rlhf_critic.config.model import Dtype, ModelConfig
from rlhf_critic.config.tools import PlanJobConfig
from rlhf_critic.model.factory import critic_without_weights
from rlhf_critic.training.memory_estimate import ModelCount, ShardMemory, activation_bytes, count_model, shard_memory

# Fraction of a GPU's memory that a shard may use. The rest is for the CUDA context, NCCL, fragmentation and the scratch
# space of kernels. An assumption.
USABLE = 0.9
MAX_RANKS = 1024
MIN_TOKENS = 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU, according to its vendor's data sheet.

    Attributes:
        name: Product name.
        memory: Bytes of memory.
        peak: Dense floating-point operations per second on tensor cores, by dtype; float32 multiplies in TF32.
    """

    name: str
    memory: int
    peak: dict[str, float]


class Planner:
    """Calculates the memory of one model in any setup, and calculates once what several setups share.

    Args:
        setup: The options of the plan. Other setups are copies of it with other options of memory.
        model: The shape of the model.
        gpu: The GPU of each rank.

    Raises:
        CheckpointError: No critic can be made of the model.
    """

    def __init__(self, setup: PlanJobConfig, model: PreTrainedConfig, gpu: Gpu) -> None:
        self.setup = setup
        self.gpu = gpu
        self._critic = cache(lambda dtype: critic_without_weights(model, self._options(dtype)))
        self._activations = cache(
            lambda dtype, tokens, gradient_checkpointing: activation_bytes(
                self._critic(dtype), tokens, setup.max_length, gradient_checkpointing=gradient_checkpointing
            )
        )

    def _options(self, dtype: Dtype) -> ModelConfig:
        return ModelConfig(dtype=dtype, freeze_layers=self.setup.freeze_layers, lora_rank=self.setup.lora_rank)

    @cached_property
    def count(self) -> ModelCount:
        """The numbers of the critic's parameters."""
        return count_model(self._critic(self.setup.dtype))

    def memory(self, setup: PlanJobConfig) -> ShardMemory:
        """Calculates the memory of a shard."""
        return self._memory(setup, self._activations(setup.dtype, setup.token_budget, setup.gradient_checkpointing))

    def _memory(self, setup: PlanJobConfig, activations: int) -> ShardMemory:
        hardware = Hardware(on_gpu=True, ranks=setup.world_size)
        return shard_memory(self.count, self._options(setup.dtype), setup.optimizer, hardware, activations)

    def fits(self, setup: PlanJobConfig) -> bool:
        """Returns true if a shard fits the GPU."""
        usable = USABLE * self.gpu.memory
        # Activations of a large model take seconds to calculate, and do not matter where the rest does not fit.
        return self._memory(setup, 0).peak <= usable and self.memory(setup).peak <= usable

    def smallest_stage(self, setup: PlanJobConfig) -> int | None:
        """Finds the lowest ZeRO stage that fits without other changes; lower stages communicate less."""
        lowest = 3 if setup.offload_parameters else 1 if setup.offload_optimizer else 0
        setups = (setup.model_copy(update={"zero_stage": stage}) for stage in range(lowest, 4))
        return next((setup.zero_stage for setup in setups if self.fits(setup)), None)

    def recommended_stage(self, setup: PlanJobConfig) -> int | None:
        """Returns the ZeRO stage to use: 1 if it fits, otherwise the lowest that does.

        Stage 1 reduces gradients once a step. Stages 2 and 3 do in every micro-batch.
        """
        smallest = self.smallest_stage(setup)
        return 1 if smallest == 0 and self.fits(setup.model_copy(update={"zero_stage": 1})) else smallest

    def fitting_setup(self) -> PlanJobConfig | None:
        """Returns the first setup that fits, with one more change each; those that cost the least time come first."""
        setup = self.setup
        for change in (
            {"zero_stage": 3},
            {"gradient_checkpointing": True},
            {"dtype": "bfloat16"},
            {"token_budget": min(setup.token_budget, MIN_TOKENS)},
            {"offload_optimizer": True},
            {"offload_parameters": True},
        ):
            setup = setup.model_copy(update=change)
            stage = self.smallest_stage(setup)
            if stage is not None:
                # The given stage is lowered only if it takes more memory, as a higher stage does with one rank.
                kept = setup.model_copy(update={"zero_stage": max(stage, self.setup.zero_stage)})
                return kept if self.fits(kept) else setup.model_copy(update={"zero_stage": stage})
        return None

    def enough_ranks(self) -> int | None:
        """Finds the first of twice, four times ... as many ranks that fit at ZeRO-3 with gradient checkpointing."""
        sharded = self.setup.model_copy(update={"zero_stage": 3, "gradient_checkpointing": True})
        ranks = (sharded.world_size * 2**power for power in range(1, MAX_RANKS.bit_length()))
        setups = (sharded.model_copy(update={"world_size": count}) for count in ranks if count <= MAX_RANKS)
        return next((setup.world_size for setup in setups if self.fits(setup)), None)

    def step_seconds(self) -> float:
        """Calculates the time of a step whose work divides evenly, from the measured or the assumed rate.

        Assumed are six operations per token for each parameter of a matrix product, forward and backward, and causal
        attention over ``max_length`` tokens, which is half of the count in Chowdhery et al., "PaLM" (2022), appendix B.
        Frozen weights take four, because they have no gradient.
        """
        setup = self.setup
        if setup.tokens_per_second is not None:
            return setup.tokens_per_step / (setup.tokens_per_second * setup.world_size)
        critic = self._critic(setup.dtype)
        body = critic.model.config.get_text_config()
        tables = {id(parameter) for parameter in critic.model.get_input_embeddings().parameters()}
        multiplied = sum(
            (6 if parameter.requires_grad else 4) * parameter.numel()
            for parameter in critic.parameters()
            if id(parameter) not in tables
        )
        operations = multiplied + 6.0 * body.num_hidden_layers * body.hidden_size * setup.max_length
        rate = setup.utilisation * self.gpu.peak[setup.dtype] * setup.world_size
        return setup.tokens_per_step * operations / rate
