"""What a soak works on: a Ray of its own with a pool of scorers, items with known rewards, and a tally of events."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch
from safetensors.torch import load_file

from actors.runtime.session import init_ray
from jobs.serve import read_token, run_pool
from rlhf_critic.config.serve import ServeJobConfig
from tests.actors.scorers import make_conversations, rewards_by_engine, save_tiny_critic
from tests.helpers import save_tiny_model, write_preferences

VERSIONS = 3
REPLICAS = 3
DEADLINE_S = 120.0
TRAIN_TIMEOUT_S = 400.0
COMPONENT_TIMEOUT_S = 2.0
COMPONENTS = (
    "components:\n- {kind: critic}\n"
    f"- {{kind: python, name: hangs, weight: 0.0, function: 'tests.jobs.ppo_rules:hangs', "
    f"timeout_s: {COMPONENT_TIMEOUT_S}}}\n"
)
REPOSITORY = Path(__file__).parents[2]


@dataclass
class Tally:
    """Counts and problems, which many threads add."""

    counts: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, number: int = 1) -> None:
        """Counts an event."""
        with self._lock:
            self.counts[what] += number

    def problem(self, what: str, message: str) -> None:
        """Counts a violation, and keeps the first few of its messages."""
        with self._lock:
            self.counts[what] += 1
            if self.counts[what] <= 5:
                self.problems.append(f"{what}: {message}")


class World:
    """A separate Ray with a pool, the items to score and their rewards."""

    def __init__(self, directory: Path, steps: int) -> None:
        self.directory = directory
        self.model = save_tiny_model(directory / "model", tie_word_embeddings=False)
        self.items = make_conversations(60)
        self.critics = {
            f"soak@{seed}": save_tiny_critic(self.model, directory / f"critic-{seed}", seed, f"soak@{seed}")
            for seed in range(VERSIONS)
        }
        self.rewards = {version: rewards_by_engine(path, self.items) for version, path in self.critics.items()}
        options = {
            "model": {"path": self.model},
            "encoding": {"max_length": 64},
            "data": {
                "train": write_preferences(directory / "train.jsonl", 90),
                "cache_dir": str(directory / "cache"),
            },
            "train": {
                "global_batch_size": 6,
                "epochs": 1000,
                "max_steps": steps,
                "learning_rate": 1e-3,
                "token_budget": 300,
                "checkpoint_every": max(1, steps // 10),
            },
            "run": {"num_workers": 2, "storage_path": str(directory / "runs"), "max_failures": 1000},
        }
        self.options = directory / "train.yaml"
        self.options.write_text(json.dumps(options))  # JSON is YAML
        init_ray(address="local", num_cpus=8, logging_level="ERROR", log_to_driver=False)
        self.ray_address = ray.get_runtime_context().gcs_address
        token_file = str(directory / "token")
        components = directory / "components.yaml"
        components.write_text(COMPONENTS)
        config = ServeJobConfig(
            checkpoint=self.critics["soak@0"],
            port=free_port(),
            auth="on",
            token_file=token_file,
            components=str(components),
            min_replicas=REPLICAS,
            max_replicas=REPLICAS,
            cpus_per_shard=0.5,
            start_timeout_s=DEADLINE_S,
        )
        self.url, _, _ = run_pool(config, lambda _: None)
        self.token = read_token(token_file)

    def train(self, name: str, on_start: Callable[[subprocess.Popen[str]], None] = lambda _: None) -> tuple[int, str]:
        """Runs ``jobs.train --resume``; returns its exit code and its output."""
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.train", "--config", str(self.options), "--run.name", name, "--resume"],
            cwd=REPOSITORY,
            env={**os.environ, "RAY_ADDRESS": self.ray_address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        on_start(process)
        output, _ = process.communicate(timeout=TRAIN_TIMEOUT_S)
        return process.returncode, output

    def take_weights(self, name: str) -> dict[str, torch.Tensor]:
        """Returns the weights at the end of a run, and removes the run."""
        run = self.directory / "runs" / name
        weights: dict[str, torch.Tensor] = load_file(max(run.glob("step-*")) / "model.safetensors")
        shutil.rmtree(run)
        return weights


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
