"""Train loop of one Ray Train worker: builds its shard of the critic, steps, validates, saves checkpoints, reports.

Every decision of training is in `rlhf_critic.training.critic_engine` and `rlhf_critic.batching.planner`. This module
connects them to Ray Train. Knows nothing about command lines.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from functools import partial
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

from actors.runtime.failures import is_loss
from actors.runtime.run_logger import RunLogger, validate_wandb
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
from rlhf_critic.batching.sampler import DataOrder, is_due
from rlhf_critic.checkpoint.critic_directory import CARD_NAME, CriticCard, EncoderCard, read_card
from rlhf_critic.checkpoint.posterior_file import save_posterior
from rlhf_critic.checkpoint.reward_model import ignored_end_at_start
from rlhf_critic.config.base import validate_same_options
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.data.training_data import load_data, total_steps
from rlhf_critic.errors import CheckpointError, ConfigError, DataError, describe_error
from rlhf_critic.evaluation.pointwise import PointwiseEvaluation
from rlhf_critic.evaluation.preferences import Evaluation
from rlhf_critic.files import verify_manifest, write_manifest
from rlhf_critic.logs import configure_logging, quiet_root_handlers
from rlhf_critic.model.device import configure_device
from rlhf_critic.model.factory import DTYPE_OF, HEAD_NAME
from rlhf_critic.model.weights import WeightReader
from rlhf_critic.training.critic_engine import CriticEngine, PreparedPreferences
from rlhf_critic.training.posterior_fit import MIN_VALIDATION
from rlhf_critic.training.process_group import init_distributed, patient_group, raise_on_all_ranks

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_REFERENCES = 1000  # training preferences whose rewards are measured for their mean
# Options that a resumed run may change, because they do not decide the weights: paths, speed, and how often something
# is saved. Data and encoding are compared by fingerprint instead.
FREE_OPTIONS = (
    *("data.", "encoding.", "run.", "resume", "seeds", "dry_run", "model.path", "model.prefix_tree"),
    *("train.token_budget", "train.gradient_checkpointing", "train.offload_optimizer", "train.offload_parameters"),
    *(
        "train.validate_every",
        "train.checkpoint_every",
        "train.early_stopping_patience",
        "train.reference",
        "train.uncertainty",
    ),
)


def train_loop(loop_config: dict[str, Any]) -> TrainOutcome:
    """Runs on every Ray Train worker; ``torch.distributed`` is initialised by Ray Train.

    Args:
        loop_config: A `TrainJobConfig` as plain values.

    Raises:
        CriticError: The run cannot continue, and another attempt would fail as well.
    """
    configure_logging()
    quiet_root_handlers()
    config = TrainJobConfig.model_validate(loop_config).resolved()
    if config.run.use_gpu:
        # NCCL's collectives use the current device, which is the first one unless it is set.
        torch.cuda.set_device(ray.train.torch.get_device())
        configure_device(torch.device("cuda"), DTYPE_OF[config.model.dtype], config.run.deterministic)
    else:
        torch.set_num_threads(config.run.cpus_per_worker)
    try:
        init_distributed("nccl" if config.run.use_gpu else "gloo")
        return _TrainingRun(config).run()
    except Exception as error:
        if is_loss(error):
            raise
        # Whatever a library raised, it can be pickled now, and brings its traceback along.
        raise describe_error(error) from None


class _TrainingRun:
    """One attempt at a run: from the start, or from the last complete checkpoint."""

    def __init__(self, config: TrainJobConfig) -> None:
        self.config = config
        self.context = ray.train.get_context()
        self.is_main = self.context.get_world_rank() == 0
        self.is_first_of_node = self.context.get_local_rank() == 0
        raise_on_all_ranks(lambda: validate_wandb(config.run.wandb_project) if self.is_main else None)
        self._on_each_node(lambda: remove_unfinished_saves(config.run.storage_path, config.run.name))
        # One rank of a node encodes what is not cached yet; then all map its files.
        # The others wait, which may take hours.
        waiting = patient_group()
        self._on_each_node(lambda: load_data(config, _ignored_end_id(config)), waiting)
        self.data = raise_on_all_ranks(lambda: load_data(config, _ignored_end_id(config)), waiting)
        dist.destroy_process_group(waiting)
        self.order = DataOrder(self.data.train.prompts_N, config.train.seed)
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
                    self._on_each_node(partial(verify_manifest, directory))
                except CheckpointError as error:
                    # One that is not listed belongs to an attempt that was lost while it saved.
                    damage = damage or (error if name in self.listed else None)
                    self._log("damaged checkpoint=%s, trying an earlier one: %s", name, error, level=logging.WARNING)
                    continue
                self._on_each_node(partial(self._validate_same_run, directory))
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

    def _on_each_node(self, action: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
        raise_on_all_ranks(lambda: action() if self.is_first_of_node else None, group)

    def _validate_same_run(self, directory: str) -> None:
        trained, run = read_card(directory).training, self.config.run.name
        validate_same_options(run, TrainJobConfig.model_validate(trained["options"]), self.config, FREE_OPTIONS)
        if trained["train_data"]["fingerprint"] != self.data.train.fingerprint:
            raise ConfigError(
                f"the run {run!r} cannot continue with {self.config.data.train}: its preferences, tokenizer, template, "
                "length limit or special tokens in texts are not those it began with. Restore them (a run that began "
                "before --encoding.special-tokens-in-text needs the value token), or start a run with another "
                "--run.name"
            )

    def run(self) -> TrainOutcome:
        """Takes the remaining steps; a run that is complete already is only evaluated again."""
        options, engine = self.config.train, self.engine
        evaluation = None
        with ExitStack() as stack:
            history = stack.enter_context(self._run_logger()) if self.is_main else None
            bar = tqdm_ray.tqdm(desc="training", total=self.total_steps, unit="step") if self.is_main else None
            if bar:
                bar.update(engine.step)
                stack.enter_context(closing(bar))
            # Prepares a step while the device computes the one before it.
            thread = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare"))
            following: Future[PreparedPreferences] | None = None
            while engine.step < self.total_steps and not self._gave_up():
                started = time.perf_counter()
                # The first step of all is prepared here, because that may measure a token budget on all ranks.
                prepared = following.result() if following else self._prepare(engine.step)
                is_next = engine.step + 1 < self.total_steps
                following = thread.submit(self._prepare, engine.step + 1) if is_next else None
                metrics = engine.take_step(prepared)
                if history and bar:
                    values = {**asdict(metrics), "tokens_per_second": metrics.tokens / (time.perf_counter() - started)}
                    step = values.pop("step")
                    history.write("train", step, {name: value for name, value in values.items() if value is not None})
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

    def _prepare(self, step: int) -> PreparedPreferences:
        options = self.config.train
        return self.engine.prepare(
            self.data.train, self.order.rows_of_step(options.global_batch_size, step, options.epochs)
        )

    def _run_logger(self) -> RunLogger:
        run = self.config.run
        directory = HistoryDirectory(*resolve_run(run.storage_path, run.name))
        return RunLogger(directory, self.engine.step, run.name, run.wandb_project, self.config.model_dump(mode="json"))

    def _gave_up(self) -> bool:
        patience = self.config.train.early_stopping_patience
        return 0 < patience <= self.progress.without_better

    def _checkpoint(self, evaluation: Evaluation | PointwiseEvaluation | None, is_last: bool) -> None:
        """Saves a checkpoint and reports it to Ray Train, which keeps it only when all of it has arrived."""
        step, name, node = self.engine.step, self.config.run.name, self.context.get_node_rank()
        card = CriticCard(
            version=f"{name}@{step}",
            encoder=EncoderCard.of(self.data.encoder),
            **self._reference(evaluation, is_last),
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
        prefix = prefix_of_saves(self.config.run.storage_path, name)
        name_of_save = _same_on_all_ranks(lambda: f"{prefix}{uuid.uuid4().hex}")
        # One directory per node, even where nodes share a disk: one node would remove what another still uploads.
        directory = Path(tempfile.gettempdir()) / f"{name_of_save}-{node}"
        stored = checkpoint_name(step)
        while stored in self.listed:  # that one is damaged
            stored += REWRITTEN_SUFFIX
        self.listed.add(stored)
        run = resolve_run(self.config.run.storage_path, name)
        try:
            if self.is_main:  # before the others, who wait for this rank in `save`
                remove_leftover(*run, stored)
            self.engine.save(directory, self.data.encoder, card)
            if is_last:
                self._fit_posterior(directory)
            checkpoint, node_of_rank = None, [0] * dist.get_world_size()
            dist.all_gather_object(node_of_rank, node)
            nodes = len(set(node_of_rank))
            if self.is_first_of_node:
                write_manifest(directory, node, nodes)
                checkpoint = Checkpoint.from_directory(str(directory))
            # Without this check Ray Train would retry from the checkpoint before, and meet a full disk again.
            self._on_each_node(lambda: check_free_space(*run, nodes * size_of(directory)))
            metrics = {"step": step, **({SCORE: evaluation.log_loss.mean} if evaluation else {})}
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=stored)
            self.newest = stored
        finally:
            if self.is_first_of_node:
                shutil.rmtree(directory, ignore_errors=True)

    def _fit_posterior(self, directory: Path) -> None:
        """Fits the posterior of the saved head and saves it beside the weights, if there is data to validate on."""
        if not self.config.train.uncertainty or self.data.validation is None:
            return
        train, validation = self.data.train.pairs_alone(), self.data.validation.pairs_alone()
        if not len(train) or len(validation) < MIN_VALIDATION:
            return
        started = time.perf_counter()
        try:
            posterior, report = self.engine.fit_posterior(train, validation)
        except (DataError, ConfigError) as error:  # of all ranks: states and memory are those of all ranks together
            self._log("posterior: not fitted: %s", error)
            return
        self._log("posterior: seconds=%.1f %s", time.perf_counter() - started, report)
        if not report.shows_uncertainty:
            self._log("posterior: not saved, because deviations would be near 0: calibrate with more validation data")
            return
        if self.is_main:
            save_posterior(directory, posterior, WeightReader(str(directory)).read(HEAD_NAME), report.to_dict())

    def _reference(self, evaluation: Evaluation | PointwiseEvaluation | None, is_last: bool) -> dict[str, Any]:
        """Measures rewards on the reference preferences, if they are due at this checkpoint, for the card."""
        train, validation = self.data.train, self.data.validation
        if self.config.train.reference == "validation":
            if evaluation is None or validation is None:
                return {}
            what = f"{', '.join(validation.reports)} ({len(validation)} validation preferences)"
            mean, std = evaluation.reward_mean, evaluation.reward_std
            return {"reward_mean": mean, "reward_std": std, "reward_reference": what}
        if not is_last:
            return {}
        sampled = np.random.default_rng(self.config.train.seed).permutation(len(train))[:MAX_REFERENCES]
        rewards_R = self.engine.rewards(train.select(np.sort(sampled)).responses()).astype(np.float64)
        what = f"{', '.join(train.reports)} ({len(sampled)} training preferences)"
        mean, std = float(rewards_R.mean()), float(rewards_R.std())
        return {"reward_mean": mean, "reward_std": std, "reward_reference": what}


def prefix_of_saves(storage_path: str, name: str) -> str:
    """Returns how the names of a run's temporary directories begin, which hold checkpoints until they are stored."""
    return f"rlhf-critic-{hashlib.sha256(f'{storage_path}/{name}'.encode()).hexdigest()[:16]}-"


