"""One attempt at a PPO run: from the start or its last checkpoint, until its end or the loss of a group.

Connects rollout workers, scorers, the critic group and the policy group. The computations are in
`rlhf_critic.algorithms.advantages` and in the groups. Every random number comes from the seed and the iteration, so a
resumed run gives the results of an undisturbed one. Knows nothing about command lines or how scorers are started.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from actors.ppo.checkpoint import (
    CHECKPOINT_PATTERN,
    CRITIC_FOLDER,
    POLICY_FOLDER,
    PPO_STATE_NAME,
    RunState,
    checkpoints,
    latest_checkpoint,
    read_state,
    reference_digest,
)
from actors.ppo.concurrency import run_concurrently, timed
from actors.ppo.critic_group import CriticGroup
from actors.ppo.evaluation import (
    Sample,
    component_means,
    evaluation_values,
    non_finite_loss_as_divergence,
    read_samples,
    stop_if_diverged,
    write_samples,
)
from actors.ppo.experience import (
    CRITIC_METRICS,
    POLICY_METRICS,
    Experience,
    batch_of,
    means,
    minibatches_of,
    share_sequences,
)
from actors.ppo.group_options import critic_options, policy_options
from actors.ppo.policy_group import PolicyGroup, PolicyWeights
from actors.ppo.rollout_workers import Rollout, RolloutTask, RolloutWorkers, Timings, score_again
from actors.runtime.run_logger import RunLogger
from actors.runtime.storage import HISTORY_FOLDER, HistoryDirectory, resolve_run
from rlhf_critic.algorithms.advantages import compute_advantages
from rlhf_critic.algorithms.ppo import RunningMoments
from rlhf_critic.batching.sampler import DataOrder, is_due
from rlhf_critic.config.ppo import CriticConfig, PolicyConfig, PPOJobConfig
from rlhf_critic.data.prompts import Prompts
from rlhf_critic.errors import CheckpointError, DivergedError, RankLost
from rlhf_critic.files import atomic_directory, write_manifest
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.training.metrics_log import read_metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The first number of each seed: what the random numbers are for.
TRAINING_DRAWS, EVALUATION_DRAWS = 1, 2  # `actors.ppo.experience.MINIBATCHES` is 3


@dataclass(frozen=True)
class PPOOutcome:
    """Result of a run.

    Attributes:
        directory: Directory of the run.
        checkpoint: Its last checkpoint.
        first: Responses to held-out prompts before the first iteration; empty if there are no such prompts.
        last: Responses to the same prompts after the last iteration.
    """

    directory: Path
    checkpoint: Path
    first: list[Sample]
    last: list[Sample]


class PPOTrainer:
    """One attempt at a run; a context manager that ends all its actors.

    Args:
        config: Options, with absolute paths.
        prompts: Prompts to train on.
        held_out: Prompts to evaluate on; None evaluates nothing.
        client: Client of the scorers.

    Raises:
        CriticError: An actor cannot be built or placed, or the parts do not fit together; nothing is left running.
    """

    def __init__(self, config: PPOJobConfig, prompts: Prompts, held_out: Prompts | None, client: ScorerClient) -> None:
        self.config = config
        self.directory = Path(config.run.storage_path) / config.run.name
        self._prompts = prompts
        self._order = DataOrder(np.arange(len(prompts)), config.ppo.seed)
        self._held_out = held_out
        self._client = client
        self._iteration = 0
        self._moments = RunningMoments()
        self._weights: PolicyWeights | None = None
        self._model_versions: set[str] = set()
        self._is_whole = True  # policy and critic are those after the last complete iteration
        checkpoint = latest_checkpoint(self.directory)
        state = None if checkpoint is None else read_state(checkpoint, config, prompts)
        self._reference = reference_digest(config.policy.model.path) if state is None else state.reference
        run, rollout, policy = config.run, config.rollout, policy_options(config)

        def placement(part: PolicyConfig | CriticConfig) -> dict[str, Any]:
            common = {"use_gpu": run.use_gpu, "start_timeout_s": run.start_timeout_s}
            return {"shards": part.shards, "cpus_per_shard": part.cpus_per_shard, **common}

        workers = (rollout.workers, policy, client, rollout.max_new_tokens)
        with ExitStack() as actors:  # if one cannot be started, the others end
            self._policy, self._critic, self._workers = run_concurrently(
                lambda: actors.enter_context(PolicyGroup(policy, **placement(config.policy))),
                lambda: actors.enter_context(CriticGroup(critic_options(config), **placement(config.critic))),
                lambda: actors.enter_context(
                    RolloutWorkers(
                        *workers,
                        patience_s=config.reward.patience_s,
                        cpus_per_worker=rollout.cpus_per_worker,
                        use_gpu=run.use_gpu,
                    )
                ),
            )
            if checkpoint is not None and state is not None:
                self._iteration, self._moments = state.iteration, state.moments
                self._policy.load(checkpoint / POLICY_FOLDER)
                self._critic.load(checkpoint / CRITIC_FOLDER)
                logger.info("resumed iteration=%d checkpoint=%s", self._iteration, checkpoint.name)
            self._actors = actors.pop_all()

    def __enter__(self) -> PPOTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._actors.close()

    def run(self) -> PPOOutcome:
        """Runs the remaining iterations.

        A checkpoint comes before the evaluation after the same iteration. An error that leaves policy and critic whole,
        such as that of a scorer, is raised after the last complete iteration was saved.

        Raises:
            RankLost: A rank of the critic or policy was lost; another attempt resumes from the last checkpoint.
            DivergedError: The policy is too far from its reference, or a number became NaN.
            CriticError: Rollouts or rewards did not come in time, or the history could not be written.
        """
        total = self.config.ppo.iterations
        with (
            self._run_logger() as history,
            tqdm(desc="iterations", total=total, initial=self._iteration, disable=None) as bar,
        ):
            try:
                self._run_iterations(history, bar)
            except (RankLost, DivergedError):
                raise
            except Exception as error:
                self._save_whole_iteration(history, error)
                raise
        first, last = (read_samples(self.directory, one) if self._held_out else [] for one in (0, total))
        return PPOOutcome(self.directory, checkpoints(self.directory)[-1], first, last)

    def _run_iterations(self, history: RunLogger, bar: tqdm) -> None:
        run, total = self.config.run, self.config.ppo.iterations
        evaluated = {
            row["step"] for row in read_metrics(self.directory / HISTORY_FOLDER) if row["kind"] == "validation"
        }
        while True:
            is_due_now = self._iteration in {0, total} or is_due(self._iteration, run.evaluate_every)
            if is_due_now and self._iteration not in evaluated:  # a job that resumes may have ended before it
                self._evaluate(history)
            if self._iteration >= total:
                history.save()
                return
            metrics = self._iterate()
            history.write("train", self._iteration, metrics)
            stop_if_diverged(metrics, self._iteration, self.config.ppo.max_kl)
            bar.update(1)
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics['kl']:.2f}")
            if self._iteration == total or is_due(self._iteration, run.checkpoint_every):
                history.save()
                self._checkpoint()

    def _save_whole_iteration(self, history: RunLogger, error: Exception) -> None:
        """Saves policy and critic before the job ends with an error, if they are whole and not saved yet."""
        is_saved = (self.directory / CHECKPOINT_PATTERN.format(self._iteration)).exists()
        if not self._is_whole or is_saved or self._iteration == 0:
            return
        logger.warning("saving before the job ends, to continue with --resume iteration=%d", self._iteration)
        try:
            self._critic.onload()
            with suppress(CheckpointError):  # the lines are in the local file
                history.save()
            self._checkpoint()
        except Exception:
            logger.exception("could not save before the end error=%s", error)

    def _run_logger(self) -> RunLogger:
        run = self.config.run
        directory = HistoryDirectory(
            *resolve_run(run.history_uri or run.storage_path, run.name),
            local=self.directory / HISTORY_FOLDER if run.history_uri else None,
        )
        # An attempt without a checkpoint writes everything again, its first evaluation (step 0) too.
        step = self._iteration or -1
        return RunLogger(directory, step, run.name, run.wandb_project, self.config.model_dump(mode="json"))

    def _iterate(self) -> dict[str, float]:
        """Runs one iteration: rollouts, values, updates. Returns its metrics."""
        ppo, size = self.config.ppo, self.config.rollout.prompts_per_iteration
        started = time.perf_counter()
        prompt_rows = self._order.rows_of_step(size, self._iteration)
        rows = [int(row) for row in prompt_rows for _ in range(self.config.rollout.samples_per_prompt)]
        rollouts, timings = self._roll_out(self._prompts, rows, (TRAINING_DRAWS, self._iteration))
        seconds_rollouts = time.perf_counter() - started
        sequences = share_sequences(rollouts)
        prompt_lengths = [len(rollout.prompt_ids) for rollout in rollouts]
        (values, seconds_values), (ref_log_probs, seconds_reference) = self._run_groups(
            lambda: timed(self._critic.values, sequences),
            lambda: timed(self._policy.reference_log_probs, sequences, prompt_lengths),
        )
        batch = batch_of(rollouts, values, ref_log_probs)
        is_warmup = self._iteration < ppo.value_warmup_iterations
        targets = compute_advantages(batch, ppo, self.config.reward, self._moments, is_warmup=is_warmup)
        experience = Experience(sequences, batch, targets, ppo)
        of_critic, of_policy = minibatches_of(rows, ppo, self._iteration)
        self._is_whole = False
        (critic_updates, seconds_critic), (policy_updates, seconds_policy) = self._run_groups(
            lambda: timed(self._update, "critic", lambda: experience.update_critic(self._critic, of_critic)),
            lambda: timed(self._update, "policy", lambda: experience.update_policy(self._policy, of_policy)),
        )
        if policy_updates:
            self._weights = None
        self._moments = targets.moments
        self._iteration += 1
        self._is_whole = True
        seconds = time.perf_counter() - started
        tokens = sum(sequences.lengths)
        return {
            **targets.metrics,
            **component_means(rollouts),
            **means("value", critic_updates, CRITIC_METRICS),
            **means("policy", policy_updates, POLICY_METRICS),
            "rollouts": len(rollouts),
            "prompt_truncated_for_reward": float(np.mean([one.prompt_truncated_for_reward for one in rollouts])),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "value_tokens_computed": self._critic.computed_tokens,
            "seconds": seconds,
            "seconds_rollouts": seconds_rollouts,
            "seconds_generating": timings.generating,
            "seconds_waiting_for_rewards": timings.waiting,
            "seconds_values": seconds_values,
            "seconds_reference": seconds_reference,
            "seconds_update_critic": seconds_critic,
            "seconds_update_policy": seconds_policy,
        }

    def _run_groups(self, *actions: Callable[[], Any]) -> tuple[Any, ...]:
        """Runs actions of policy and critic. If one group is lost, the other ends in the middle of its work."""

        def end_both(error: BaseException) -> None:
            if isinstance(error, RankLost | DivergedError):
                self._policy.shutdown()
                self._critic.shutdown()

        return run_concurrently(*actions, on_failure=end_both)

    def _update(self, who: Literal["critic", "policy"], update: Callable[[], T]) -> T:
        with non_finite_loss_as_divergence(who, self._iteration + 1):
            return update()

    def _roll_out(self, prompts: Prompts, rows: Sequence[int], seeds: tuple[int, ...]) -> tuple[list[Rollout], Timings]:
        """Makes a rollout for each of these rows of prompts, scored by one version unless versions may be mixed.

        Meanwhile the critic is offloaded, if ``critic.offload`` is set.
        """
        options = self.config
        size = options.rollout.prompts_per_task * options.rollout.samples_per_prompt
        tasks = []
        for number, start in enumerate(range(0, len(rows), size)):
            part = rows[start : start + size]
            seed = np.random.SeedSequence([options.ppo.seed, *seeds, number]).generate_state(1)
            of_rows = tuple(prompts.prompts[row] for row in part), tuple(prompts.ids[row] for row in part)
            tasks.append(RolloutTask(tuple(part), *of_rows, int(seed[0])))
        if self._weights is None:
            self._weights = self._policy.weights()
        if options.critic.offload:
            self._critic.offload()
        with tqdm(desc="rollouts", total=len(rows), leave=False, disable=None) as bar:
            timeout_s = options.rollout.timeout_s + options.reward.patience_s
            rollouts, timings = self._workers.run(tasks, self._weights, timeout_s, bar.update)
        versions = {rollout.model_version for rollout in rollouts}
        if len(versions) > 1 and not options.reward.allow_mixed_versions:
            rollouts = score_again(rollouts, self._client, options.reward.patience_s)
            versions = {rollout.model_version for rollout in rollouts}
        if versions != self._model_versions:
            logger.info("reward model iteration=%d versions=%s", self._iteration + 1, ",".join(sorted(versions)))
            self._model_versions = versions
        if options.critic.offload:
            self._critic.onload()
        return rollouts, timings

    def _evaluate(self, history: RunLogger) -> None:
        """Samples a response to every held-out prompt, always with the same seeds, and saves them."""
        if self._held_out is None:
            return
        rollouts, _ = self._roll_out(self._held_out, range(len(self._held_out)), (EVALUATION_DRAWS,))
        write_samples(self.directory, self._iteration, rollouts)
        history.write("validation", self._iteration, evaluation_values(rollouts))

    def _checkpoint(self) -> None:
        """Writes policy, critic and state atomically, then removes checkpoints that are not kept."""
        state = RunState(
            iteration=self._iteration,
            moments=self._moments,
            options=self.config.model_dump(mode="json"),
            prompts=self._prompts.fingerprint,
            reference=self._reference,
        )
        path = self.directory / CHECKPOINT_PATTERN.format(self._iteration)
        self._is_whole = False  # a group that cannot write has ended
        with atomic_directory(path) as building:
            self._run_groups(
                lambda: self._policy.save(building / POLICY_FOLDER),
                lambda: self._critic.save(building / CRITIC_FOLDER, name=self.config.run.name),
            )
            (building / PPO_STATE_NAME).write_text(state.model_dump_json(indent=2), encoding="utf-8")
            write_manifest(building, 0, 1, PPO_STATE_NAME)
        self._is_whole = True
        for old in checkpoints(self.directory)[: -self.config.run.keep_checkpoints]:
            shutil.rmtree(old)
