"""Serving speed: a pool under load, against the engine called directly and a server that computes each request alone.

    python -m benchmarks.serve_load --json

Every caller sends 16 sequences, waits for their rewards and sends the next, as PPO workers do. Both servers are asked
over HTTP by the same client, with texts; the pool also through its Ray handle, as workers in the cluster ask it.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import ray
import torch
import tyro

from actors.serving import control
from actors.serving.handle import connect
from benchmarks import harness
from benchmarks.harness import progress
from benchmarks.workloads import PROFILES, draw_prompts, head_weight, save_model, text_of
from jobs.serve import run_pool
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard, save_critic
from rlhf_critic.config.serve import ServeJobConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.scoring.items import Item, Text

CONTENDERS = "benchmarks.serve_contenders"
SEQUENCES_A_CALL = 16
CALLS_OF_A_CALLER = 3  # minimum; few callers make more
CALLS_OF_REFERENCE = 8  # more than the number of callers; the reference is slow
FEWEST_CALLS = 8
START_TIMEOUT_S = 120
CALL_TIMEOUT_S = 600

Ask = Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    profiles: tuple[str, ...] = ("hh", "tldr")
    """Lengths of prompts and responses: dialogue, summarisation (see benchmarks/workloads.py)."""
    n: int = 8
    """Number of responses per prompt."""
    callers: tuple[int, ...] = (1, 8, 32)
    """Numbers of concurrent callers; the largest saturates the pool."""
    layers: int = 4
    """Number of layers of the model; SmolLM2-135M has 30."""
    rounds: int = 3
    """Number of runs of each contender."""
    threads: int = 2
    """Number of threads of the replica and of its peers."""
    replicas: bool = True
    """Also compare two replicas of one thread each with one."""
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on the last line of standard output."""


@dataclass(frozen=True)
class Load:
    """Measurements of callers.

    Attributes:
        rate: Sequences a second, over all callers, while every caller had a call to make.
        p50: Median seconds of a call.
        p99: Its 99th percentile.
        rewards: In the order of the sequences.
    """

    rate: float
    p50: float
    p99: float
    rewards: list[float]


def save_workload_critic(directory: Path, layers: int) -> str:
    """Writes the benchmark model with the common head as a critic directory."""
    save_model(directory / "model", layers)
    encoder = Encoder(load_tokenizer(str(directory / "model")), max_length=1024)
    critic = create_critic_model(str(directory / "model"), encoder.tokenizer, None)
    with torch.no_grad():
        critic.model.score.weight.copy_(head_weight())
    card = CriticCard(version="workload", encoder=EncoderCard(fingerprint=encoder.fingerprint, max_length=1024))
    save_critic(directory / "critic", critic, encoder, card)
    return str(directory / "critic")


def texts_of(profile: str, prompts: int, n: int) -> list[str]:
    """Returns the sequences, with the responses of a prompt next to each other, as in a rollout worker."""
    drawn = draw_prompts(PROFILES[profile], prompts, n)
    return [text_of(sequence) for responses in drawn for sequence in responses]


