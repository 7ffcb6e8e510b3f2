"""Training speed and memory, side by side with TRL's RewardTrainer at its best batch size.

    python -m benchmarks.train_throughput --profile hh

Both train the same model on the same pairs, 8 an optimizer step, with AdamW and clipping, in fp32. First TRL's setting
is chosen in one run of each batch size, with and without grouping by length; then both run in turns, one process each
(ours with ZeRO-0, the stage that shards nothing).
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import harness
from benchmarks.harness import Rounds, Specification, interleave, progress
from benchmarks.train_contenders import PAIRS_PER_STEP
from benchmarks.workloads import save_model

CONTENDERS = "benchmarks.train_contenders"
BATCH_SIZES = (1, 2, 4, 8)
SWEEP_STEPS = 4


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    profile: Literal["hh", "tldr", "chat"] = "hh"
    """Lengths of prompts and responses: dialogue, summarisation or long answers."""
    layers: int = 4
    """Number of layers of the model; SmolLM2-135M has 30."""
    rounds: int = 5
    """Number of runs of each contender."""
    steps: int = 6
    """Number of optimizer steps per run; the first two warm up."""
    threads: int = 2
    """Number of threads per run."""
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on the last line of standard output."""


def best_peer_setting(common: Specification, threads: int) -> tuple[Specification, list[tuple[str, float]]]:
    """Returns TRL's fastest setting, and the pairs per second of each."""
    reached: list[tuple[float, Specification]] = []
    for batch_size in BATCH_SIZES:
        for group_by_length in (False, True):
            setting = {"batch_size": batch_size, "group_by_length": group_by_length}
            result = harness.run(CONTENDERS, {**common, "contender": "trl", **setting}, threads)
            reached.append((result["pairs_per_second"], setting))
            progress(f"sweep: TRL {setting}: {result['pairs_per_second']:.2f} pairs/s")
    best = max(reached, key=lambda entry: entry[0])[1]
    return best, [(describe(setting), rate) for rate, setting in reached]


def describe(setting: Specification) -> str:
    """Formats a setting of the sweep."""
    return f"batch size {setting['batch_size']}" + (", grouped by length" if setting["group_by_length"] else "")


def utilisation(rounds: Rounds, parameters: int) -> float:
    """Computes 6 x parameters outside the embedding x tokens per second, over the matrix-product rate of that run."""
    shares = [
        6 * parameters * run["computed_tokens"] / sum(run["seconds"]) / run["matrix_product_rate"]
        for run in rounds.results["ours"]
    ]
    return statistics.median(shares)


def main(options: Options) -> None:
    """Finds the best setting of the peer, measures and prints."""
    with tempfile.TemporaryDirectory() as directory:
        parameters = save_model(Path(directory), options.layers)
        common = {"model": directory, "profile": options.profile, "pairs": PAIRS_PER_STEP * options.steps}
        in_sweep = {**common, "pairs": PAIRS_PER_STEP * SWEEP_STEPS}
        setting, sweep = best_peer_setting(in_sweep, options.threads)
        contenders = {"ours": {**common, "contender": "ours"}, "trl": {**common, "contender": "trl", **setting}}
        rounds = interleave(CONTENDERS, contenders, options.rounds, options.threads)
    ratios = rounds.ratios("ours", "trl", "pairs_per_second")
    memory = rounds.median("ours", "peak_bytes") / rounds.median("trl", "peak_bytes")
    used = utilisation(rounds, parameters)
    harness.show("TRL's settings", ("setting", "pairs/s"), sweep)
    harness.show(
        f"{options.profile}, {options.layers} layers, {options.threads} threads: medians of {options.rounds} rounds",
        ("contender", "pairs/s", "peak memory, GB"),
        [
            (name, rounds.median(name, "pairs_per_second"), rounds.median(name, "peak_bytes") / 1e9)
            for name in ("ours", "trl")
        ],
    )
    harness.console.print(
        f"{statistics.median(ratios):.2f} times TRL at {describe(setting)} ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{memory:.2f} of its memory; effective utilisation {used:.2f} of the matrix-product rate"
    )
    if options.json_line:
        print(
            json.dumps(
                {
                    "ratio": statistics.median(ratios),
                    "ours": rounds.median("ours", "pairs_per_second"),
                    "peer": rounds.median("trl", "pairs_per_second"),
                    "spread": [min(ratios), max(ratios)],
                    "peer_setting": describe(setting),
                    "versions": harness.versions(),
                    "unit": "pairs/s",
                    "profile": options.profile,
                    "layers": options.layers,
                    "effective_utilisation": used,
                    "memory_ratio": memory,
                }
            )
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
