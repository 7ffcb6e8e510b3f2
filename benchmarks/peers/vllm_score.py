"""Scoring speed, side by side with vLLM on a CPU, which gets all sequences at once as token ids.

    python -m tests.peers.install vllm
    python -m benchmarks.peers.vllm_score --profile tldr

vLLM runs with its prefix cache and without, and the ratio is to the faster of both. vLLM is made for GPUs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from transformers import AutoModelForSequenceClassification

from benchmarks import harness
from benchmarks.harness import Result, progress
from benchmarks.score_contenders import sequences_of
from benchmarks.workloads import head_weight, save_model
from tests.peers.install import python_of

RUNNER = Path(__file__).with_name("vllm_runner.py")
TIMEOUT_S = 1200


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    profile: Literal["hh", "tldr", "chat"] = "tldr"
    """Lengths of prompts and responses: dialogue, summarisation or long answers."""
    n: int = 8
    """Number of responses per prompt."""
    sequences: int = 192
    """Number of sequences in all."""
    layers: int = 4
    """Number of layers of the model; SmolLM2-135M has 30."""
    rounds: int = 3
    """Number of runs of each contender."""
    threads: int = 2
    """Number of threads per run."""
    token_budget: int = 4096
    """Maximum number of tokens that ours computes at once."""
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on the last line of standard output."""


def run_vllm(python: Path, folder: Path, sequences: list[list[int]], threads: int, prefix_caching: bool) -> Result:
    """Runs vLLM once in its environment.

    Raises:
        RuntimeError: The process failed. Contains the end of its output.
    """
    asked, answered = folder / "request.json", folder / "answer.json"
    longest = max(map(len, sequences)) + 1
    request = {"model": str(folder), "sequences": sequences, "max_length": longest, "prefix_caching": prefix_caching}
    asked.write_text(json.dumps(request), encoding="utf-8")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [python, RUNNER, asked, answered],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: Result = json.loads(answered.read_text(encoding="utf-8"))
    return {**result, "sequences_per_second": len(sequences) / result["seconds"]}


def save_reward_model(folder: Path) -> None:
    """Turns the saved language model into a reward model whose raw score vLLM gives."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(head_weight())
    model.config.problem_type = "regression"
    model.save_pretrained(folder)


def main(options: Options) -> None:
    """Measures both and prints the ratio."""
    python = python_of("vllm")
    if python is None:
        sys.exit("vLLM is not installed: python -m tests.peers.install vllm")
    common = {
        "contender": "ours",
        "profile": options.profile,
        "n": options.n,
        "prompts": options.sequences // options.n,
        "file": "",
        "token_budget": options.token_budget,
    }
    results: dict[str, list[Result]] = {"ours": [], "vLLM, cache on": [], "vLLM, cache off": []}
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        for folder in (ours, theirs):
            save_model(Path(folder), options.layers)
        save_reward_model(Path(theirs))
        sequences = sequences_of(common)
        for number in range(options.rounds):
            for name in list(results)[:: 1 if number % 2 == 0 else -1]:
                if name == "ours":
                    specification = {**common, "model": ours}
                    result = harness.run("benchmarks.score_contenders", specification, options.threads)
                else:
                    result = run_vllm(python, Path(theirs), sequences, options.threads, name.endswith("on"))
                results[name].append(result)
                progress(f"round {number + 1} of {options.rounds}: {name}: {result['sequences_per_second']:.1f}")
    medians = {name: statistics.median(one["sequences_per_second"] for one in results[name]) for name in results}
    best = max(list(results)[1:], key=medians.__getitem__)
    pairs = zip(results["ours"], results[best], strict=True)
    ratios = [one["sequences_per_second"] / other["sequences_per_second"] for one, other in pairs]
    difference = float(np.abs(np.subtract(results["ours"][0]["rewards"], results[best][0]["rewards"])).max())
    harness.show(
        f"{options.profile}, {options.n} responses a prompt, {options.layers} layers, {options.threads} threads",
        ("contender", "sequences/s"),
        list(medians.items()),
    )
    harness.console.print(
        f"{statistics.median(ratios):.2f} times {best} ({min(ratios):.2f} to {max(ratios):.2f}); largest difference of "
        f"a reward {difference:.1e}"
    )
    if options.json_line:
        found = {"ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)], "peer_setting": best}
        found |= {"sequences_per_second": medians, "largest_difference": difference, "unit": "sequences/s"}
        print(json.dumps({**found, "versions": harness.versions()}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
