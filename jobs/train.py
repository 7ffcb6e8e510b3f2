"""``rlhf-critic train``: trains a critic on preferences with Ray Train and DeepSpeed.

Runs alone (it starts a local Ray) or as a Ray job:
``ray job submit --working-dir . -- python -m jobs.train --config FILE.yaml``.
"""

from __future__ import annotations

import logging
import os
from itertools import count
from math import ceil
from typing import Any, Literal

import numpy as np
import ray
import ray.train
from rich.console import Console
from rich.table import Column, Table

from actors.runtime.environment import compute_environment
from actors.runtime.ray_internals import WorkerGroupStartupTimeoutError
from actors.runtime.run_logger import validate_wandb_package
from actors.runtime.session import init_ray
from actors.runtime.storage import remove_broken_list, resolve_run
from actors.training.result import SCORE, TrainOutcome
from actors.training.retry import LostWorkersTrainer, fault_of, last_line
from actors.training.torch_backend import PrivateTorchConfig
from jobs.cli import command, run_job, validate_outside_package
from jobs.run_lock import lock_run, prepare_run
from rlhf_critic.config.base import parse_command_line, shown_path
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.errors import FULL_DISK, CheckpointError, PlacementError, RankLost, describe_error
from rlhf_critic.logs import shows_debug

logger = logging.getLogger(__name__)

# Ray Train chooses the size of an elastic group from a view of the cluster that is up to 20 s old (the period of its
# autoscaling coordinator), so it may wait for a node that is gone. After so many seconds it chooses again.
ELASTIC_START_TIMEOUT_S = 60.0
GROW_EVERY_S = 60.0  # period at which an elastic group checks whether it can grow


def main() -> None:
    """Reads the options, runs the job and prints where the critic is."""
    config = parse_command_line(TrainJobConfig, prog=command("train"))
    config.validate_complete()
    if config.dry_run:
        from jobs.dry_run import plan_table

        Console().print(plan_table(config))
    elif config.seeds:
        Console().print(compare_seeds(config))
    else:
        checkpoint = report(config, train(config))
        print(f"\nnext: {command('export')} {checkpoint} OUT")


def report(config: TrainJobConfig, result: ray.train.Result) -> str:
    """Prints the result of a run and returns the location of its last checkpoint."""
    outcome: TrainOutcome = result.return_value
    checkpoint = checkpoint_of(config, result)
    print(f"\ntrained {outcome.steps} steps; the critic is in {checkpoint}")
    if found := outcome.evaluation:
        print(f"validation accuracy {found.accuracy} (95% interval), log-loss {found.log_loss}")
    best = outcome.progress
    if best.best_step not in {0, outcome.steps}:
        print(f"the lowest validation log-loss was {best.best_log_loss:.3f}, after step {best.best_step}")
    return checkpoint


def checkpoint_of(config: TrainJobConfig, result: ray.train.Result) -> str:
    """Returns the path or URI of a run's last checkpoint, as short as a user would type it."""
    return f"{shown_path(config.run.storage_path)}/{config.run.name}/{result.return_value.checkpoint}"


def compare_seeds(config: TrainJobConfig) -> Table:
    """Trains once with each seed, one run after the other, and tabulates how much the result varies.

    Raises:
        CriticError: See `train`.
    """
    headers = ("seed", "validation accuracy", "validation log-loss", "checkpoint")
    columns = (Column(header, overflow="fold") for header in headers)
    table = Table(*columns, title=f"{config.run.name}: {len(config.seeds)} seeds", title_justify="left")
    measured = []
    for seed in config.seeds:
        run = config.run.model_copy(update={"name": f"{config.run.name}-seed-{seed}"})
        of_seed = config.model_copy(update={"run": run, "train": config.train.model_copy(update={"seed": seed})})
        result = train(of_seed)
        evaluation = result.return_value.evaluation
        shown = (str(evaluation.accuracy), str(evaluation.log_loss)) if evaluation else ("not validated", "")
        table.add_row(str(seed), *shown, report(of_seed, result))
        if evaluation:
            measured.append((evaluation.accuracy.mean, evaluation.log_loss.mean))
    if measured:
        spreads = np.std(measured, axis=0, ddof=1) if len(measured) > 1 else np.zeros(2)
        pairs = zip(np.mean(measured, axis=0), spreads, strict=True)
        table.add_row("all", *(f"{mean:.3f} (standard deviation {spread:.3f})" for mean, spread in pairs), "")
    return table


def train(config: TrainJobConfig) -> ray.train.Result:
    """Runs a training job to its end.

    Returns:
        Ray Train's result, whose ``return_value`` is a `TrainOutcome`.

    Raises:
        CriticError: The options, the data or the model are wrong, another job works on the run, all its checkpoints are
            damaged, the disk has no room for the next one, or the loss became NaN.
        PlacementError: The workers could not be placed in time.
        RankLost: Workers were lost more often than ``run.max_failures``.
        UnexpectedError: The program, a library or the machine failed, and another attempt would fail as well.
    """
    config.validate_complete()
    validate_outside_package("run.storage_path", config.run.storage_path)
    validate_wandb_package(config.run.wandb_project)
    with lock_run(config.run.storage_path, config.run.name):
        return _train(config)


