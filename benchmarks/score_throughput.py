"""Scoring speed, side by side with plain transformers in padded batches sorted by length, at its best batch size.

    python -m benchmarks.score_throughput --profile tldr --n 8

Or on real responses: --file best_of_8.jsonl.gz (fields: prompt, responses) with --tokenizer of any chat model.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from benchmarks import harness
from benchmarks.harness import Specification, interleave, progress
from benchmarks.workloads import save_model

CONTENDERS = "benchmarks.score_contenders"
BATCH_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    profile: Literal["hh", "tldr", "chat"] = "hh"
    """Lengths of prompts and responses: dialogue, summarisation or long answers."""
    n: int = 8
    """Number of responses per prompt."""
    prompts: int = 0
    """Number of prompts; 0 means 192 sequences in all, or the first 24 prompts of a file."""
    file: str = ""
    """Score the responses of this .jsonl.gz file instead of random ones."""
    tokenizer: str = ".cache/quickstart/model"
    """Tokenizer directory for --file; the default is that of the quickstart."""
    layers: int = 4
    """Number of layers of the model; SmolLM2-135M has 30."""
    rounds: int = 5
    """Number of runs of each contender."""
    threads: int = 2
    """Number of threads per run."""
    token_budget: int = 4096
    """Maximum number of tokens that ours computes at once."""
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on the last line of standard output."""


def best_batch_size(common: Specification, threads: int) -> tuple[int, list[tuple[str, float]]]:
    """Returns the peer's fastest batch size, and the sequences per second of each."""
    reached = {}
    for batch_size in BATCH_SIZES:
        specification = {**common, "contender": "plain", "batch_size": batch_size}
        reached[batch_size] = harness.run(CONTENDERS, specification, threads)["sequences_per_second"]
        progress(f"sweep: batch size {batch_size}: {reached[batch_size]:.2f} sequences/s")
    return max(reached, key=reached.__getitem__), [(f"batch size {size}", rate) for size, rate in reached.items()]


def main(options: Options) -> None:
    """Finds the best setting of the peer, measures and prints."""
    prompts = options.prompts or (24 if options.file else 192 // options.n)
    title = options.file or f"{options.profile}, {options.n} responses a prompt"
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), options.layers)
        common = {
            "model": directory,
            "profile": options.profile,
            "n": options.n,
            "prompts": prompts,
            "file": options.file,
            "tokenizer": options.tokenizer,
            "token_budget": options.token_budget,
        }
        batch_size, sweep = best_batch_size(common, options.threads)
        contenders = {
            "ours": {**common, "contender": "ours"},
            "plain": {**common, "contender": "plain", "batch_size": batch_size},
        }
        rounds = interleave(CONTENDERS, contenders, options.rounds, options.threads)
    ratios = rounds.ratios("ours", "plain", "sequences_per_second")
    one, other = rounds.results["ours"][0], rounds.results["plain"][0]
    difference = float(np.abs(np.subtract(one["rewards"], other["rewards"])).max())
    shared = one["tokens"] / one["distinct_tokens"]
    harness.show("Plain transformers' settings", ("setting", "sequences/s"), sweep)
    harness.show(
        f"{title}, {options.layers} layers, {options.threads} threads: medians of {options.rounds} rounds",
        ("contender", "sequences/s", "peak memory, GB"),
        [
            (name, rounds.median(name, "sequences_per_second"), rounds.median(name, "peak_bytes") / 1e9)
            for name in ("ours", "plain")
        ],
    )
    harness.console.print(
        f"{statistics.median(ratios):.2f} times plain transformers at batch size {batch_size} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}); {shared:.2f} tokens for one distinct; largest difference of a reward {difference:.1e}"
    )
    if options.json_line:
        print(
            json.dumps(
                {
                    "ratio": statistics.median(ratios),
                    "ours": rounds.median("ours", "sequences_per_second"),
                    "peer": rounds.median("plain", "sequences_per_second"),
                    "spread": [min(ratios), max(ratios)],
                    "peer_setting": f"batch size {batch_size}, sorted by length",
                    "versions": harness.versions(),
                    "unit": "sequences/s",
                    "workload": title,
                    "layers": options.layers,
                    "tokens_per_distinct_token": shared,
                    "largest_difference": difference,
                }
            )
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
