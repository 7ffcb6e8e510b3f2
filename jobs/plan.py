"""``rlhf-critic plan``: calculates the memory, nodes and time of a training run before hardware is rented.

Starts nothing and needs neither weights nor a GPU nor Ray.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from jobs.cli import command, run_job
from jobs.plan_catalog import GPUS, NodeGroup, model_config, node_groups
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.model import ShardingConfig
from rlhf_critic.config.tools import PlanJobConfig
from rlhf_critic.training.memory_planner import USABLE, Planner

PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "masters": "optimizer: fp32 copies of parameters",
    "moments": "optimizer: AdamW's moments",
    "buckets": "buffers to reduce gradients in",
    "gathered": "parameters that ZeRO-3 gathers",
    "activations": "activations",
}


def main() -> None:
    """Calculates and prints the plan."""
    config = parse_command_line(PlanJobConfig, prog=command("plan"))
    warnings.simplefilter("ignore", FutureWarning)  # transformers renames the switch of gradient checkpointing
    groups = node_groups(config.cluster) if config.cluster else []
    planner = planner_of(config)
    if config.json_output:
        print(json.dumps(plan_values(planner, groups)))
    else:
        Console().print(plan_table(planner, groups))


def planner_of(config: PlanJobConfig) -> Planner:
    """Makes the planner of a model and a GPU that are given by name.

    Raises:
        CheckpointError: The model has no config, or no critic can be made of it.
    """
    return Planner(config, model_config(config.model), GPUS[config.gpu])


def changes_that_fit(planner: Planner) -> list[str]:
    """Returns options that make the plan fit, as a user types them; empty if it fits already."""
    if planner.fits(planner.setup):
        return []
    ways = []
    if found := planner.fitting_setup():
        values = ((name, getattr(found, name)) for name in ("token_budget", *ShardingConfig.model_fields, "dtype"))
        changed = [(name, value) for name, value in values if value != getattr(planner.setup, name)]
        flags = (f"--{name.replace('_', '-')} {value}".removesuffix(" True") for name, value in changed)
        ways.append(f"{' '.join(flags)} ({_gb(planner.memory(found).peak)})")
    if ranks := planner.enough_ranks():
        ways.append(f"--world-size {ranks} --zero-stage 3 --gradient-checkpointing")
    return ways or ["no option; use a GPU with more memory, or a smaller model"]


def plan_values(planner: Planner, groups: list[NodeGroup]) -> dict[str, Any]:
    """Returns the plan in bytes, seconds and counts."""
    setup, count = planner.setup, planner.count
    memory = planner.memory(setup)
    return {
        "parameters": count.parameters,
        "trained_parameters": sum(count.trained),
        "memory": {**asdict(memory), "peak": memory.peak},
        "gpu": {"name": setup.gpu, "memory": planner.gpu.memory, "usable": USABLE},
        "fits": planner.fits(setup),
        "smallest_zero_stage_that_fits": planner.smallest_stage(setup),
        "recommended_zero_stage": planner.recommended_stage(setup),
        "way_out": changes_that_fit(planner),
        "nodes": {group.name: group.nodes(setup.world_size) for group in groups},
        "step_seconds": planner.step_seconds(),
        "step_seconds_are": "assumed" if setup.tokens_per_second is None else "measured",
    }


def plan_table(planner: Planner, groups: list[NodeGroup]) -> Table:
    """Returns the plan as a table for the terminal."""
    setup, count, gpu = planner.setup, planner.count, planner.gpu
    memory, stage = planner.memory(setup), planner.smallest_stage(setup)
    title = f"plan of {setup.model}, calculated without starting anything"
    table = Table("quantity", Column("value", overflow="fold"), title=title, title_justify="left")
    trained = f", of which {sum(count.trained):,} are trained" if count.frozen else ""
    table.add_row("parameters of the critic", f"{count.parameters:,}{trained}")
    table.add_row("shards", f"{setup.world_size}, ZeRO-{setup.zero_stage}, {setup.dtype}")
    table.add_section()
    for part, words in PARTS.items():
        if size := getattr(memory, part):
            table.add_row(words, _gb(size))
    table.add_row("peak memory of a shard", _gb(memory.peak))
    if memory.host:
        table.add_row("CPU memory per shard", _gb(memory.host))
    table.add_section()
    usable = f"{_gb(USABLE * gpu.memory)}, {USABLE:.0%} of {gpu.name}"
    table.add_row("fits", f"{'yes' if planner.fits(setup) else 'NO'}: usable are {usable}")
    table.add_row("lowest ZeRO stage that fits", "none" if stage is None else str(stage))
    if (recommended := planner.recommended_stage(setup)) == 1:
        table.add_row("recommended ZeRO stage", "1: it reduces gradients once a step")
    elif recommended is not None:
        table.add_row("recommended ZeRO stage", str(recommended))
    for way in changes_that_fit(planner):
        table.add_row("fits with", way)
    table.add_section()
    for group in groups:
        nodes = group.nodes(setup.world_size)
        short = f", but max_workers allows {group.max_nodes}" if nodes > group.max_nodes else ""
        table.add_row(f"nodes of {group.name} ({group.gpus} {setup.gpu} each)", f"{nodes}{short}")
    source = (
        f"assumed: {setup.utilisation:.0%} of the peak of {gpu.name}"
        if setup.tokens_per_second is None
        else f"from the measured {setup.tokens_per_second:,.0f} tokens per second of one GPU"
    )
    table.add_row(f"time of a step of {setup.tokens_per_step:,} tokens", f"{planner.step_seconds():.3g} s ({source})")
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size / 1e9 >= 100 else f"{size / 1e9:.3g} GB"


if __name__ == "__main__":
    run_job(main)
