"""A search for training setups that fit a GPU, over the memory that `memory_estimate` calculates.

Knows nothing about clusters or the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from transformers import PreTrainedConfig

from rlhf_critic.config.model import ModelConfig, OptimizerConfig
from rlhf_critic.config.tools import Dtype, PlanJobConfig
from rlhf_critic.model.critic import Critic
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
        peak: Dense floating-point operations per second by dtype, on tensor cores for bfloat16 and without for float32
            (torch leaves TF32 off).
    """

    name: str
    memory: int
    peak: dict[str, float]


@dataclass(frozen=True)
class Setup:
    """The training options that decide memory.

    Attributes:
        options: Options of the optimizer, with a token budget in numbers.
        dtype: Dtype of parameters and activations.
        world_size: Number of ranks.
    """

    options: OptimizerConfig
    dtype: Dtype
    world_size: int

    def changed(self, **options: Any) -> Setup:
        """Returns a copy with some options of the optimizer changed."""
        return replace(self, options=OptimizerConfig(**{**self.options.model_dump(), **options}))


class Planner:
    """Calculates the memory of one model in any setup, and calculates once what several setups share.

    Args:
        config: The options of the plan.
        model: The shape of the model.
        gpu: The GPU of each rank.

    Raises:
        CheckpointError: No critic can be made of the model.
    """

    def __init__(self, config: PlanJobConfig, model: PreTrainedConfig, gpu: Gpu) -> None:
        self.setup = Setup(config.optimizer, config.dtype, config.world_size)
        self.gpu = gpu
        self._config = config
        self._model = model
        self._activations = cache(self._calculate_activations)
        self._critic = cache(self._build)

    def _build(self, dtype: Dtype) -> Critic:
        return critic_without_weights(self._model, self._options(dtype))

    def _options(self, dtype: Dtype) -> ModelConfig:
        config = self._config
        return ModelConfig(dtype=dtype, freeze_layers=config.freeze_layers, lora_rank=config.lora_rank)

    def _calculate_activations(self, dtype: Dtype, tokens: int, gradient_checkpointing: bool) -> int:
        return activation_bytes(
            self._critic(dtype), tokens, self._config.max_length, gradient_checkpointing=gradient_checkpointing
        )

    @cached_property
    def count(self) -> ModelCount:
        """The numbers of the critic's parameters."""
        return count_model(self._critic(self._config.dtype))

    def memory(self, setup: Setup) -> ShardMemory:
        """Calculates the memory of a shard."""
        options = setup.options
        assert options.token_budget != "auto", "a plan has a token budget"
        activations = self._activations(setup.dtype, options.token_budget, options.gradient_checkpointing)
        return shard_memory(self.count, self._options(setup.dtype), options, setup.world_size, activations)

    def fits(self, setup: Setup) -> bool:
        """Returns true if a shard fits the GPU."""
        return self.memory(setup).peak <= USABLE * self.gpu.memory

    def smallest_stage(self, setup: Setup) -> int | None:
        """Finds the lowest ZeRO stage that fits without other changes; lower stages communicate less."""
        options = setup.options
        lowest = 3 if options.offload_parameters else 1 if options.offload_optimizer else 0
        return next((stage for stage in range(lowest, 4) if self.fits(setup.changed(zero_stage=stage))), None)

    def fitting_setup(self) -> Setup | None:
        """Returns the first setup that fits, from the given one to the one with the least memory."""
        for setup in _with_less_and_less_memory(self.setup):
            stage = self.smallest_stage(setup)
            if stage is not None:
                # The given stage is lowered only if it takes more memory, as a higher stage does with one rank.
                kept = setup.changed(zero_stage=max(stage, self.setup.options.zero_stage))
                return kept if self.fits(kept) else setup.changed(zero_stage=stage)
        return None

    def enough_ranks(self) -> int | None:
        """Finds the first of twice, four times ... as many ranks that fit at ZeRO-3 with gradient checkpointing."""
        sharded = self.setup.changed(zero_stage=3, gradient_checkpointing=True)
        ranks = (self.setup.world_size * 2**power for power in range(1, MAX_RANKS.bit_length()))
        return next((n for n in ranks if n <= MAX_RANKS and self.fits(replace(sharded, world_size=n))), None)

    def step_seconds(self) -> float:
        """Calculates the time of a step whose work divides evenly, from the measured or the assumed rate."""
        config = self._config
        if config.tokens_per_second is not None:
            return config.tokens_per_step / (config.tokens_per_second * config.world_size)
        operations = config.tokens_per_step * self.operations_per_token
        return operations / (config.utilisation * self.gpu.peak[config.dtype] * config.world_size)

    @cached_property
    def operations_per_token(self) -> float:
        """Floating-point operations per token, forward and backward.

        Six per parameter of a matrix product, and causal attention over ``max_length`` tokens, which is half of the
        count in Chowdhery et al., "PaLM" (2022), appendix B. Frozen weights take four, because they have no gradient.
        """
        critic = self._critic(self._config.dtype)
        body = critic.model.config.get_text_config()
        tables = {id(parameter) for parameter in critic.model.get_input_embeddings().parameters()}
        multiplied = sum(
            (6 if parameter.requires_grad else 4) * parameter.numel()
            for parameter in critic.parameters()
            if id(parameter) not in tables
        )
        return multiplied + 6.0 * body.num_hidden_layers * body.hidden_size * self._config.max_length


def _with_less_and_less_memory(setup: Setup) -> Iterator[Setup]:
    """Yields setups with one more change each; changes that cost the least time come first."""
    if not setup.options.offload_parameters:
        setup = setup.changed(zero_stage=3)
    yield setup
    yield (setup := setup.changed(gradient_checkpointing=True))
    yield (setup := replace(setup, dtype="bfloat16"))
    budget = setup.options.token_budget
    yield (setup := setup.changed(token_budget=budget if budget == "auto" else min(budget, MIN_TOKENS)))
    yield (setup := setup.changed(offload_optimizer=True))
    yield setup.changed(offload_parameters=True)
