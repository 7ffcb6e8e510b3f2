"""``rlhf-critic ppo``: trains a policy with PPO, using rollout workers, scorers and a sharded online critic.

Runs alone (it starts a local Ray) or as a Ray job:
``ray job submit --working-dir . -- python -m jobs.ppo --config FILE.yaml``.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
from ray import serve
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.ppo.checkpoint import (
    latest_checkpoint,
    quarantine_damaged_checkpoints,
    read_state,
    remove_unfinished_checkpoints,
)
from actors.ppo.group_options import critic_options
from actors.ppo.traces import load_environment
from actors.ppo.trainer import PPOOutcome, PPOTrainer
from actors.runtime.run_logger import validate_wandb
from actors.runtime.storage import HISTORY_FOLDER
from actors.serving import control
from actors.serving.handle import connect
from actors.serving.job_cleanup import ends_with_this_job, wait_for_earlier_jobs
from jobs.cli import command, run_job, validate_outside_package
from jobs.run_lock import lock_run, prepare_run
from jobs.serve import join_ray, run_pool
from rlhf_critic.config.base import parse_command_line, shown_path
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.serve import ServeJobConfig
from rlhf_critic.data.conversation import text_of, turns_of
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.prompts import Prompts, load_prompts, split_prompts
from rlhf_critic.errors import ConfigError, RankFailed, RankLost
from rlhf_critic.evaluation.plots import save_curves
from rlhf_critic.training.metrics_log import read_metrics

logger = logging.getLogger(__name__)

PLOT_NAME = "curves.png"
EXAMPLES = 6


def main() -> None:
    """Reads the options, runs the job and prints the result."""
    config = parse_command_line(PPOJobConfig, prog=command("ppo"))
    show(Console(), run(config))


def run(config: PPOJobConfig) -> PPOOutcome:
    """Runs a PPO job to its end.

    Raises:
        CriticError: The options, data or models are wrong, another job works on the run, all its checkpoints are
            damaged, rewards or rollouts did not arrive in time, or the policy diverged.
        RankLost: The critic or the policy was lost more often than ``run.max_failures``.
        RankFailed: The critic or the policy failed, and another attempt would fail as well.
    """
    config.validate_complete()
    validate_outside_package("run.storage_path", config.run.storage_path)
    validate_wandb(config.run.wandb_project)
    prompts, held_out = read_prompts(config)
    with lock_run(config.run.storage_path, config.run.name):
        return _run(config, prompts, held_out)


def _run(config: PPOJobConfig, prompts: Prompts, held_out: Prompts | None) -> PPOOutcome:
    config = config.resolved()
    directory = Path(config.run.storage_path) / config.run.name
    prepare_run(config.run.storage_path, config.run.name, config.resume)
    remove_unfinished_checkpoints(directory)
    quarantine_damaged_checkpoints(directory)
    if not config.run.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Actors would report these errors only after their start.
    critic_options(config)
    load_environment(config.rollout.environment)
    if checkpoint := latest_checkpoint(directory):
        read_state(checkpoint, config, prompts)
    started_ray = join_ray(may_start=True)
    try:
        if started_ray:
            validate_room(config)
        with scorers(config), connect(config.reward.app, deadline_s=config.reward.deadline_s) as client:
            failures = 0
            while True:
                try:
                    with PPOTrainer(config, prompts, held_out, client) as attempt:
                        outcome = attempt.run()
                    save_curves(read_metrics(directory / HISTORY_FOLDER), directory / PLOT_NAME)
                    return outcome
                except RankLost as error:
                    failures += 1
                    if failures > config.run.max_failures or isinstance(error, RankFailed):
                        raise
                    message = "rank lost, resuming from the last checkpoint failures=%d/%d error=%s"
                    logger.warning(message, failures, config.run.max_failures, error)
    finally:
        if started_ray:
            serve.shutdown()
            ray.shutdown()


def validate_room(config: PPOJobConfig) -> None:
    """Checks that a local Ray, which never gets more nodes, has room for all actors.

    Raises:
        ConfigError: The actors reserve more CPUs than there are.
    """
    there = ray.cluster_resources().get("CPU", 0.0)
    if config.cpus > there:
        raise ConfigError(
            f"policy, critic, rollout workers and scorers reserve {config.cpus:g} CPUs, this machine has {there:g}: "
            "give them fewer or fractions of one (--policy.cpus-per-shard, --critic.cpus-per-shard, "
            "--rollout.cpus-per-worker, --reward.cpus-per-replica), or submit the job to a cluster"
        )


def read_prompts(config: PPOJobConfig) -> tuple[Prompts, Prompts | None]:
    """Reads the prompts to train on and the held-out ones, if any.

    Raises:
        CriticError: See `rlhf_critic.data.prompts.load_prompts`.
    """
    options = config.prompts
    tokenizer = load_tokenizer(config.policy.model.path, config.policy.chat_template)
    encoder = Encoder(tokenizer, options.max_tokens + config.rollout.max_new_tokens, "text")
    train = load_prompts(options.train, encoder, options.max_tokens, options.fields)
    held_out = None
    logger.info("prompts %s", train)
    if options.validation:
        held_out = load_prompts(options.validation, encoder, options.max_tokens, options.fields)
        logger.info("held-out prompts %s", held_out)
    elif options.validation_fraction:
        train, held_out = split_prompts(train, options.validation_fraction, config.ppo.seed)
        logger.info("split prompts train=%d held_out=%d", len(train), len(held_out))
    return train, held_out


@contextmanager
def scorers(config: PPOJobConfig) -> Iterator[None]:
    """Provides the scorer pool: a running one, or one that lives as long as the job.

    Raises:
        ConfigError: No pool runs and none is configured, or a running pool has the name of the one to start.
    """
    reward = config.reward
    if reward.checkpoint is None:
        if not control.is_running(reward.app):
            raise ConfigError(
                f"there is no pool of scorers {reward.app!r}: give --reward.checkpoint CRITIC and the job runs one, or "
                "start one with rlhf-critic serve CRITIC"
            )
        yield
        return
    wait_for_earlier_jobs(reward.app, config.run.start_timeout_s)
    if control.is_running(reward.app):
        raise ConfigError(
            f"a pool {reward.app!r} runs already: leave out reward.checkpoint to use it, or choose another --reward.app"
        )
    with socket.socket() as probe:  # finds a port: another Serve may have the default one
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ServeJobConfig(
        checkpoint=reward.checkpoint,
        chat_template=reward.chat_template,
        max_length=reward.max_length,
        app=reward.app,
        components=reward.components,
        normalize=reward.normalize,
        pessimism=reward.pessimism,
        min_replicas=reward.min_replicas,
        max_replicas=reward.max_replicas,
        cpus_per_shard=reward.cpus_per_replica,
        use_gpu=config.run.use_gpu,
        port=port,
        start_timeout_s=config.run.start_timeout_s,
    )
    with ends_with_this_job(reward.app):
        _, version, _ = run_pool(options, lambda _: None)
        logger.info("scorers started version=%s", version)
        yield


def show(console: Console, outcome: PPOOutcome) -> None:
    """Prints how held-out rewards changed, with examples, and the paths of the results."""
    # A resumed run may have other held-out prompts.
    if outcome.first and [one.prompt for one in outcome.first] == [one.prompt for one in outcome.last]:
        before, after = (np.array([sample.reward for sample in part]) for part in (outcome.first, outcome.last))
        table = Table(title="The same held-out prompts, before and after", title_justify="left", show_lines=True)
        for column in ("prompt", "before", "reward", "after", "reward"):
            table.add_column(column, overflow="fold", justify="right" if column == "reward" else "left")
        for first, last in list(zip(outcome.first, outcome.last, strict=True))[:EXAMPLES]:
            prompt = (
                first.prompt if isinstance(first.prompt, str) else "\n".join(map(text_of, turns_of(first.prompt)[-1:]))
            )
            cells = (prompt, first.response, f"{first.reward:+.2f}", last.response, f"{last.reward:+.2f}")
            table.add_row(*map(Text, cells))  # not markup, which a response may contain
        console.print(table)
        versions = [sorted({sample.model_version for sample in part}) for part in (outcome.first, outcome.last)]
        rise, spread = after.mean() - before.mean(), before.std()
        in_deviations = f": a rise of {rise / spread:.2f} standard deviations" if spread > 0 else ""
        console.print(
            f"mean reward on {len(before)} held-out prompts: {before.mean():+.3f} before (standard deviation "
            f"{spread:.3f}), {after.mean():+.3f} after{in_deviations if versions[0] == versions[1] else ''}",
            highlight=False,
        )
        if versions[0] != versions[1]:
            before_by, after_by = map(", ".join, versions)
            text = f"the scales differ: {before_by} scored before, {after_by} after"
            console.print(text, highlight=False, soft_wrap=True)
    paths = {"curves": outcome.directory / PLOT_NAME, **{n: outcome.checkpoint / n for n in ("policy", "critic")}}
    for name, path in paths.items():
        console.print(f"{name}: {shown_path(str(path))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_job(main)
