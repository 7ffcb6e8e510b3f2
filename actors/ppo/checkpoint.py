"""What a PPO run's checkpoints say of the run, and whether it may go on from them. Knows nothing of actors.

A checkpoint is a directory ``iteration-N`` with the policy, the critic and ``state.json``; it appears whole or not at
all. Each of the three has its manifest.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from actors.runtime.storage import REWRITTEN_SUFFIX
from rlhf_critic.algorithms.ppo import RunningMoments
from rlhf_critic.checkpoint.critic_directory import weights_hash
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.data.prompts import Prompts
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.files import verify_manifest

PPO_STATE_NAME = "state.json"
POLICY_FOLDER, CRITIC_FOLDER = "policy", "critic"
CHECKPOINT_PATTERN = "iteration-{:06d}"
# Options that a resumed run may change. They decide where and how fast, not what; and who judges, which may change
# while a run goes on, too. What is at the path of the policy is compared by its files.
FREE_OPTIONS = (
    *("policy.model.path", "policy.model.prefix_tree", "policy.optimizer.token_budget", "policy.cpus_per_shard"),
    *("critic.model.path", "critic.model.prefix_tree", "critic.optimizer.token_budget", "critic.cpus_per_shard"),
    *("policy.optimizer.gradient_checkpointing", "critic.optimizer.gradient_checkpointing", "critic.offload"),
    *("prompts.", "rollout.workers", "rollout.cpus_per_worker", "rollout.timeout_s", "ppo.max_kl", "run.", "resume"),
    *("reward.app", "reward.checkpoint", "reward.components", "reward.normalize", "reward.deadline_s"),
    *("reward.min_replicas", "reward.max_replicas", "reward.cpus_per_replica", "reward.allow_mixed_versions"),
)


class RunState(BaseModel):
    """What a checkpoint says of a run beside its policy and critic.

    Attributes:
        iteration: Iterations done.
        moments: Of all rewards so far.
        options: The job's.
        prompts: Fingerprint of the prompts that are trained on.
        reference: Digest of the base model's files, which the policy's reference is built from; checkpoints of before
            2026-11-25 have none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    iteration: int
    moments: RunningMoments
    options: dict[str, Any]
    prompts: str
    reference: str | None = None


def checkpoints(directory: Path) -> list[Path]:
    """A run's checkpoints, the oldest first; each was written to its end."""
    return sorted(directory.glob(CHECKPOINT_PATTERN.format(0)[:-6] + "[0-9]*"))


def remove_old_checkpoints(directory: Path, keep: int) -> None:
    """Leaves the newest."""
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that a run goes on from."""
    found = checkpoints(directory)
    return found[-1] if found else None


def quarantine_damaged_checkpoints(directory: Path) -> None:
    """Gives checkpoints that were damaged since they were written other names, so that an earlier one is the latest.

    Raises:
        CheckpointError: There are checkpoints, and none is whole; they keep their names.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for checkpoint in reversed(checkpoints(directory)):
        try:
            for part in (checkpoint, checkpoint / POLICY_FOLDER, checkpoint / CRITIC_FOLDER):
                verify_manifest(part)
        except CheckpointError as error:
            damaged.append((checkpoint, error))
            continue
        for path, damage in damaged:
            name = path.with_name(f"damaged-{path.name}")
            while name.exists():  # one of this iteration was damaged before
                name = name.with_name(f"{name.name}{REWRITTEN_SUFFIX}")
            aside = path.rename(name)
            print(f"warning: {damage}. It is now {aside.name}; going on from {checkpoint.name}")
        return
    if damaged:
        raise damaged[0][1]


def read_state(checkpoint: Path, config: PPOJobConfig, prompts: Prompts) -> RunState:
    """Reads a checkpoint's state, and checks that the run may go on with these options and prompts.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: An option that decides the results was changed, or the prompts or the base model were.
    """
    try:
        state = RunState.model_validate_json((checkpoint / PPO_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{checkpoint / PPO_STATE_NAME}: cannot be read: {error}") from error
    changed = changed_options(state.options, config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"the run {config.run.name!r} cannot continue with other options: {'; '.join(changed)}. Restore them, or "
            "start a run with another --run.name"
        )
    if state.prompts != prompts.fingerprint:
        raise ConfigError(
            f"the run {config.run.name!r} cannot continue: its prompts, their template or length limit are not those "
            "it began with. Restore them, or start a run with another --run.name"
        )
    if state.reference not in {None, reference_digest(config)}:
        raise ConfigError(
            f"the run {config.run.name!r} cannot continue: the base model {config.policy.model.path}, from which the "
            "policy's reference is built, is not the one it began with. Restore it, or start a run with another "
            "--run.name"
        )
    return state


def reference_digest(config: PPOJobConfig) -> str:
    """A SHA-256 of the weights that the policy's reference is built from; of a hub's model, its name."""
    return _digest_of_model(config.policy.model.path)


@cache
def _digest_of_model(name_or_path: str) -> str:
    return weights_hash(name_or_path, safetensors_only=False) if Path(name_or_path).is_dir() else name_or_path


def changed_options(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the options of two jobs among those that decide the results, as ``option: old -> new``."""
    old, new = dict(_flat(before)), dict(_flat(now))
    free: tuple[str, ...] = FREE_OPTIONS
    schedules = {
        (options[f"{part}.optimizer.schedule"], options[f"{part}.optimizer.warmup_fraction"])
        for options in (old, new)
        for part in ("policy", "critic")
    }
    if schedules == {("constant", 0.0)}:
        free = (*free, "ppo.iterations")  # no schedule depends on them: a run may be prolonged
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(free)
    ]


def _flat(options: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in options.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(f"{prefix}{name}", value)]
    return flat
