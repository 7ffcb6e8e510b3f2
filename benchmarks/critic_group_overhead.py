"""The cost of a `CriticGroup` over its engine called directly, and the copies of token ids that its caller makes.

    python -m benchmarks.critic_group_overhead

Both calls run in the same process of one rank, in turn: through the handle, and on rollouts that the rank has already.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tyro

from actors.ppo.critic_group import CriticGroup, CriticOptions, CriticRank
from actors.ppo.engine_group import SharedSequences, put_numbers, received
from benchmarks.workloads import VOCABULARY, save_model
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.model import EncodingConfig, ModelConfig
from rlhf_critic.config.train import TrainConfig


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    rollouts: int = 64
    """Number of rollouts; eight share a prompt."""
    prompt_tokens: int = 768
    """Number of tokens of a prompt."""
    response_tokens: int = 256
    """Number of tokens of a response."""
    layers: int = 1
    """Number of layers of the critic; fewer layers make the cost of a call a larger share."""
    rounds: int = 5
    """Number of calls of each kind."""
    threads: int = 2
    """Number of threads of the rank."""


class DirectRank(CriticRank):
    """A rank that also calls its engine on rollouts that it keeps."""

    def keep(self, columns: Sequence[Sequence[TokenIds]], rows: Sequence[int] | None, numbers: dict[str, Any]) -> None:
        """Keeps rollouts."""
        self._kept, self._numbers = received(columns, rows), numbers

    def direct_values(self) -> float:
        """Returns the seconds of the engine's values."""
        started = time.perf_counter()
        self._engine.values(self._kept)
        return time.perf_counter() - started

    def direct_update(self) -> float:
        """Returns the seconds of the engine's update."""
        started = time.perf_counter()
        self._engine.update(self._kept, **self._numbers, clip=0.2)
        return time.perf_counter() - started


class DirectGroup(CriticGroup):
    """A group of such ranks."""

    rank_class = DirectRank


def seconds(action: Callable[[], object]) -> float:
    """Returns the seconds of an action."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main(options: Options) -> None:
    """Runs the benchmark and prints the ratios."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, VOCABULARY, options.prompt_tokens) for _ in range((options.rollouts + 7) // 8)]
    responses = [rng.integers(5, VOCABULARY, options.response_tokens) for _ in range(options.rollouts)]
    sequences = [np.concatenate([prompts[row // 8], ids]) for row, ids in enumerate(responses)]
    numbers = [np.zeros(options.response_tokens, np.float32) for _ in sequences]
    lengths = [options.prompt_tokens] * len(sequences)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(model, options.layers)
        ray.init(num_cpus=options.threads, include_dashboard=False, log_to_driver=False)
        critic = CriticOptions(
            ModelConfig(path=str(model)), TrainConfig(token_budget=4096), EncodingConfig(chat_template="plain"), 100
        )
        with DirectGroup(critic, cpus_per_shard=options.threads) as group:
            shared = SharedSequences(sequences)
            group._call(
                "keep", DirectRank.keep, *shared.sent, put_numbers(lengths, None, returns=numbers, old_values=numbers)
            )
            calls: dict[str, tuple[Callable[[], float], Callable[[], object]]] = {
                "values": (
                    lambda: group._call("values", DirectRank.direct_values)[0],
                    lambda: group.values(shared),
                ),
                "update": (
                    lambda: group._call("update", DirectRank.direct_update)[0],
                    lambda: group.update(shared, lengths, numbers, numbers),
                ),
            }
            for name, (direct, through_group) in calls.items():
                direct()
                pairs = [(direct(), seconds(through_group)) for _ in range(options.rounds)]
                ratios = sorted(group_s / direct_s for direct_s, group_s in pairs)
                extra = statistics.median(group_s - direct_s for direct_s, group_s in pairs)
                print(
                    f"{name}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) times the engine; "
                    f"{1000 * extra:.0f} ms more than {statistics.median(one for one, _ in pairs):.2f} s",
                    flush=True,
                )
        size = sum(ids.nbytes for ids in sequences)
        put_s = statistics.median(seconds(lambda: SharedSequences(sequences)) for _ in range(options.rounds))
        print(f"one copy of {size / 1e6:.2f} MB of token ids into the object store: {1000 * put_s:.1f} ms")
        ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Options))