def remove_unfinished_saves(storage_path: str, name: str) -> None:
    """Removes temporary directories that killed workers of a run left on this node. Call it before the first save."""
    for left in Path(tempfile.gettempdir()).glob(f"{prefix_of_saves(storage_path, name)}*"):
        shutil.rmtree(left, ignore_errors=True)
        logger.warning("removed what a killed worker left path=%s", left)


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


def evaluation_values(evaluation: Evaluation | PointwiseEvaluation) -> dict[str, float]:
    """Returns the numbers of a validation that the history records."""

    def means(values: dict[str, Any], prefix: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, dict):
                found |= {prefix + name: value["mean"]} if "mean" in value else means(value, f"{prefix}{name}_")
        return found

    return means(evaluation.to_dict(), "")


def _ignored_end_id(config: TrainJobConfig) -> int | None:
    """Returns the token that the run ignores at the end of texts, as its checkpoints do, or the model at its start."""
    filesystem, path = resolve_run(config.run.storage_path, config.run.name)
    for name in checkpoint_names(filesystem, path):
        with (
            suppress(OSError, ValueError, LookupError, TypeError),
            filesystem.open_input_stream(f"{path}/{name}/{CARD_NAME}") as file,
        ):
            ignored: int | None = json.loads(file.read())["encoder"].get("ignored_end_id")
            return ignored
    return ignored_end_at_start(config.model.path)


def _same_on_all_ranks(make: Callable[[], T]) -> T:
    """Returns what ``make`` returns on rank 0. Collective."""
    shared = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    return cast(T, shared[0])
