"""One shard against two, ZeRO 0 to 3, one thread each: pairs per second, and the state of a shard.

python -m benchmarks.scaling
"""

from __future__ import annotations

import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import harness
from benchmarks.harness import Result, Specification, progress
from benchmarks.workloads import save_model

CONTENDER = "benchmarks.scaling_contender"
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    profile: Literal["hh", "tldr", "chat"] = "hh"
    """Lengths of prompts and responses: dialogue, summarisation or long answers."""
    layers: int = 4
    """Number of layers of the model; SmolLM2-135M has 30."""
    pairs_per_step: int = 48
    """Number of preferences per optimizer step, over all shards."""
    rounds: int = 2
    """Number of runs of each stage and number of shards."""
    steps: int = 3
    """Number of optimizer steps per run; the first warms up."""
    token_budget: int = 16384
    """Maximum number of tokens per micro-batch."""
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on the last line of standard output."""


def run_shards(common: Specification, world_size: int) -> Result:
    """Runs all ranks; returns the pairs per second of the slowest and the bytes of the largest."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(world_size) as pool:
        ranks = [
            {**common, "rank": rank, "world_size": world_size, "store": f"{directory}/store"}
            for rank in range(world_size)
        ]
        results = list(pool.map(lambda specification: harness.run(CONTENDER, specification, threads=1), ranks))
    return {
        "pairs_per_second": min(result["pairs_per_second"] for result in results),
        "state_bytes": max(result["state_bytes"] for result in results),
        "computed_tokens": results[0]["computed_tokens"],
    }


def main(options: Options) -> None:
    """Measures and prints."""
    of_stage: dict[int, list[tuple[Result, Result]]] = {stage: [] for stage in STAGES}
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), options.layers)
        common = {
            "model": directory,
            "profile": options.profile,
            "pairs": options.pairs_per_step * options.steps,
            "pairs_per_step": options.pairs_per_step,
            "token_budget": options.token_budget,
        }
        for number in range(options.rounds):
            for stage in STAGES:
                one, two = (run_shards({**common, "zero_stage": stage}, world_size) for world_size in (1, 2))
                of_stage[stage].append((one, two))
                progress(
                    f"round {number + 1} of {options.rounds}, stage {stage}: {one['pairs_per_second']:.2f} and "
                    f"{two['pairs_per_second']:.2f} pairs/s"
                )
    summary = {}
    for stage, rounds in of_stage.items():
        ratios = [two["pairs_per_second"] / one["pairs_per_second"] for one, two in rounds]
        one, two = rounds[0]
        summary[stage] = {
            "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "one_shard": statistics.median(one["pairs_per_second"] for one, _ in rounds),
            "two_shards": statistics.median(two["pairs_per_second"] for _, two in rounds),
            "state_bytes": two["state_bytes"],
            "state_share": two["state_bytes"] / one["state_bytes"],
        }
    harness.show(
        f"{options.profile}, {options.layers} layers, {options.pairs_per_step} pairs a step, one thread a shard",
        ("ZeRO stage", "1 shard, pairs/s", "2 shards, pairs/s", "ratio", "state of a shard, GB", "of one shard alone"),
        [
            (
                stage,
                found["one_shard"],
                found["two_shards"],
                f"{found['ratio']:.2f} ({found['spread'][0]:.2f} to {found['spread'][1]:.2f})",
                found["state_bytes"] / 1e9,
                found["state_share"],
            )
            for stage, found in summary.items()
        ],
    )
    if options.json_line:
        lowest = min((summary[stage] for stage in (1, 2)), key=lambda found: found["ratio"])
        print(
            json.dumps(
                {
                    "ratio": lowest["ratio"],
                    "ours": lowest["two_shards"],
                    "peer": lowest["one_shard"],
                    "spread": lowest["spread"],
                    "peer_setting": "one shard, same ZeRO stage",
                    "versions": harness.versions(),
                    "unit": "pairs/s",
                    "pairs_per_step": options.pairs_per_step,
                    "zero3_state_share": summary[3]["state_share"],
                    "stages": summary,
                }
            )
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
