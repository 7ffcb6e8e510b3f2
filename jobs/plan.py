"""``python -m jobs.plan --model 8B --world-size 16 --zero-stage 3``: what a run would need, before anything is rented.

Calculates; starts nothing, needs neither weights, a GPU nor Ray.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Annotated, Any, Literal, get_args

import tyro
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from rich.console import Console
from rich.table import Table

from jobs.cli import command, run_job
from jobs.plan_catalog import GPUS, SHAPES, NodeGroup, model_config, node_groups
from rlhf_critic.config.base import NonNegativeInt, Section, parse_command_line
from rlhf_critic.config.model import ModelConfig, OptimizerConfig
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import critic_without_weights
from rlhf_critic.training.memory_estimate import ModelCount, ShardMemory, activation_bytes, count_model, shard_memory

Dtype = Literal["float32", "bfloat16"]
GpuName = Literal["a10g", "l4", "l40s", "a100-40g", "a100-80g", "h100", "h200"]
assert set(get_args(GpuName)) == set(GPUS)
# What is left to the CUDA context, NCCL, fragmentation and the scratch space of kernels. An assumption.
USABLE = 0.9
TABLE_WORLD_SIZES = (1, 8, 64, 256, 1024)
MOST_RANKS = 1024
LEAST_TOKENS = 1024
PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "masters": "optimizer: fp32 copies of parameters",
    "moments": "optimizer: AdamW's moments",
    "buckets": "buffers to reduce gradients in",
    "gathered": "parameters that ZeRO-3 gathers",
    "activations": "activations",
}


class PlanJobConfig(Section):
    """Calculates what a shard of a critic needs in training, whether it fits a GPU, and what to change if it does not.

    For example, 8B on two nodes of 8 GPUs:
    python -m jobs.plan --model 8B --world-size 16 --zero-stage 3 --gradient-checkpointing --cluster cluster/gcp.yaml

    The options that jobs.train has too mean what they mean there.
    """

    model: str = Field(
        "8B", description=f"A size ({', '.join(SHAPES)}), or a config.json, model directory or hub id; no weights."
    )
    world_size: PositiveInt = Field(8, description="Ranks, one GPU each: run.num_workers of jobs.train.")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="train.zero_stage of jobs.train.")
    dtype: Dtype = Field("bfloat16", description="model.dtype of jobs.train.")
    token_budget: PositiveInt = Field(4096, description="train.token_budget of jobs.train: tokens of a micro-batch.")
    max_length: PositiveInt = Field(1024, description="encoding.max_length of jobs.train: tokens of a sequence.")
    gradient_checkpointing: bool = Field(False, description="train.gradient_checkpointing of jobs.train.")
    offload_optimizer: bool = Field(False, description="train.offload_optimizer of jobs.train.")
    offload_parameters: bool = Field(False, description="train.offload_parameters of jobs.train.")
    freeze_layers: NonNegativeInt = Field(0, description="model.freeze_layers of jobs.train.")
    lora_rank: NonNegativeInt = Field(0, description="model.lora_rank of jobs.train.")
    gpu: GpuName = Field("a100-80g", description="The GPU of each rank.")
    cluster: str | None = Field(
        None,
        description="A YAML for `ray up`, such as cluster/aws.yaml: says how many nodes of which group it takes, "
        "if they have the --gpu.",
    )
    tokens_per_step: PositiveInt = Field(
        65_536, description="Tokens of a global batch, counted as `tokens` in the history of a run."
    )
    tokens_per_second: PositiveFloat | None = Field(
        None,
        description="Measured, of one GPU: `tokens_per_second` in a run's history/metrics.jsonl by its workers. Gives "
        "the time of a step.",
    )
    utilisation: Annotated[float, Field(gt=0, le=1)] = Field(
        0.35,
        description="Without a measured rate: the assumed share of the GPU's peak that goes into the model.",
    )
    table: bool = Field(False, description="Print the table of all sizes for this GPU in cluster/README.md and stop.")
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = Field(
        False, description="Print one JSON object, in bytes and seconds, instead of a table."
    )

    @model_validator(mode="after")
    def _consistent(self) -> PlanJobConfig:
        assert self.setup  # its own rules
        return self

    @property
    def setup(self) -> Setup:
        """What can be changed about the run."""
        options = OptimizerConfig(
            zero_stage=self.zero_stage,
            gradient_checkpointing=self.gradient_checkpointing,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            token_budget=self.token_budget,
        )
        return Setup(options, self.dtype, self.world_size)


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as memory goes."""

    options: OptimizerConfig
    dtype: Dtype
    world_size: int

    def changed(self, **options: Any) -> Setup:
        """The same with some options of the optimization changed."""
        return Setup(OptimizerConfig(**{**self.options.model_dump(), **options}), self.dtype, self.world_size)