def put_under_load(ask: Ask, texts: list[str], callers: int) -> Load:
    """Scores all texts with callers that take the next 16 texts after each answer.

    The rate covers the time until the first caller finds no text left. After that the server runs empty, which would
    dominate the measurement with few calls per caller.
    """
    calls = [texts[start : start + SEQUENCES_A_CALL] for start in range(0, len(texts), SEQUENCES_A_CALL)]
    rewards: dict[int, Any] = {}
    times: list[tuple[float, float]] = []  # start and end of each call
    found_none: list[float] = []
    numbers = iter(range(len(calls)))
    taking = threading.Lock()

    def call_on() -> None:
        while True:
            with taking:
                number = next(numbers, None)
            made = time.perf_counter()
            if number is None:
                found_none.append(made)
                return
            rewards[number] = ask(calls[number])
            times.append((made, time.perf_counter()))

    threads = [threading.Thread(target=call_on) for _ in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(rewards) < len(calls):
        raise RuntimeError(f"{len(calls) - len(rewards)} of {len(calls)} calls failed")
    saturated_until = min(found_none)
    answered = sum(SEQUENCES_A_CALL for _, at in times if at <= saturated_until)
    p50, p99 = np.percentile([answered_at - made for made, answered_at in times], [50, 99])
    return Load(
        answered / (saturated_until - started),
        float(p50),
        float(p99),
        [float(r) for number in range(len(calls)) for r in rewards[number]],
    )


@contextmanager
def reference_server(critic: str, threads: int) -> Iterator[str]:
    """Runs the FastAPI server until the block ends."""
    port = free_port()
    specification = {"contender": "reference", "critic": critic, "port": port}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", CONTENDERS, json.dumps(specification)], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the reference server did not start within {START_TIMEOUT_S} s")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """Returns a port that is free now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask_over_http(url: str) -> Ask:
    """Calls ``/get_reward``, which both servers have, without OpenRLHF's client."""
    client = httpx.Client(timeout=CALL_TIMEOUT_S, limits=httpx.Limits(max_connections=None))

    def ask(texts: Sequence[str]) -> Any:
        answer = client.post(f"{url}/get_reward", json={"query": list(texts)})
        answer.raise_for_status()
        return answer.json()["rewards"]

    return ask


