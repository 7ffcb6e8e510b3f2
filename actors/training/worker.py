"""Train loop of one Ray Train worker: builds its shard of the critic, steps, validates, saves checkpoints, reports.

Every decision of training is in `rlhf_critic.training.critic_engine` and `rlhf_critic.batching.planner`. This module
connects them to Ray Train. Knows nothing about command lines.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow.fs as pafs
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.experimental import tqdm_ray
from ray.train import Checkpoint

from actors.runtime.run_logger import RunLogger
from actors.runtime.storage import (
    REWRITTEN_SUFFIX,
    HistoryDirectory,
    check_free_space,
    checkpoint_name,
    checkpoint_names,
    remove_leftover,
    resolve_run,
    size_of,
)
from actors.training.result import SCORE, TrainOutcome, ValidationProgress
from rlhf_critic.batching.sampler import is_due, rows_of_step
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard, read_card
from rlhf_critic.config.base import validate_same_options
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.data.training_data import load_data, total_steps
from rlhf_critic.errors import CheckpointError, ConfigError, CriticError
from rlhf_critic.evaluation.preferences import Evaluation
from rlhf_critic.files import verify_manifest, write_manifest
from rlhf_critic.logs import configure_logging
from rlhf_critic.model.weights import WeightReader
from rlhf_critic.training.critic_engine import CriticEngine, StepMetrics
from rlhf_critic.training.process_group import init_distributed, raise_on_all_ranks

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_REFERENCES = 1000  # training preferences whose rewards are measured for their mean
# Options that a resumed run may change, because they do not decide the weights: paths, speed, and how often something
# is saved. Data and encoding are compared by fingerprint instead.
FREE_OPTIONS = (
    *("data.", "encoding.", "run.", "resume", "seeds", "dry_run", "model.path", "model.prefix_tree"),
    *("train.token_budget", "train.gradient_checkpointing", "train.offload_optimizer", "train.offload_parameters"),
    *("train.validate_every", "train.checkpoint_every", "train.early_stopping_patience", "train.reference"),
)


@dataclass(frozen=True)
class Reference:
    """Mean and standard deviation of rewards, with a description of the texts."""

    mean: float
    std: float
    what: str


def train_loop(loop_config: dict[str, Any]) -> TrainOutcome:
    """Runs on every Ray Train worker; ``torch.distributed`` is initialised by Ray Train.

    Args:
        loop_config: A `TrainJobConfig` as plain values.
    """
    configure_logging()
    config = TrainJobConfig.model_validate(loop_config)
    if config.run.use_gpu:
        # NCCL's collectives use the current device, which is the first one unless it is set.
        torch.cuda.set_device(ray.train.torch.get_device())
    else:
        torch.set_num_threads(config.run.cpus_per_worker)
    init_distributed("nccl" if config.run.use_gpu else "gloo")
    try:
        return _TrainingRun(config).run()
    except CriticError as error:
        return TrainOutcome(error=error)


class _TrainingRun:
    """One attempt at a run: from the start, or from the last complete checkpoint."""

    def __init__(self, config: TrainJobConfig) -> None:
        self.config = config
        self.context = ray.train.get_context()
        self.is_main = self.context.get_world_rank() == 0
        self.is_first_of_node = self.context.get_local_rank() == 0
        # One rank of a node encodes what is not cached yet; then all map its files.
        raise_on_all_ranks(lambda: load_data(config) if self.is_first_of_node else None)
        self.data = raise_on_all_ranks(lambda: load_data(config))
        self.total_steps = total_steps(len(self.data.train), config.train)
        # Every rank opens every file, so that one missing on a single node does not leave the others in a collective.
        raise_on_all_ranks(lambda: WeightReader(config.model.path))
        self._log("data: %s", self.data)
        self.engine = CriticEngine.from_pretrained(self.data.encoder, config.model, config.train, self.total_steps)
        self.engine.validate_preferences(self.data.train)
        self.progress = ValidationProgress()
        # Names in Ray Train's list, which Ray Train removes when they are due.
        self.listed = {Path(one.checkpoint.path).name for one in ray.train.get_all_reported_checkpoints()}
        self.newest = ""  # checkpoint of this run
        self._resume()

    def _resume(self) -> None:
        """Resumes from the newest complete checkpoint, whether or not Ray Train has it in its list.

        Raises:
            CheckpointError: Ray Train lists checkpoints, and none is complete.
            ConfigError: The run began with other options or data.
        """
        damage: CheckpointError | None = None
        for name, checkpoint in stored_checkpoints(*resolve_run(self.config.run.storage_path, self.config.run.name)):
            with checkpoint.as_directory() as directory:
                try:
                    self._check_on_each_node(verify_manifest, directory)
                except CheckpointError as error:
                    # One that is not listed belongs to an attempt that was lost while it saved.
                    damage = damage or (error if name in self.listed else None)
                    self._log("damaged checkpoint=%s, trying an earlier one: %s", name, error, level=logging.WARNING)
                    continue
                self._check_on_each_node(self._validate_same_run, directory)
                self.engine.load(directory)
                self.newest = name
                self.progress = ValidationProgress(**read_card(directory).training.get("progress", {}))
                self._log("resumed step=%d checkpoint=%s", self.engine.step, name)
                return
        if damage:
            raise damage

    def _log(self, message: str, *values: object, level: int = logging.INFO) -> None:
        if self.is_main:
            logger.log(level, message, *values)

    def _check_on_each_node(self, check: Callable[[str], None], directory: str) -> None:
        raise_on_all_ranks(lambda: check(directory) if self.is_first_of_node else None)

    def _validate_same_run(self, directory: str) -> None:
        trained, run = read_card(directory).training, self.config.run.name
        validate_same_options(run, TrainJobConfig.model_validate(trained["options"]), self.config, FREE_OPTIONS)
        if trained["train_data"]["fingerprint"] != self.data.train.fingerprint:
            raise ConfigError(
                f"the run {run!r} cannot continue with {self.config.data.train}: its preferences, tokenizer, template "
                "or length limit are not those it began with. Restore them, or start a run with another --run.name"
            )

    def run(self) -> TrainOutcome:
        """Takes the remaining steps; a run that is complete already is only evaluated again."""
        options, engine = self.config.train, self.engine
        evaluation = None
        with ExitStack() as stack:
            history = stack.enter_context(self._run_logger()) if self.is_main else None
            bar = stack.enter_context(_progress_bar(engine.step, self.total_steps)) if self.is_main else None
            while engine.step < self.total_steps and not self._gave_up():
                rows = rows_of_step(
                    self.data.train.prompts_N, options.global_batch_size, options.seed, engine.step, options.epochs
                )
                started = time.perf_counter()
                metrics = engine.train_step(self.data.train, rows)
                if history and bar:
                    history.write("train", metrics.step, step_values(metrics, time.perf_counter() - started))
                    bar.set_description(f"training: loss {metrics.loss:.3f}, accuracy {metrics.accuracy:.2f}")
                    bar.update(1)
                evaluation = None  # that of older weights does not describe the new ones
                is_last = engine.step == self.total_steps
                saves = is_last or is_due(engine.step, options.checkpoint_every)
                validates = is_last or is_due(engine.step, options.validate_every)
                if self.data.validation is not None and (validates or (saves and self.config.run.keep == "best")):
                    evaluation = engine.evaluate(self.data.validation)
                    self.progress = self.progress.after(evaluation.log_loss.mean, engine.step)
                    if history:
                        history.write("validation", engine.step, evaluation_values(evaluation))
                if saves or self._gave_up():
                    raise_on_all_ranks(lambda: history.save() if history else None)
                    self._checkpoint(evaluation, is_last=is_last or self._gave_up())
        if evaluation is None and self.data.validation is not None:
            evaluation = engine.evaluate(self.data.validation)
        return TrainOutcome(steps=engine.step, checkpoint=self.newest, evaluation=evaluation, progress=self.progress)

    def _run_logger(self) -> RunLogger:
        run = self.config.run
        directory = HistoryDirectory(*resolve_run(run.storage_path, run.name))
        return RunLogger(directory, self.engine.step, run.name, run.wandb_project, self.config.model_dump(mode="json"))

    def _gave_up(self) -> bool:
        patience = self.config.train.early_stopping_patience
        return 0 < patience <= self.progress.without_better

    def _checkpoint(self, evaluation: Evaluation | None, is_last: bool) -> None:
        """Saves a checkpoint and reports it to Ray Train, which keeps it only when all of it has arrived."""
        step, name = self.engine.step, self.config.run.name
        reference = self._reference(evaluation, is_last)
        card = CriticCard(
            version=f"{name}@{step}",
            encoder=EncoderCard(fingerprint=self.data.encoder.fingerprint, max_length=self.data.encoder.max_length),
            reward_mean=reference.mean if reference else None,
            reward_std=reference.std if reference else None,
            reward_reference=reference.what if reference else None,
            training={
                "step": step,
                "total_steps": self.total_steps,
                "options": self.config.model_dump(mode="json"),
                "train_data": {
                    "fingerprint": self.data.train.fingerprint,
                    "reports": {source: asdict(report) for source, report in self.data.train.reports.items()},
                },
                "evaluation": evaluation.to_dict() if evaluation else None,
                "progress": asdict(self.progress),
            },
        )
        name_of_save = _same_on_all_ranks(lambda: f"rlhf-critic-{uuid.uuid4().hex}")
        # One directory per node, even where nodes share a disk: one node would remove what another still uploads.
        directory = Path(tempfile.gettempdir()) / f"{name_of_save}-{self.context.get_node_rank()}"
        stored = checkpoint_name(step)
        while stored in self.listed:  # that one is damaged
            stored += REWRITTEN_SUFFIX
        self.listed.add(stored)
        run = resolve_run(self.config.run.storage_path, name)
        try:
            if self.is_main:  # before the others, who wait for this rank in `save`
                remove_leftover(*run, stored)
            self.engine.save(directory, self.data.encoder, card)
            checkpoint = None
            nodes = _number_of_nodes(self.context.get_node_rank())
            if self.is_first_of_node:
                write_manifest(directory, self.context.get_node_rank(), nodes)
                checkpoint = Checkpoint.from_directory(str(directory))
            # Without this check Ray Train would retry from the checkpoint before, and meet a full disk again.
            raise_on_all_ranks(
                lambda: check_free_space(*run, nodes * size_of(directory)) if self.is_first_of_node else None
            )
            metrics = {"step": step, **({SCORE: evaluation.log_loss.mean} if evaluation else {})}
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=stored)
            self.newest = stored
        finally:
            if self.is_first_of_node:
                shutil.rmtree(directory, ignore_errors=True)

    def _reference(self, evaluation: Evaluation | None, is_last: bool) -> Reference | None:
        """Measures rewards on the reference preferences, if they are due at this checkpoint."""
        if self.config.train.reference == "validation":
            if evaluation is None or self.data.validation is None:
                return None
            what = f"{', '.join(self.data.validation.reports)} ({len(self.data.validation)} validation preferences)"
            return Reference(evaluation.reward_mean, evaluation.reward_std, what)
        if not is_last:
            return None
        train = self.data.train
        sampled = np.random.default_rng(self.config.train.seed).permutation(len(train))[:MAX_REFERENCES]
        rewards_R = self.engine.rewards(train.select(np.sort(sampled)).responses()).astype(np.float64)
        what = f"{', '.join(train.reports)} ({len(sampled)} training preferences)"
        return Reference(float(rewards_R.mean()), float(rewards_R.std()), what)


def stored_checkpoints(filesystem: pafs.FileSystem, run_path: str) -> list[tuple[str, Checkpoint]]:
    """Lists the names and checkpoints of a run as rank 0 sees them, the newest first. Collective.

    Ray downloads a remote checkpoint once a node for each `Checkpoint` object. All ranks get rank 0's objects, so those
    of a node share one download.
    """
    return _same_on_all_ranks(
        lambda: [
            (name, Checkpoint(f"{run_path}/{name}", filesystem)) for name in checkpoint_names(filesystem, run_path)
        ]
    )


def step_values(metrics: StepMetrics, seconds: float) -> dict[str, float]:
    """Returns the numbers of an optimizer step that the history records."""
    values = {name: value for name, value in asdict(metrics).items() if name != "step"}
    return {**values, "tokens_per_second": metrics.tokens / seconds}


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    """Returns the numbers of a validation that the history records."""
    return {
        name: estimate["mean"]
        for name, estimate in evaluation.to_dict().items()
        if isinstance(estimate, dict) and "mean" in estimate
    }


@contextmanager
def _progress_bar(step: int, total: int) -> Iterator[Any]:
    bar = tqdm_ray.tqdm(desc="training", total=total, unit="step")
    bar.update(step)
    with closing(bar):
        yield bar


def _number_of_nodes(node_rank: int) -> int:
    """Returns the number of nodes of all ranks, which may be spread unevenly. Collective."""
    node_ranks = [0] * dist.get_world_size()
    dist.all_gather_object(node_ranks, node_rank)
    return len(set(node_ranks))


def _same_on_all_ranks(make: Callable[[], T]) -> T:
    """Returns what ``make`` returns on rank 0. Collective."""
    shared = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    return cast(T, shared[0])