class Planner:
    """Calculates the memory of one model in any setup; what several setups share is calculated once.

    Args:
        config: Says which model, and which part of it is trained.

    Raises:
        CheckpointError: The model has no config, or no critic can be made of it.
    """

    def __init__(self, config: PlanJobConfig) -> None:
        self._config = config
        self._activations = cache(self._calculate_activations)
        self._critic = cache(self._build)

    def _build(self, dtype: Dtype) -> Critic:
        return critic_without_weights(model_config(self._config.model), self._options(dtype))

    def _options(self, dtype: Dtype) -> ModelConfig:
        config = self._config
        return ModelConfig(dtype=dtype, freeze_layers=config.freeze_layers, lora_rank=config.lora_rank)

    def _calculate_activations(self, dtype: Dtype, tokens: int, gradient_checkpointing: bool) -> int:
        return activation_bytes(
            self._critic(dtype), tokens, self._config.max_length, gradient_checkpointing=gradient_checkpointing
        )

    @cached_property
    def count(self) -> ModelCount:
        """Its parameters."""
        return count_model(self._critic(self._config.dtype))

    def memory(self, setup: Setup) -> ShardMemory:
        """What a shard holds."""
        options = setup.options
        assert options.token_budget != "auto", "a plan has a token budget"
        activations = self._activations(setup.dtype, options.token_budget, options.gradient_checkpointing)
        return shard_memory(self.count, self._options(setup.dtype), options, setup.world_size, activations)

    def fits(self, setup: Setup) -> bool:
        """Whether the GPU holds it."""
        return self.memory(setup).peak <= USABLE * GPUS[self._config.gpu].memory

    def smallest_stage(self, setup: Setup) -> int | None:
        """The lowest ZeRO stage that fits with everything else as it is; lower stages communicate less."""
        for stage in range(4):
            if (setup.options.offload_optimizer and stage == 0) or (setup.options.offload_parameters and stage < 3):
                continue
            if self.fits(setup.changed(zero_stage=stage)):
                return stage
        return None

    def way_out(self, setup: Setup) -> Setup | None:
        """The first setup that fits on the way from this one to the most sparing; None if not even that does."""
        for sparing in _more_and_more_sparing(setup):
            stage = self.smallest_stage(sparing)
            if stage is not None:
                # What was asked for is not made less, unless it takes more: with one rank a higher stage does.
                asked = sparing.changed(zero_stage=max(stage, setup.options.zero_stage))
                return asked if self.fits(asked) else sparing.changed(zero_stage=stage)
        return None

    def enough_ranks(self, setup: Setup) -> int | None:
        """The first of twice, four times ... as many ranks that fit at ZeRO-3 with gradient checkpointing."""
        sparing = setup.changed(zero_stage=3, gradient_checkpointing=True)
        ranks = (setup.world_size * 2**power for power in range(1, MOST_RANKS.bit_length()))
        return next((n for n in ranks if n <= MOST_RANKS and self.fits(replace(sparing, world_size=n))), None)

    def step_seconds(self, setup: Setup) -> float:
        """Time of a step, if the work divides evenly; see `PlanJobConfig.tokens_per_second` and ``utilisation``."""
        config = self._config
        if config.tokens_per_second is not None:
            return config.tokens_per_step / (config.tokens_per_second * setup.world_size)
        operations = config.tokens_per_step * self.operations_per_token
        return operations / (config.utilisation * GPUS[config.gpu].peak[setup.dtype] * setup.world_size)

    @cached_property
    def operations_per_token(self) -> float:
        """Floating-point operations of a token, forward and backward.

        Six for each parameter that is multiplied, and causal attention over ``max_length`` tokens: half of what
        Chowdhery et al., "PaLM" (2022), appendix B, counts. Frozen weights take four: they have no gradient.
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


def _more_and_more_sparing(setup: Setup) -> Iterator[Setup]:
    """Each with one change more; what costs least time comes first."""
    if not setup.options.offload_parameters:
        setup = setup.changed(zero_stage=3)
    yield setup
    yield (setup := setup.changed(gradient_checkpointing=True))
    if setup.dtype == "float32":
        yield (setup := replace(setup, dtype="bfloat16"))
    budget = setup.options.token_budget
    if budget != "auto" and budget > LEAST_TOKENS:
        yield (setup := setup.changed(token_budget=LEAST_TOKENS))
    yield (setup := setup.changed(offload_optimizer=True))
    yield setup.changed(offload_parameters=True)


def main() -> None:
    """Calculates and prints."""
    config = parse_command_line(PlanJobConfig, prog=command("plan"))
    warnings.simplefilter("ignore", FutureWarning)  # transformers renames what switches checkpointing on
    if config.table:
        print(markdown_table(config))
        return
    groups = node_groups(config.cluster) if config.cluster else []
    plan = Plan.of(config, groups)
    if config.json_output:
        print(json.dumps(plan.to_dict()))
    else:
        Console().print(plan.to_table())


@dataclass(frozen=True)
class Plan:
    """What is printed of a plan.

    Attributes:
        config: What was asked.
        planner: Which calculated.
        memory: Of a shard.
        groups: The groups of the cluster that have GPUs.
    """

    config: PlanJobConfig
    planner: Planner
    memory: ShardMemory
    groups: list[NodeGroup]

    @classmethod
    def of(cls, config: PlanJobConfig, groups: list[NodeGroup]) -> Plan:
        """Calculates it.

        Raises:
            CheckpointError: See `Planner`.
        """
        planner = Planner(config)
        return cls(config, planner, planner.memory(config.setup), groups)

    @property
    def fits(self) -> bool:
        """Whether the GPU holds a shard."""
        return self.planner.fits(self.config.setup)

    def way_out(self) -> list[str]:
        """What makes it fit, in words; empty if it fits."""
        if self.fits:
            return []
        setup, ways = self.config.setup, []
        found, ranks = self.planner.way_out(setup), self.planner.enough_ranks(setup)
        if found is not None:
            ways.append(f"{_flags(setup, found)} ({_gb(self.planner.memory(found).peak)})")
        if ranks is not None:
            ways.append(f"--world-size {ranks} --zero-stage 3 --gradient-checkpointing")
        return ways or ["nothing here does: use a GPU with more memory, or a smaller model"]

    def to_dict(self) -> dict[str, Any]:
        """Bytes, seconds, counts."""
        return {
            "parameters": self.planner.count.parameters,
            "trained_parameters": sum(self.planner.count.trained),
            "memory": {**asdict(self.memory), "peak": self.memory.peak},
            "gpu": {"name": self.config.gpu, "memory": GPUS[self.config.gpu].memory, "usable": USABLE},
            "fits": self.fits,
            "smallest_zero_stage_that_fits": self.planner.smallest_stage(self.config.setup),
            "way_out": self.way_out(),
            "nodes": {group.name: group.nodes(self.config.world_size) for group in self.groups},
            "step_seconds": self.planner.step_seconds(self.config.setup),
            "step_seconds_are": "assumed" if self.config.tokens_per_second is None else "measured",
        }

    def to_table(self) -> Table:
        """For the terminal."""
        config, count, gpu = self.config, self.planner.count, GPUS[self.config.gpu]
        table = Table(title=f"plan of {config.model}, calculated: nothing was started", title_justify="left")
        table.add_column("what")
        table.add_column("how much", overflow="fold")
        trained = "" if not count.frozen else f", of which {sum(count.trained):,} are trained"
        table.add_row("parameters of the critic", f"{count.parameters:,}{trained}")
        table.add_row("shards", f"{config.world_size}, ZeRO-{config.zero_stage}, {config.dtype}")
        table.add_section()
        for part, words in PARTS.items():
            if getattr(self.memory, part):
                table.add_row(words, _gb(getattr(self.memory, part)))
        table.add_row("at most at any time", _gb(self.memory.peak))
        if self.memory.host:
            table.add_row("in the memory of the CPUs, for each shard", _gb(self.memory.host))
        table.add_section()
        usable = f"{_gb(USABLE * gpu.memory)}, {USABLE:.0%} of {gpu.name}"
        table.add_row("fits", f"{'yes' if self.fits else 'NO'}: there are {usable}")
        stage = self.planner.smallest_stage(config.setup)
        table.add_row("lowest ZeRO stage that fits", "none" if stage is None else str(stage))
        for way in self.way_out():
            table.add_row("fits with", way)
        table.add_section()
        for group in self.groups:
            nodes = group.nodes(config.world_size)
            short = f", but max_workers allows {group.most}" if nodes > group.most else ""
            table.add_row(f"nodes of {group.name} ({group.gpus} {config.gpu} each)", f"{nodes}{short}")
        source = (
            f"assumed: {config.utilisation:.0%} of the peak of {gpu.name}"
            if config.tokens_per_second is None
            else f"from the measured {config.tokens_per_second:,.0f} tokens per second of one GPU"
        )
        seconds = self.planner.step_seconds(config.setup)
        table.add_row(f"time of a step of {config.tokens_per_step:,} tokens", f"{seconds:.3g} s ({source})")
        return table


def markdown_table(config: PlanJobConfig) -> str:
    """For all known sizes and some numbers of GPUs, the lowest stage that fits and the memory it takes."""
    gpu = GPUS[config.gpu]
    ranks = " | ".join(f"{n:,} GPU{'s' * (n > 1)}" for n in TABLE_WORLD_SIZES)
    lines = [
        f"Calculated, not measured: the lowest ZeRO stage at which a shard fits an {gpu.name}, of which {USABLE:.0%}",
        f"is used, and the memory that it takes. {config.dtype}, gradient checkpointing, micro-batches of",
        f'{config.token_budget:,} tokens in sequences of up to {config.max_length:,}. "offload" keeps parameters and',
        "optimizer state in the memory of the CPUs, of which it takes the second number for each GPU.",
        "",
        f"| model | parameters of the critic | {ranks} |",
        "|---|---|" + "---|" * len(TABLE_WORLD_SIZES),
    ]
    for size in SHAPES:
        planner = Planner(config.model_copy(update={"model": size}))
        cells = [_cell(planner, replace(config.setup, world_size=ranks)) for ranks in TABLE_WORLD_SIZES]
        lines.append(f"| {size} | {planner.count.parameters / 1e9:.2f} billion | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(planner: Planner, setup: Setup) -> str:
    setup = setup.changed(gradient_checkpointing=True)
    stage = planner.smallest_stage(setup)
    if stage is not None:
        return f"ZeRO-{stage}, {_gb(planner.memory(setup.changed(zero_stage=stage)).peak)}"
    setup = setup.changed(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    if planner.fits(setup):
        memory = planner.memory(setup)
        return f"offload, {_gb(memory.peak)} and {_gb(memory.host)}"
    return "no"


def _flags(setup: Setup, found: Setup) -> str:
    """The options of this command that lead from one setup to the other."""
    before, after = ({**s.options.model_dump(), "dtype": s.dtype} for s in (setup, found))
    changed = [(name, value) for name, value in after.items() if value != before[name]]
    return " ".join(f"--{name.replace('_', '-')} {value}".removesuffix(" True") for name, value in changed)


def _gb(size: float) -> str:
    gigabytes = size / 1e9
    return f"{gigabytes:,.0f} GB" if gigabytes >= 100 else f"{gigabytes:.3g} GB"


if __name__ == "__main__":
    run_job(main)
