"""One attempt at a PPO run: from the start, or from its last checkpoint, to its end or the loss of a group.

Joins rollout workers, scorers, the critic group and the policy group; what is computed is in `rlhf_critic.algorithms.advantages`
and behind the groups. Every number it draws comes from the seed and the iteration, so a run that is resumed goes on as
if nothing had been. Knows nothing of command lines or of how scorers are started.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
    latest_checkpoint,
    read_state,
    reference_digest,
    remove_old_checkpoints,
)
from actors.ppo.critic_group import CriticGroup, CriticOptions
from actors.ppo.policy_group import PolicyGroup, PolicyOptions, PolicyWeights
from actors.ppo.rollout_workers import Rollout, RolloutTask, RolloutWorkers, Timings, score_again
from actors.runtime.storage import HISTORY_FOLDER
from rlhf_critic.algorithms.advantages import PPOTargets, RolloutBatch, compute_advantages, minibatch_rows
from rlhf_critic.algorithms.ppo import RunningMoments
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.batching.sampler import rows_of_step
from rlhf_critic.config.model import EncodingConfig
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import validate_same_tokens
from rlhf_critic.data.prompts import Prompts
from rlhf_critic.errors import ConfigError, DivergedError, NonFiniteLossError
from rlhf_critic.files import atomic_directory, write_manifest, write_text_atomically
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.training.critic_engine import ValueMetrics
from rlhf_critic.training.metrics_log import MetricsLog
from rlhf_critic.training.policy_engine import PolicyMetrics

T = TypeVar("T")

SAMPLES_FOLDER = "samples"
# The first of the numbers that seed something: what it is.
TRAINING_DRAWS, EVALUATION_DRAWS, MINIBATCHES = 1, 2, 3
OF_UPDATES = ("loss", "clip_fraction", "grad_norm", "learning_rate")  # metrics of critic and policy alike


@dataclass(frozen=True)
class Sample:
    """A response to a held-out prompt."""

    prompt: Any
    response: str
    reward: float
    model_version: str
    policy_version: int


@dataclass(frozen=True)
class PPOOutcome:
    """What a run returns.

    Attributes:
        directory: The run's.
        checkpoint: The last one, in it.
        first: Responses to held-out prompts before the first iteration; empty where there are no such prompts.
        last: Responses to the same prompts after the last.
    """

    directory: Path
    checkpoint: Path
    first: list[Sample]
    last: list[Sample]


class PPOTrainer:
    """A context manager that ends all its actors.

    Args:
        config: With absolute paths.
        prompts: To train on.
        held_out: To evaluate on; None evaluates nothing.
        client: Of the scorers.

    Raises:
        CriticError: Something cannot be built or placed, or does not fit together; nothing is left running.
    """

    def __init__(self, config: PPOJobConfig, prompts: Prompts, held_out: Prompts | None, client: ScorerClient) -> None:
        self.config = config
        self.directory = Path(config.run.storage_path) / config.run.name
        self._prompts = prompts
        self._held_out = held_out
        self._client = client
        self._iteration = 0
        self._moments = RunningMoments()
        self._weights: PolicyWeights | None = None
        self._model_versions: set[str] = set()
        self._groups: list[Any] = []
        checkpoint = latest_checkpoint(self.directory)
        state = None if checkpoint is None else read_state(checkpoint, config, prompts)
        self._reference = reference_digest(config) if state is None else state.reference
        try:
            self._policy, self._critic, self._workers = run_concurrently(
                self._make_policy, self._make_critic, self._make_workers
            )
            if checkpoint is not None and state is not None:
                self._iteration, self._moments = state.iteration, state.moments
                self._policy.load(checkpoint / POLICY_FOLDER)
                self._critic.load(checkpoint / CRITIC_FOLDER)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PPOTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all actors; may be called again."""
        for group in self._groups:
            group.shutdown()

    def run(self) -> PPOOutcome:
        """Iterates to the end.

        Raises:
            RankLost: The critic or the policy was lost; another attempt goes on from the last checkpoint.
            DivergedError: The policy ran away, or a number became NaN.
            CriticError: Rollouts or rewards did not come.
        """
        options = self.config
        total = options.ppo.iterations
        # What an attempt that had no checkpoint yet wrote, its first evaluation too, is written again.
        log = MetricsLog(self.directory / HISTORY_FOLDER, self._iteration or -1)
        bar = tqdm(desc="iterations", total=total, initial=self._iteration, disable=None)
        try:
            if self._iteration == 0:
                self._evaluate(log)
            while self._iteration < total:
                metrics = self._iterate()
                log.write("train", self._iteration, metrics)
                self._refuse_runaway(metrics)
                bar.update(1)
                bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=f"{metrics['kl']:.2f}")
                is_last = self._iteration == total
                if is_last or _is_due(self._iteration, options.run.evaluate_every):
                    self._evaluate(log)
                if is_last or _is_due(self._iteration, options.run.checkpoint_every):
                    log.flush()
                    self._checkpoint()
        finally:
            bar.close()
            log.close()
        checkpoint = latest_checkpoint(self.directory)
        assert checkpoint is not None, "the last iteration makes one"
        return PPOOutcome(self.directory, checkpoint, self._samples(0), self._samples(total))

    def _make_policy(self) -> PolicyGroup:
        policy, run = self.config.policy, self.config.run
        group = PolicyGroup(
            policy_options(self.config),
            policy.shards,
            cpus_per_shard=policy.cpus_per_shard,
            use_gpu=run.use_gpu,
            start_timeout_s=run.start_timeout_s,
        )
        self._groups.append(group)
        return group

    def _make_critic(self) -> CriticGroup:
        options = self.config
        group = CriticGroup(
            critic_options(options),
            options.critic.shards,
            cpus_per_shard=options.critic.cpus_per_shard,
            use_gpu=options.run.use_gpu,
            start_timeout_s=options.run.start_timeout_s,
        )
        self._groups.append(group)
        return group

    def _make_workers(self) -> RolloutWorkers:
        rollout = self.config.rollout
        pool = RolloutWorkers(
            rollout.workers,
            policy_options(self.config),
            self._client,
            rollout.max_new_tokens,
            cpus_per_worker=rollout.cpus_per_worker,
            use_gpu=self.config.run.use_gpu,
        )
        self._groups.append(pool)
        return pool

    def _iterate(self) -> dict[str, float]:
        """Rollouts, values, updates; returns what there is to say of them."""
        options = self.config
        started = time.perf_counter()
        rows = rows_of_step(
            np.arange(len(self._prompts)), options.rollout.prompts_per_iteration, options.ppo.seed, self._iteration
        )
        repeated = [int(row) for row in rows for _ in range(options.rollout.samples_per_prompt)]
        rollouts, timings = self._roll_out(self._prompts, repeated, (TRAINING_DRAWS, self._iteration))
        rolled_out = time.perf_counter()
        sequences = [np.concatenate([rollout.prompt_ids, rollout.response_ids]) for rollout in rollouts]
        prompt_lengths = [len(rollout.prompt_ids) for rollout in rollouts]
        (values, values_s), (ref_log_probs, reference_s) = run_concurrently(
            lambda: timed(lambda: self._critic.values(sequences)),
            lambda: timed(lambda: self._policy.reference_log_probs(sequences, prompt_lengths)),
        )
        computed_tokens = self._critic.computed_tokens
        judged = RolloutBatch(
            sequences,
            prompt_lengths,
            np.array([rollout.truncated for rollout in rollouts]),
            np.array([rollout.reward for rollout in rollouts], dtype=np.float32),
            [rollout.log_probs for rollout in rollouts],
            ref_log_probs,
            values,
        )
        experience = compute_advantages(judged, options.ppo, options.reward, self._moments)
        batches = [
            batch
            for epoch in range(options.ppo.epochs)
            for batch in minibatch_rows(
                [rollout.row for rollout in rollouts],
                options.ppo.minibatches,
                [options.ppo.seed, MINIBATCHES, self._iteration, epoch],
            )
        ]
        moves = self._iteration >= options.ppo.value_warmup_iterations
        (of_values, critic_s), (of_policy, policy_s) = run_concurrently(
            lambda: timed(lambda: self._update_critic(judged, experience, batches)),
            lambda: timed(lambda: self._update_policy(judged, experience, batches) if moves else []),
        )
        if of_policy:
            self._weights = None
        self._moments = experience.moments
        self._iteration += 1
        seconds = time.perf_counter() - started
        tokens = sum(len(ids) for ids in sequences)
        return {
            **experience.metrics,
            **_component_means(rollouts),
            **_means("value", of_values, OF_UPDATES),
            **_means(
                "policy", of_policy, ("loss", "clip_fraction", "entropy", "approx_kl", "grad_norm", "learning_rate")
            ),
            "rollouts": len(rollouts),
            "prompt_truncated_for_reward": float(
                np.mean([rollout.prompt_truncated_for_reward for rollout in rollouts])
            ),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "value_tokens_computed": computed_tokens,
            "seconds": seconds,
            "seconds_rollouts": rolled_out - started,
            "seconds_generating": timings.generating,
            "seconds_waiting_for_rewards": timings.waiting,
            "seconds_values": values_s,
            "seconds_reference": reference_s,
            "seconds_update_critic": critic_s,
            "seconds_update_policy": policy_s,
        }

    def _update_critic(
        self, judged: RolloutBatch, experience: PPOTargets, batches: Sequence[Sequence[int]]
    ) -> list[ValueMetrics]:
        with self._divergence_told("critic"):
            return [
                self._critic.update(
                    *_of_rows(
                        batch, judged.sequences, judged.prompt_lengths, experience.returns, experience.old_values
                    ),
                    clip=self.config.ppo.value_clip,
                )
                for batch in batches
            ]

    def _update_policy(
        self, judged: RolloutBatch, experience: PPOTargets, batches: Sequence[Sequence[int]]
    ) -> list[PolicyMetrics]:
        with self._divergence_told("policy"):
            return [
                self._policy.update(
                    *_of_rows(batch, judged.sequences, judged.prompt_lengths, judged.log_probs, experience.advantages),
                    clip=self.config.ppo.clip,
                    entropy_coefficient=self.config.ppo.entropy_coefficient,
                )
                for batch in batches
            ]

    @contextmanager
    def _divergence_told(self, who: Literal["critic", "policy"]) -> Iterator[None]:
        try:
            yield
        except NonFiniteLossError as error:
            raise DivergedError(
                f"iteration {self._iteration + 1}: the loss of the {who}, or its gradient, is not finite; the "
                f"checkpoints saved before are untouched. Lower --{who}.optimizer.learning-rate, or clip rewards "
                "(--reward.clip)"
            ) from error

    def _roll_out(self, prompts: Prompts, rows: Sequence[int], seeds: tuple[int, ...]) -> tuple[list[Rollout], Timings]:
        """A rollout for each of these rows of prompts, all judged by one version, unless they need not be.

        Meanwhile the critic leaves its devices, if it is to.
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
            rollouts, timings = self._workers.run(tasks, self._weights, options.rollout.timeout_s, bar.update)
        versions = {rollout.model_version for rollout in rollouts}
        if len(versions) > 1 and not options.reward.allow_mixed_versions:
            rollouts = score_again(rollouts, self._client)
            versions = {rollout.model_version for rollout in rollouts}
        if versions != self._model_versions:
            tqdm.write(f"iteration {self._iteration + 1}: rewards are given by {', '.join(sorted(versions))}")
            self._model_versions = versions
        if options.critic.offload:
            self._critic.onload()
        return rollouts, timings

    def _evaluate(self, log: MetricsLog) -> None:
        """Draws a response to every held-out prompt, always with the same seeds, and keeps them."""
        if self._held_out is None:
            return
        rollouts, _ = self._roll_out(self._held_out, range(len(self._held_out)), (EVALUATION_DRAWS,))
        rewards = np.array([rollout.reward for rollout in rollouts])
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        log.write(
            "validation",
            self._iteration,
            {
                "reward": float(rewards.mean()),
                "reward_std": float(rewards.std()),
                "response_tokens": float(np.mean(lengths)),
                **_component_means(rollouts),
            },
        )
        samples = [
            Sample(rollout.prompt, rollout.response, rollout.reward, rollout.model_version, rollout.policy_version)
            for rollout in rollouts
        ]
        path = self._samples_path(self._iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))

    def _samples_path(self, iteration: int) -> Path:
        return self.directory / HISTORY_FOLDER / SAMPLES_FOLDER / f"{CHECKPOINT_PATTERN.format(iteration)}.jsonl"

    def _samples(self, iteration: int) -> list[Sample]:
        path = self._samples_path(iteration)
        if self._held_out is None or not path.exists():
            return []
        return [Sample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]

    def _refuse_runaway(self, metrics: dict[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise DivergedError(
                f"iteration {self._iteration}: {', '.join(bad)} became NaN or infinite; the checkpoints saved before "
                "are untouched. Lower --policy.optimizer.learning-rate"
            )
        if metrics["kl"] > self.config.ppo.max_kl:
            raise DivergedError(
                f"iteration {self._iteration}: the mean KL of a response from the reference policy is "
                f"{metrics['kl']:.1f} nats, above ppo.max_kl {self.config.ppo.max_kl:g}: the policy ran away from what "
                "the reward model knows. Raise --ppo.kl-coefficient, lower --policy.optimizer.learning-rate, or raise "
                "the limit; the checkpoints saved before are untouched"
            )

    def _checkpoint(self) -> None:
        """Writes policy, critic and state in one step, then removes checkpoints that are not kept."""
        state = RunState(
            iteration=self._iteration,
            moments=self._moments,
            options=self.config.model_dump(mode="json"),
            prompts=self._prompts.fingerprint,
            reference=self._reference,
        )
        path = self.directory / CHECKPOINT_PATTERN.format(self._iteration)
        with atomic_directory(path) as building:
            run_concurrently(
                lambda: self._policy.save(building / POLICY_FOLDER),
                lambda: self._critic.save(building / CRITIC_FOLDER, name=self.config.run.name),
            )
            (building / PPO_STATE_NAME).write_text(state.model_dump_json(indent=2), encoding="utf-8")
            write_manifest(building, 0, 1, PPO_STATE_NAME)
        remove_old_checkpoints(self.directory, self.config.run.keep_checkpoints)


def policy_options(config: PPOJobConfig) -> PolicyOptions:
    """What the policy of a run is made of."""
    return PolicyOptions(
        config.policy.model,
        config.policy.optimizer,
        config.policy.chat_template,
        max(1, config.ppo.iterations - config.ppo.value_warmup_iterations) * config.updates_per_iteration,
        config.ppo.seed,
        config.rollout.temperature,
    )


def critic_options(config: PPOJobConfig) -> CriticOptions:
    """What the critic of a run is made of, once it is known to read what the policy writes.

    Raises:
        EncodingError: A token id of the policy means something else to the critic.
        ConfigError: The critic reads fewer tokens than a rollout may have.
        CheckpointError: The critic's directory is damaged.
    """
    length = config.prompts.max_tokens + config.rollout.max_new_tokens
    model = config.critic.model
    if not model.path:
        model = model.model_copy(update={"path": config.policy.model.path})
    critic = CriticOptions(
        model,
        TrainConfig(**config.critic.optimizer.model_dump(), seed=config.ppo.seed),
        EncodingConfig(chat_template=config.policy.chat_template, max_length=length),
        config.ppo.iterations * config.updates_per_iteration,
    )
    encoder = critic.encoder()
    validate_same_tokens(policy_options(config).tokenizer(), encoder.tokenizer)
    if length > encoder.max_length:
        raise ConfigError(
            f"prompts.max_tokens and rollout.max_new_tokens make up to {length} tokens, but the critic {model.path} "
            f"reads {encoder.max_length}: lower them, or fit a critic with a longer encoding.max_length"
        )
    return critic


def run_concurrently(*actions: Callable[[], Any]) -> tuple[Any, ...]:
    """Does several things at once, in threads, and waits for all; raises what the first one that failed raised."""
    with ThreadPoolExecutor(len(actions)) as threads:
        futures = [threads.submit(action) for action in actions]
    return tuple(future.result() for future in futures)


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """What an action returns, and the seconds it took."""
    started = time.perf_counter()
    result = action()
    return result, time.perf_counter() - started


def _of_rows(rows: Sequence[int], sequences: Sequence[TokenIds], *columns: Sequence[Any]) -> tuple[list[Any], ...]:
    return tuple([column[row] for row in rows] for column in (sequences, *columns))


def _means(prefix: str, metrics: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
    """Means over the updates of an iteration."""
    if not metrics:
        return {}
    return {f"{prefix}_{name}": float(np.mean([getattr(one, name) for one in metrics])) for name in names}


def _component_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    names = rollouts[0].components
    return {f"reward_{name}": float(np.mean([rollout.components[name] for rollout in rollouts])) for name in names}


def _is_due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0
