"""Evaluation of a PPO run on held-out prompts, and the guards that stop a run that diverged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actors.ppo.checkpoint import CHECKPOINT_PATTERN
from actors.ppo.rollout_workers import Rollout
from actors.runtime.storage import HISTORY_FOLDER
from rlhf_critic.errors import DivergedError, NonFiniteLossError
from rlhf_critic.files import write_text_atomically


@dataclass(frozen=True)
class Sample:
    """A response to a held-out prompt, with its reward and the versions of reward model and policy."""

    prompt: Any
    response: str
    reward: float
    model_version: str
    policy_version: int


def evaluation_values(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns the numbers of an evaluation that the history records."""
    rewards = np.array([rollout.reward for rollout in rollouts])
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "response_tokens": float(np.mean([len(rollout.response_ids) for rollout in rollouts])),
        **component_means(rollouts),
    }


def component_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns the mean of each component of the reward. Two versions of a reward model may have different ones."""
    names = [name for name in rollouts[0].components if all(name in rollout.components for rollout in rollouts)]
    return {f"reward_{name}": float(np.mean([rollout.components[name] for rollout in rollouts])) for name in names}


def write_samples(directory: Path, iteration: int, rollouts: Sequence[Rollout]) -> None:
    """Writes the rollouts of an evaluation into the history of a run."""
    rows = [{one.name: getattr(rollout, one.name) for one in fields(Sample)} for rollout in rollouts]
    path = _samples_path(directory, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_samples(directory: Path, iteration: int) -> list[Sample]:
    """Reads the samples of an evaluation; empty if there was none after this iteration."""
    path = _samples_path(directory, iteration)
    if not path.exists():
        return []
    return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _samples_path(directory: Path, iteration: int) -> Path:
    return directory / HISTORY_FOLDER / "samples" / f"{CHECKPOINT_PATTERN.format(iteration)}.jsonl"


def stop_if_diverged(metrics: Mapping[str, float], iteration: int, max_kl: float) -> None:
    """Checks the metrics of an iteration.

    Raises:
        DivergedError: A metric is NaN or infinite, or the policy is too far from its reference.
    """
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"iteration {iteration}: {', '.join(bad)} became NaN or infinite; earlier checkpoints are untouched. Lower "
            "--policy.optimizer.learning-rate"
        )
    if metrics["kl"] > max_kl:
        raise DivergedError(
            f"iteration {iteration}: the mean KL of a response from the reference policy is {metrics['kl']:.1f} nats, "
            f"above ppo.max_kl {max_kl:g}: the policy left the texts that the reward model can score. Raise "
            "--ppo.kl-coefficient, lower --policy.optimizer.learning-rate, or raise the limit; earlier checkpoints are "
            "untouched"
        )


@contextmanager
def non_finite_loss_as_divergence(who: Literal["critic", "policy"], iteration: int) -> Iterator[None]:
    """Turns a loss that is not finite into an error that names the iteration and the options to change.

    Raises:
        DivergedError: The block raised `NonFiniteLossError`.
    """
    try:
        yield
    except NonFiniteLossError as error:
        raise DivergedError(
            f"iteration {iteration}: the loss of the {who}, or its gradient, is not finite; earlier checkpoints are "
            f"untouched. Lower --{who}.optimizer.learning-rate, or clip rewards (--reward.clip)"
        ) from error
