"""Scoring with a prefix cache across calls, against the same scorer without one, in alternating rounds of one process.

    python -m benchmarks.prefix_cache --profile tldr

Threads call a `RequestBatcher`, as a scorer's callers do, with one sequence a call. There are three workloads: the
responses to some prompts in random order, conversations that are scored after each turn, and sequences that share
nothing. A round begins with an empty cache.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from benchmarks import harness
from benchmarks.harness import progress
from benchmarks.workloads import (
    FIRST_ORDINARY_ID,
    PROFILES,
    VOCABULARY,
    IntArray,
    draw_prompts,
    head_weight,
    save_model,
)
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.model.caching_critic import CachingCritic
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.scoring.request_batcher import Computed, RequestBatcher

CPU = torch.device("cpu")
TIMEOUT_S = 600
Jobs = list[list[IntArray]]  # each job is a list of sequences that one caller sends one after the other


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    profile: Literal["hh", "tldr", "chat"] = "tldr"
    """Lengths of prompts and responses: dialogue, summarisation or long answers."""
    n: int = 8
    """Number of responses per prompt."""
    prompts: int = 32
    """Number of prompts."""
    conversations: int = 12
    """Number of conversations."""
    turns: int = 8
    """Number of turns of a conversation, each a message and an answer of the profile's response length."""
    callers: int = 4
    """Number of callers, each with one sequence at a time."""
    layers: int = 4
    """Number of layers of the model; SmolLM2-135M has 30."""
    rounds: int = 3
    """Number of rounds of each workload with and without the cache."""
    threads: int = 2
    """Number of threads that compute."""
    token_budget: int = 4096
    """Maximum number of tokens computed at once."""
    prefix_cache_bytes: int = 2**30
    """Size of the cache."""
    workloads: tuple[Literal["responses", "turns", "alone"], ...] = ("responses", "turns", "alone")
    """Workloads to measure."""
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on the last line of standard output."""


def responses(options: Options) -> Jobs:
    """Draws the responses of all prompts, in random order."""
    drawn = draw_prompts(PROFILES[options.profile], options.prompts, options.n)
    flat = [response for of_prompt in drawn for response in of_prompt]
    return [[flat[index]] for index in np.random.default_rng(0).permutation(len(flat))]


def turns(options: Options) -> Jobs:
    """Draws conversations: a prompt with an answer, then further messages and answers; each turn has all before it."""
    profile, rng = PROFILES[options.profile], np.random.default_rng(1)
    jobs = []
    for ((first,),) in zip(draw_prompts(profile, options.conversations, 1), strict=True):
        job = [first]
        for _ in range(options.turns - 1):
            more = rng.integers(FIRST_ORDINARY_ID, VOCABULARY, profile.response.draw(rng) + profile.response.draw(rng))
            job.append(np.concatenate([job[-1], more]))
        jobs.append(job)
    return jobs


def alone(options: Options) -> Jobs:
    """Draws sequences of which no two share a prompt."""
    return [[response] for (response,) in draw_prompts(PROFILES[options.profile], 2 * options.prompts, 1, seed=2)]


WORKLOADS: dict[str, Callable[[Options], Jobs]] = {"responses": responses, "turns": turns, "alone": alone}


def measure(critic: Critic, jobs: Jobs, options: Options, cached: bool) -> tuple[float, list[float]]:
    """Scores all jobs; returns sequences per second and the rewards."""
    caching = CachingCritic(critic, CPU) if cached else None

    @torch.no_grad()
    def forward(sequences: Sequence[TokenIds], rewards_only: bool) -> Computed:
        if caching:
            output, _, tokens = caching.forward(sequences, rewards_only)
        else:
            batch = critic.batch_of(sequences)
            output, tokens = critic(batch, rewards_only=rewards_only), batch.computed_tokens
        return Computed(list(output.numpy()[:, None]), tokens)

    known_lengths = caching.known_lengths if caching else None
    batcher = RequestBatcher(forward, options.token_budget, True, known_lengths=known_lengths)

    def call(job: list[IntArray]) -> list[float]:
        return [float(batcher.submit([ids], True).result(TIMEOUT_S)[0][0]) for ids in job]

    started = time.perf_counter()
    with ThreadPoolExecutor(options.callers) as callers:
        rewards = [reward for of_job in callers.map(call, jobs) for reward in of_job]
    seconds = time.perf_counter() - started
    batcher.close(TIMEOUT_S)
    return len(rewards) / seconds, rewards


def main(options: Options) -> None:
    """Measures every workload and prints the ratios."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), options.layers)
        critic = create_critic_model(directory, load_tokenizer(directory), None).eval()
    with torch.no_grad():
        critic.model.score.weight.copy_(head_weight())
    critic.create_store(options.prefix_cache_bytes, CPU)
    rows, result = [], {}
    for name in options.workloads:
        jobs = WORKLOADS[name](options)
        measure(critic, jobs[:4], options, True)  # warms up
        rates: dict[bool, list[float]] = {True: [], False: []}
        rewards = {}
        for number in range(options.rounds):
            for cached in (True, False) if number % 2 else (False, True):
                rate, rewards[cached] = measure(critic, jobs, options, cached)
                rates[cached].append(rate)
                progress(f"{name}, round {number + 1} of {options.rounds}: {rate:.1f} sequences/s, cache {cached}")
        ratios = [on / off for on, off in zip(rates[True], rates[False], strict=True)]
        difference = float(np.abs(np.subtract(rewards[True], rewards[False])).max())
        on, off = (statistics.median(rates[cached]) for cached in (True, False))
        rows.append((name, on, off, statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}", difference))
        result[name] = {
            "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "cache_on": on,
            "cache_off": off,
            "largest_difference": difference,
        }
    title = f"{options.profile}, {options.layers} layers, {options.callers} callers: medians of {options.rounds} rounds"
    columns = ("workload", "sequences/s, cache on", "cache off", "ratio", "spread", "largest difference")
    harness.show(title, columns, rows)
    if options.json_line:
        first = result[options.workloads[0]]["ratio"]
        print(json.dumps({"ratio": first, "unit": "sequences/s", "workloads": result, "versions": harness.versions()}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
