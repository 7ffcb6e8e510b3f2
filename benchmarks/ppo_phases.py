"""The phases of a PPO iteration, and the gain of shared prompts in two of them: values and the critic's update.

    python -m benchmarks.ppo_phases --profile tldr --n 8

The peer is the same engine over padded batches sorted by length, at its best token budget.
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

CONTENDERS = "benchmarks.ppo_contenders"
PADDED_BUDGETS = (1024, 2048, 4096, 8192)
PHASES = ("generate", "score", "values", "update critic", "update policy")


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    profile: Literal["hh", "tldr"] = "tldr"
    """Lengths of prompts and responses: dialogue or summarisation."""
    n: Literal[1, 8] = 8
    """Number of rollouts per prompt."""
    prompts: int = 0
    """Number of prompts; 0 means 64 rollouts in all."""
    layers: int = 4
    """Number of layers of both models; SmolLM2-135M has 30."""
    rounds: int = 3
    """Number of runs of each contender."""
    threads: int = 2
    """Number of threads per run."""
    token_budget: int = 4096
    """Maximum number of tokens that ours computes at once."""
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on the last line of standard output."""


def best_padded_budget(common: Specification, threads: int) -> int:
    """Returns the token budget with the shortest time of padded values and updates."""
    reached = {}
    for budget in PADDED_BUDGETS:
        specification = {**common, "prefix_tree": False, "token_budget": budget, "all_phases": False}
        reached[budget] = harness.run(CONTENDERS, specification, threads)["fit_seconds"]
        progress(f"sweep: padded batches of {budget} tokens: {reached[budget]:.1f} s")
    return min(reached, key=reached.__getitem__)


def main(options: Options) -> None:
    """Finds the best setting of the peer, measures and prints."""
    prompts = options.prompts or 64 // options.n
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), options.layers)
        common = {"model": directory, "profile": options.profile, "n": options.n, "prompts": prompts}
        budget = best_padded_budget(common, options.threads)
        rounds = interleave(
            CONTENDERS,
            {
                "ours": {
                    **common,
                    "prefix_tree": True,
                    "token_budget": options.token_budget,
                    "all_phases": True,
                },
                "padded": {**common, "prefix_tree": False, "token_budget": budget, "all_phases": True},
            },
            options.rounds,
            options.threads,
        )
    ratios = rounds.ratios("padded", "ours", "fit_seconds")
    seconds = {
        name: {
            phase: statistics.median(result["seconds"][phase] for result in rounds.results[name]) for phase in PHASES
        }
        for name in ("ours", "padded")
    }
    of_phase = {
        phase: statistics.median(
            theirs["seconds"][phase] / mine["seconds"][phase]
            for theirs, mine in zip(rounds.results["padded"], rounds.results["ours"], strict=True)
        )
        for phase in PHASES
    }
    one, other = rounds.results["ours"][0], rounds.results["padded"][0]
    difference = float(np.abs(np.subtract(one["values"], other["values"])).max())
    title = f"{options.profile}, {prompts} prompts with {options.n} rollouts each, {options.layers} layers"
    harness.show(
        f"{title}: medians of {options.rounds} rounds",
        ("phase", "ours, s", "padded, s", "ratio"),
        [(phase, seconds["ours"][phase], seconds["padded"][phase], of_phase[phase]) for phase in PHASES],
    )
    harness.console.print(
        f"values and critic update: {statistics.median(ratios):.2f} times as fast as padded ({min(ratios):.2f} to "
        f"{max(ratios):.2f}); {one['tokens']} tokens served, {one['computed_tokens']} computed for values (padded "
        f"{other['computed_tokens']}); largest difference of a value {difference:.1e}, losses {one['loss']:.7f} and "
        f"{other['loss']:.7f}"
    )
    if options.json_line:
        print(
            json.dumps(
                {
                    "ratio": statistics.median(ratios),
                    "ours": rounds.median("ours", "fit_seconds"),
                    "peer": rounds.median("padded", "fit_seconds"),
                    "spread": [min(ratios), max(ratios)],
                    "peer_setting": f"token budget {budget}, sorted by length",
                    "versions": harness.versions(),
                    "unit": "seconds of values and critic update",
                    "workload": title,
                    "seconds": seconds,
                    "ratio_of_phases": of_phase,
                    "tokens": one["tokens"],
                    "computed_tokens": one["computed_tokens"],
                    "largest_difference": difference,
                    "losses": [one["loss"], other["loss"]],
                }
            )
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
