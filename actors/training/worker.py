"""The loop of one Ray Train worker: builds its shard of the critic, steps, validates, checkpoints, reports.

Every decision of training is in `rlhf_critic.training.critic_engine` and `rlhf_critic.batching.planner`; this module joins them to Ray Train.
Knows nothing of command lines.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.experimental import tqdm_ray
from ray.train import Checkpoint

from actors.runtime.storage import (
    REWRITTEN_SUFFIX,
    check_free_space,
    checkpoint_name,
    checkpoint_names,
    remove_leftover,
    resolve_run,
    size_of,
)
from actors.training.result import SCORE, TrainOutcome, ValidationProgress
from actors.training.run_logger import RunLogger
from rlhf_critic.batching.sampler import rows_of_step, steps_in
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard, read_card
from rlhf_critic.config.train import TrainConfig, TrainJobConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_dataset import (
    EncodedPreferences,
    concatenate,
    count_leaked,
    split_by_prompt,
    weigh_sources,
)
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import CheckpointError, ConfigError, CriticError
from rlhf_critic.evaluation.preferences import Evaluation
from rlhf_critic.files import verify_manifest, write_manifest
from rlhf_critic.model.weights import WeightReader
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.process_group import init_distributed, raise_on_all_ranks

T = TypeVar("T")

MOST_REFERENCES = 1000  # training preferences whose rewards are measured for their mean


@dataclass(frozen=True)
class Reference:
    """Mean and standard deviation of rewards, and of which texts."""

    mean: float
    std: float
    what: str


@dataclass(frozen=True)
class TrainingData:
    """What a run reads."""

    encoder: Encoder
    train: EncodedPreferences
    validation: EncodedPreferences | None

    def __str__(self) -> str:
        """What was read, and what of the validation data is also trained on."""
        if self.validation is None:
            return str(self.train)
        leaked = count_leaked(self.train, self.validation)
        if self.validation.reports == self.train.reports and not leaked:
            return f"{self.train}\nheld out for validation: {len(self.validation)}, training on {len(self.train)}"
        warning = f"\nwarning: {leaked} of {len(self.validation)} validation prompts are trained on" if leaked else ""
        return f"{self.train}\n{self.validation}{warning}"


def train_loop(loop_config: dict[str, Any]) -> TrainOutcome:
    """Runs on every Ray Train worker; ``torch.distributed`` is initialised by Ray Train.

    Args:
        loop_config: A `TrainJobConfig` as plain values.
    """
    config = TrainJobConfig.model_validate(loop_config)
    if config.run.use_gpu:
        # Not yet run on a GPU. NCCL's collectives use the current device, which is the first one unless it is set.
        torch.cuda.set_device(ray.train.torch.get_device())
    else:
        torch.set_num_threads(config.run.cpus_per_worker)
    init_distributed("nccl" if config.run.use_gpu else "gloo")
    try:
        return _TrainingRun(config).run()
    except CriticError as error:
        return TrainOutcome(error=error)


class _TrainingRun:
    """One attempt at a run: from the start, or from the last checkpoint Ray Train knows."""

    def __init__(self, config: TrainJobConfig) -> None:
        self.config = config
        self.context = ray.train.get_context()
        self.is_main = self.context.get_world_rank() == 0
        self.is_first_of_node = self.context.get_local_rank() == 0
        # One rank of a node encodes what is not cached yet; then all map what it wrote.
        raise_on_all_ranks(lambda: load_data(config) if self.is_first_of_node else None)
        self.data = raise_on_all_ranks(lambda: load_data(config))
        self.total_steps = total_steps(len(self.data.train), config.train)
        # Every rank opens every file, so that one missing on a single node does not leave the others in a collective.
        raise_on_all_ranks(lambda: WeightReader(config.model.path))
        self._say(str(self.data))
        self.engine = CriticEngine.from_pretrained(self.data.encoder, config.model, config.train, self.total_steps)
        self.engine.validate_preferences(self.data.train)
        self.progress = ValidationProgress()
        # Names that Ray Train has in its list, and will remove when their time has come.
        self.listed = {Path(one.checkpoint.path).name for one in ray.train.get_all_reported_checkpoints()}
        self.newest = ""  # checkpoint of this run
        self._resume()

    def _resume(self) -> None:
        """Goes on from the newest checkpoint that is whole, whether or not Ray Train has heard of it.

        Raises:
            CheckpointError: Ray Train has heard of checkpoints, and none is whole.
            ConfigError: The run began with other options or data.
        """
        damage: CheckpointError | None = None
        not_whole = 0
        filesystem, run_path = resolve_run(self.config.run.storage_path, self.config.run.name)
        for name in _same_on_all_ranks(lambda: checkpoint_names(filesystem, run_path)):
            with Checkpoint(f"{run_path}/{name}", filesystem).as_directory() as directory:
                try:
                    self._check_on_each_node(verify_manifest, directory)
                except CheckpointError as error:
                    # Any other is what an attempt left that was lost while it saved.
                    damage = damage or (error if name in self.listed else None)
                    not_whole += 1
                    self._say(f"warning: {error}. Is there an earlier one?")
                    continue
                self._check_on_each_node(self._require_same_run, directory)
                self.engine.load(directory)
                self.newest = name
                self.progress = ValidationProgress(**read_card(directory).training.get("progress", {}))
                break
        if not self.newest and damage:
            raise damage
        if not_whole:
            self._say(f"going on from {self.newest or 'the start'}")

    def _say(self, text: str) -> None:
        if self.is_main:
            tqdm_ray.safe_print(text)

    def _check_on_each_node(self, check: Callable[[str], None], directory: str) -> None:
        raise_on_all_ranks(lambda: check(directory) if self.is_first_of_node else None)

    def _require_same_run(self, directory: str) -> None:
        trained = read_card(directory).training
        changed = changed_options(TrainJobConfig.model_validate(trained["options"]), self.config)
        if changed:
            raise ConfigError(
                f"the run {self.config.run.name!r} cannot continue with other options: {'; '.join(changed)}. Restore "
                "them, or start a run with another --run.name"
            )
        if trained["train_data"]["fingerprint"] != self.data.train.fingerprint:
            raise ConfigError(
                f"the run {self.config.run.name!r} cannot continue with {self.config.data.train}: its preferences, "
                "tokenizer, template or length limit are not those it began with. Restore them, or start a run with "
                "another --run.name"
            )

    def run(self) -> TrainOutcome:
        """Steps to the end; a run that is complete already is only evaluated again."""
        options, engine = self.config.train, self.engine
        evaluation = None
        with RunLogger(self.config, engine.step, self.total_steps) if self.is_main else nullcontext() as history:
            while engine.step < self.total_steps and not self._gave_up():
                rows = rows_of_step(
                    self.data.train.prompts_N, options.global_batch_size, options.seed, engine.step, options.epochs
                )
                started = time.perf_counter()
                metrics = engine.train_step(self.data.train, rows)
                if history:
                    history.trained(metrics, time.perf_counter() - started)
                evaluation = None  # that of older weights is not theirs
                is_last = engine.step == self.total_steps
                saves = is_last or is_due(engine.step, options.checkpoint_every)
                validates = is_last or is_due(engine.step, options.validate_every)
                if self.data.validation is not None and (validates or (saves and self.config.run.keep == "best")):
                    evaluation = engine.evaluate(self.data.validation)
                    self.progress = self.progress.after(evaluation.log_loss.mean, engine.step)
                    if history:
                        history.validated(engine.step, evaluation)
                if saves or self._gave_up():
                    raise_on_all_ranks(history.save if history else _nothing)
                    self._checkpoint(evaluation, is_last=is_last or self._gave_up())
        if evaluation is None and self.data.validation is not None:
            evaluation = engine.evaluate(self.data.validation)
        return TrainOutcome(steps=engine.step, checkpoint=self.newest, evaluation=evaluation, progress=self.progress)

    def _gave_up(self) -> bool:
        patience = self.config.train.early_stopping_patience
        return 0 < patience <= self.progress.without_better

    def _checkpoint(self, evaluation: Evaluation | None, is_last: bool) -> None:
        """Saves, and hands the directory to Ray Train, which keeps it only when all of it has arrived."""
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
        # Each node's own, even where nodes share a disk: one would remove what another still hands over.
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
            # Ray Train would try again, from the checkpoint before, and meet a full disk again.
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
        """Mean and standard deviation of rewards on the reference preferences, where they are measured now."""
        if self.config.train.reference == "validation":
            if evaluation is None or self.data.validation is None:
                return None
            what = f"{', '.join(self.data.validation.reports)} ({len(self.data.validation)} validation preferences)"
            return Reference(evaluation.reward_mean, evaluation.reward_std, what)
        if not is_last:
            return None
        train = self.data.train
        drawn = np.random.default_rng(self.config.train.seed).permutation(len(train))[:MOST_REFERENCES]
        rewards_R = self.engine.rewards(train.select(np.sort(drawn)).responses()).astype(np.float64)
        what = f"{', '.join(train.reports)} ({len(drawn)} training preferences)"
        return Reference(float(rewards_R.mean()), float(rewards_R.std()), what)


def load_data(config: TrainJobConfig) -> TrainingData:
    """Reads, or maps from the cache, what a run trains and validates on.

    Raises:
        CriticError: See `rlhf_critic.data.encoding.load_tokenizer` and `rlhf_critic.data.preferences.load_preferences`.
    """
    options = config.data
    tokenizer = load_tokenizer(config.model.path, config.encoding.chat_template)
    encoder = Encoder(tokenizer, config.encoding.max_length)

    def load(sources: Sequence[str]) -> EncodedPreferences:
        return concatenate(
            [
                load_preferences(source, encoder, options.cache_dir, fields=options.fields, overlong=options.overlong)
                for source in sources
            ]
        )

    train, validation = load(options.train), load(options.validation) if options.validation else None
    if options.validation_fraction:
        train, validation = split_by_prompt(train, options.validation_fraction, options.seed)
    if options.train_weights is not None:
        train = weigh_sources(train, options.train_weights, options.seed)
    return TrainingData(encoder, train, validation)


def changed_options(before: TrainJobConfig, now: TrainJobConfig) -> list[str]:
    """What differs between two configs among the options that decide the weights, as ``section.option: old -> new``.

    Data and encoding are compared by fingerprint elsewhere. Paths may differ, and so may what only changes speed or how
    often something is kept.
    """
    free = {
        *("path", "prefix_tree", "token_budget", "gradient_checkpointing", "offload_optimizer", "offload_parameters"),
        *("validate_every", "checkpoint_every", "early_stopping_patience", "reference"),
    }
    changed = []
    for section in ("model", "train"):
        old, new = getattr(before, section).model_dump(), getattr(now, section).model_dump()
        changed += [
            f"{section}.{name}: {old[name]} -> {new[name]}"
            for name in old
            if old[name] != new[name] and name not in free
        ]
    return changed


def total_steps(num_preferences: int, options: TrainConfig) -> int:
    """Optimizer steps of a whole run.

    Raises:
        ConfigError: There would be none.
    """
    steps = steps_in(num_preferences, options.global_batch_size, options.epochs)
    if steps == 0:
        raise ConfigError(f"train.epochs is {options.epochs}: of {num_preferences} preferences that shows none")
    return min(steps, options.max_steps or steps)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def _number_of_nodes(node_rank: int) -> int:
    """How many nodes the ranks are on; they may be spread unevenly."""
    node_ranks = [0] * dist.get_world_size()
    dist.all_gather_object(node_ranks, node_rank)
    return len(set(node_ranks))


def _nothing() -> None:
    """What a rank without a history does."""


def _same_on_all_ranks(make: Callable[[], T]) -> T:
    """What ``make`` gives on rank 0."""
    shared = [make()]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