def _train(config: TrainJobConfig) -> ray.train.Result:
    run = config.run
    place = resolve_run(run.storage_path, run.name)
    prepare_run(run.storage_path, run.name, config.resume)
    remove_broken_list(*place)
    # Ray Train's own limit is a minute, after which it retries forever. An autoscaler needs longer than that, and the
    # user needs an error.
    is_elastic = run.min_workers is not None
    try_s = min(run.start_timeout_s, ELASTIC_START_TIMEOUT_S) if is_elastic else run.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(try_s)
    # Ray Train's wrapper around print() would split the lines that carry the progress bar.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    resources: dict[str, float] = {"CPU": run.cpus_per_worker, **({"GPU": 1} if run.use_gpu else {})}
    worker_environment = {
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # torch warns in each worker where a host name has no address; its errors stay.
        "TORCH_CPP_LOG_LEVEL": "WARNING" if shows_debug() else "ERROR",
        **compute_environment(run.use_gpu, run.deterministic),
    }
    if not run.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not run.name.isascii():
        os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"  # the name is a tag of Ray's metrics, which take ASCII only
    if not ray.is_initialized():
        init_ray()
    if is_elastic:
        _wait_for_min_workers(config, resources)
    trainer = LostWorkersTrainer(
        _train_loop,
        train_loop_config=config.model_dump(mode="json"),
        torch_config=PrivateTorchConfig(backend="nccl" if run.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(run.min_workers, run.num_workers) if is_elastic else run.num_workers,
            elastic_resize_monitor_interval_s=GROW_EVERY_S,
            use_gpu=run.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=run.storage_path,
            failure_config=ray.train.FailureConfig(
                max_failures=run.max_failures,
                # Each lost worker can cause one failed attempt to place more workers than fit.
                controller_failure_limit=run.max_failures + ceil(run.start_timeout_s / try_s) if is_elastic else 0,
            ),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=run.keep_checkpoints,
                checkpoint_score_attribute=SCORE if run.keep == "best" else None,
                checkpoint_score_order="min",
            ),
            logging_config=ray.train.LoggingConfig(log_level="INFO" if shows_debug() else "CRITICAL"),
            worker_runtime_env={"env_vars": worker_environment},
        ),
    )
    for failures in count(1):
        try:
            return trainer.fit()
        except ray.train.TrainingFailedError as error:
            reason = error.controller_failure if isinstance(error, ray.train.ControllerError) else error
            if isinstance(reason, WorkerGroupStartupTimeoutError):
                raise PlacementError(_why_not_placed(config, "num_workers")) from error
            fault = fault_of(error)
            if fault is not None and getattr(fault, "errno", None) in FULL_DISK:
                raise CheckpointError(
                    f"{run.storage_path}: {last_line(fault)}; the checkpoints of the run {run.name!r} are complete. "
                    "Free some space, then continue with --resume"
                ) from error
            if fault is not None:
                raise describe_error(fault) from error
            # Ray Train replaces workers that it loses later. A worker that dies during the start ends the attempt.
            if reason is error or failures > run.max_failures:
                lost = RankLost(
                    f"workers were lost more often than run.max_failures={run.max_failures}: {last_line(error)}"
                )
                lost.trace = str(error)
                raise lost from error
            logger.warning("workers were lost during the start, retrying failures=%d/%d", failures, run.max_failures)
    raise AssertionError("the loop ends by return or raise")


def _train_loop(loop_config: dict[str, Any]) -> TrainOutcome:
    from actors.training.worker import train_loop  # model code, which the driver does not need

    return train_loop(loop_config)


def _wait_for_min_workers(config: TrainJobConfig, resources: dict[str, float]) -> None:
    """Waits for room for ``run.min_workers``, because Ray Train 2.60 would wait without a deadline or a log line.

    The remaining workers are requested too, so that an autoscaler starts all nodes at once and the run need not grow.
    """
    fewest = config.run.min_workers or 0
    sizes = (fewest, config.run.num_workers - fewest)
    groups = [ray.util.placement_group([resources] * size) for size in sizes if size]
    try:
        if not groups[0].wait(config.run.start_timeout_s):
            raise PlacementError(_why_not_placed(config, "min_workers"))
    finally:
        for group in groups:
            ray.util.remove_placement_group(group)


def _why_not_placed(config: TrainJobConfig, option: Literal["num_workers", "min_workers"]) -> str:
    run = config.run
    wanted = f"{run.cpus_per_worker} CPU{' and 1 GPU' if run.use_gpu else ''}"
    kinds = ("CPU", "GPU") if run.use_gpu else ("CPU",)
    there = ", ".join(f"{ray.cluster_resources().get(kind, 0):g} {kind}" for kind in kinds)
    return (
        f"run.{option}: {getattr(run, option)} workers with {wanted} each could not be placed within "
        f"{run.start_timeout_s:g} s (run.start_timeout_s): the cluster has {there}. Ask for fewer workers or CPUs, let "
        "the autoscaler add more nodes, or wait longer"
    )


if __name__ == "__main__":
    run_job(main)
