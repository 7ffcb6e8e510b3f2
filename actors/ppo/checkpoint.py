"""Checkpoints of a PPO run: their names, their state, and the checks before a run resumes. Knows nothing about actors.

A checkpoint is a directory ``iteration-N`` with the policy, the critic and ``state.json``, each with a manifest. It
appears atomically.
"""

from __future__ import annotations

import logging
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from actors.runtime.storage import REWRITTEN_SUFFIX
from rlhf_critic.algorithms.ppo import RunningMoments
from rlhf_critic.checkpoint.critic_directory import weights_hash
from rlhf_critic.config.base import validate_same_options
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.data.prompts import Prompts
from rlhf_critic.errors import CheckpointError, ConfigError
from rlhf_critic.files import verify_manifest

logger = logging.getLogger(__name__)

PPO_STATE_NAME = "state.json"
POLICY_FOLDER, CRITIC_FOLDER = "policy", "critic"
CHECKPOINT_PATTERN = "iteration-{:06d}"
# Options that a resumed run may change: they decide where and how fast it runs, or which scorers give rewards, which
# may change during a run too. The model at the path of the policy is compared by its files.
FREE_OPTIONS = (
    *("policy.model.path", "policy.model.prefix_tree", "policy.optimizer.token_budget", "policy.cpus_per_shard"),
    *("critic.model.path", "critic.model.prefix_tree", "critic.optimizer.token_budget", "critic.cpus_per_shard"),
    *("policy.optimizer.gradient_checkpointing", "critic.optimizer.gradient_checkpointing", "critic.offload"),
    *("prompts.", "rollout.workers", "rollout.cpus_per_worker", "rollout.timeout_s", "ppo.max_kl", "run.", "resume"),
    *("reward.app", "reward.checkpoint", "reward.components", "reward.normalize", "reward.deadline_s"),
    *("reward.pessimism", "reward.patience_s", "reward.chat_template", "reward.max_length"),
    *("reward.min_replicas", "reward.max_replicas", "reward.cpus_per_replica", "reward.allow_mixed_versions"),
)


class RunState(BaseModel):
    """State of a run that a checkpoint holds beside its policy and critic.

    Attributes:
        iteration: Number of iterations done.
        moments: Moments of all rewards so far.
        options: Options of the job.
        prompts: Fingerprint of the prompts that are trained on.
        reference: Digest of the base model's files, which the policy's reference is built from; None in checkpoints
            from before 2026-11-25.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    iteration: int
    moments: RunningMoments
    options: dict[str, Any]
    prompts: str
    reference: str | None = None


def checkpoints(directory: Path) -> list[Path]:
    """Lists a run's checkpoints, the oldest first. All were written completely, but may be damaged since."""
    return sorted(directory.glob(CHECKPOINT_PATTERN.format(0)[:-6] + "[0-9]*"))


def remove_unfinished_checkpoints(directory: Path) -> None:
    """Removes checkpoints of which a killed job had written a part. The caller holds the lock of the run."""
    for unfinished in directory.glob(f".{CHECKPOINT_PATTERN.format(0)[:-6]}*"):
        shutil.rmtree(unfinished)
        logger.warning("removed an unfinished checkpoint path=%s", unfinished)


def latest_checkpoint(directory: Path) -> Path | None:
    """Returns the checkpoint that a run resumes from, if there is one."""
    return next(reversed(checkpoints(directory)), None)


def quarantine_damaged_checkpoints(directory: Path) -> None:
    """Renames checkpoints that were damaged since they were written, so that an earlier one is the latest.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged; they keep their names.
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
            while name.exists():  # an earlier checkpoint of this iteration was damaged too
                name = name.with_name(f"{name.name}{REWRITTEN_SUFFIX}")
            path.rename(name)
            logger.warning(
                "damaged checkpoint=%s renamed=%s resuming_from=%s: %s", path.name, name.name, checkpoint.name, damage
            )
        return
    if damaged:
        raise damaged[0][1]


def read_state(checkpoint: Path, config: PPOJobConfig, prompts: Prompts) -> RunState:
    """Reads a checkpoint's state, and checks that the run may continue with these options and prompts.

    Raises:
        CheckpointError: The state cannot be read.
        ConfigError: An option that decides the results was changed, or the prompts or the base model were.
    """
    try:
        state = RunState.model_validate_json((checkpoint / PPO_STATE_NAME).read_text(encoding="utf-8"))
        before = PPOJobConfig.model_validate(state.options)
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{checkpoint / PPO_STATE_NAME}: cannot be read: {error}") from error
    run, base_model = config.run.name, config.policy.model.path
    validate_same_options(run, before, config, free_options(before, config))
    if state.prompts != prompts.fingerprint:
        raise ConfigError(
            f"the run {run!r} cannot continue: its prompts, their template or length limit are not those it began "
            "with. Restore them, or start a run with another --run.name"
        )
    if state.reference not in {None, reference_digest(base_model)}:
        raise ConfigError(
            f"the run {run!r} cannot continue: the base model {base_model}, from which the policy's "
            "reference is built, is not the one it began with. Restore it, or start a run with another --run.name"
        )
    return state


@cache
def reference_digest(name_or_path: str) -> str:
    """Returns the SHA-256 of the weights that the policy's reference is built from; for a hub's model, its name."""
    return weights_hash(name_or_path, safetensors_only=False) if Path(name_or_path).is_dir() else name_or_path


def free_options(before: PPOJobConfig, after: PPOJobConfig) -> tuple[str, ...]:
    """Returns the options that may differ between these configs of a run.

    The number of iterations may differ if no learning rate schedule depends on it.
    """
    optimizers = [part.optimizer for config in (before, after) for part in (config.policy, config.critic)]
    is_constant = all(one.schedule == "constant" and one.warmup_fraction == 0 for one in optimizers)
    return (*FREE_OPTIONS, "ppo.iterations") if is_constant else FREE_OPTIONS