def main(options: Options) -> None:
    """Measures the contenders in turn and prints."""
    os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", DS_ACCELERATOR="cpu")
    most = max(options.callers)
    results: dict[tuple[str, ...], list[Load]] = {}
    direct_rates: dict[str, list[float]] = {profile: [] for profile in options.profiles}
    differences: list[float] = []

    def record(key: tuple[str, ...], load: Load) -> Load:
        results.setdefault(key, []).append(load)
        progress(f"{' '.join(key)}: {load.rate:.1f} sequences/s, p50 {load.p50:.2f} s, p99 {load.p99:.2f} s")
        return load

    with tempfile.TemporaryDirectory() as directory:
        critic = save_workload_critic(Path(directory), options.layers)
        ray.init(
            "local", num_cpus=2 * options.threads, include_dashboard=False, logging_level="ERROR", log_to_driver=False
        )
        port = free_port()

        def run_replicas(replicas: int, threads: int) -> str:
            config = ServeJobConfig(
                checkpoint=critic,
                port=port,
                min_replicas=replicas,
                max_replicas=replicas,
                cpus_per_shard=threads,
                deadline_s=CALL_TIMEOUT_S,
                prefix_cache_bytes=0,  # every way sends the same texts; benchmarks.prefix_cache measures the cache
            )
            url, _, _ = run_pool(config, lambda _: None)
            return url

        def calls_for(callers: int) -> int:
            return max(FEWEST_CALLS, CALLS_OF_A_CALLER * callers)

        with reference_server(critic, options.threads) as reference_url, connect(max_in_flight=2 * most) as client:
            by_http_there = ask_over_http(reference_url)

            def by_handle(texts: Sequence[str]) -> Any:
                items: list[Item] = [Text(text) for text in texts]
                return client.score_items(items, deadline_s=CALL_TIMEOUT_S).rewards_S

            for number in range(options.rounds):
                progress(f"round {number + 1} of {options.rounds}")
                by_http_here = ask_over_http(run_replicas(1, options.threads))
                for profile in options.profiles:
                    prompts = calls_for(most) * SEQUENCES_A_CALL // options.n
                    texts = texts_of(profile, prompts, options.n)
                    by_handle(texts[:SEQUENCES_A_CALL])
                    specification = {
                        "contender": "direct",
                        "critic": critic,
                        "profile": profile,
                        "prompts": prompts,
                        "n": options.n,
                        "token_budget": 4096,
                    }
                    direct = harness.run(CONTENDERS, specification, options.threads)
                    direct_rates[profile].append(direct["sequences_per_second"])
                    progress(f"{profile} direct: {direct['sequences_per_second']:.1f} sequences/s")
                    for callers in options.callers:
                        some = texts[: calls_for(callers) * SEQUENCES_A_CALL]
                        load = record((profile, "handle", str(callers)), put_under_load(by_handle, some, callers))
                        differences.append(
                            float(np.abs(np.subtract(load.rewards, direct["rewards"][: len(load.rewards)])).max())
                        )
                    record((profile, "http", str(most)), put_under_load(by_http_here, texts, most))
                    # It computes one request after the other, always at the same rate.
                    some = texts[: (most + CALLS_OF_REFERENCE) * SEQUENCES_A_CALL]
                    record((profile, "reference", str(most)), put_under_load(by_http_there, some, most))
                if options.replicas:
                    for replicas in (1, 2):
                        run_replicas(replicas, 1)
                        texts = texts_of("tldr", calls_for(most) * SEQUENCES_A_CALL // options.n, options.n)
                        by_handle(texts[:SEQUENCES_A_CALL])
                        record(("tldr", f"{replicas} x 1 thread", str(most)), put_under_load(by_handle, texts, most))
        control.stop("scorers")
        ray.shutdown()
    report(options, results, direct_rates, max(differences))


def report(
    options: Options,
    results: dict[tuple[str, ...], list[Load]],
    direct_rates: dict[str, list[float]],
    difference: float,
) -> None:
    """Prints the table, the ratios and, on request, JSON."""
    most = str(max(options.callers))

    def ratios(one: list[float], other: list[float]) -> list[float]:
        return [a / b for a, b in zip(one, other, strict=True)]

    def rates(*key: str) -> list[float]:
        return [load.rate for load in results[key]]

    harness.show(
        f"{SEQUENCES_A_CALL} sequences a call, {options.n} responses a prompt, {options.layers} layers, "
        f"{options.threads} threads: medians of {options.rounds} rounds",
        ("profile", "way", "callers", "sequences/s", "p50, s", "p99, s"),
        [
            *((profile, "direct", "-", statistics.median(rate), "-", "-") for profile, rate in direct_rates.items()),
            *(
                (*key, *(statistics.median(getattr(load, name) for load in loads) for name in ("rate", "p50", "p99")))
                for key, loads in results.items()
            ),
        ],
    )
    over_direct = {
        profile: ratios(rates(profile, "handle", most), direct_rates[profile]) for profile in options.profiles
    }
    over_reference = {
        profile: ratios(rates(profile, "http", most), rates(profile, "reference", most)) for profile in options.profiles
    }
    of_replicas = (
        ratios(rates("tldr", "2 x 1 thread", most), rates("tldr", "1 x 1 thread", most)) if options.replicas else []
    )
    for profile in options.profiles:
        harness.console.print(
            f"{profile}: the saturated pool reaches {shown(over_direct[profile])} of the direct rate; over HTTP it is "
            f"{shown(over_reference[profile])} times the reference server"
        )
    if of_replicas:
        harness.console.print(f"two replicas with one thread each: {shown(of_replicas)} times one")
    harness.console.print(f"largest difference of a reward from the direct one: {difference:.1e}")
    if options.json_line:
        worst = min(over_direct, key=lambda profile: statistics.median(over_direct[profile]))
        print(
            json.dumps(
                {
                    "ratio": statistics.median(over_direct[worst]),
                    "ratio_is": f"saturated rate over direct rate, of the worst profile ({worst})",
                    "ratios": {profile: statistics.median(values) for profile, values in over_direct.items()},
                    "over_reference": {
                        profile: statistics.median(values) for profile, values in over_reference.items()
                    },
                    "two_replicas_over_one": statistics.median(of_replicas) if of_replicas else None,
                    "loads": {
                        " ".join(key): {
                            name: statistics.median(getattr(load, name) for load in loads)
                            for name in ("rate", "p50", "p99")
                        }
                        for key, loads in results.items()
                    },
                    "direct": {profile: statistics.median(rate) for profile, rate in direct_rates.items()},
                    "largest_difference": difference,
                    "versions": harness.versions(),
                    "unit": "sequences/s",
                    "n": options.n,
                    "layers": options.layers,
                    "rounds": options.rounds,
                }
            )
        )


def shown(values: list[float]) -> str:
    """Formats a median and its spread."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
