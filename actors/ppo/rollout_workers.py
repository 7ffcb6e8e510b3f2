"""Rollout workers: Ray actors that sample responses from the policy and request their rewards, and their handle.

A worker samples the responses of the next task while scorers score those of the last one. The responses depend on the
task and not on the worker. So a task of a lost worker is given to another with the same result. Knows nothing about
critics, advantages or updates.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors.ppo.policy_group import PolicyOptions, PolicyWeights
from actors.runtime.environment import compute_environment
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.data.conversation import Prompt
from rlhf_critic.errors import CriticError, RankLost, RolloutsUnavailable, ScorerUnavailable
from rlhf_critic.logs import configure_logging
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Item, Scores, conversations

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 5.0
TASKS_PER_WORKER = 2  # one is sampled while one is scored
MAX_LOSSES = 5  # per worker on average and call; more are no accident


@dataclass(frozen=True)
class RolloutTask:
    """Prompts whose responses a worker samples in one call.

    Attributes:
        rows: Row of each rollout's prompt in the data; several may be equal.
        prompts: Prompts of the rollouts.
        prompt_ids: Token ids of the prompts.
        seed: Random seed for sampling.
    """

    rows: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[TokenIds, ...]
    seed: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """A response of the policy, with its reward.

    Attributes:
        row: Row of the prompt in the data.
        prompt: Prompt of the response.
        prompt_ids: Token ids of the prompt.
        response: Text of the response, without EOS.
        response_ids: Token ids of the response, int64 ``[R]``, with EOS unless it is truncated.
        log_probs: Log-probabilities at which the tokens were sampled, fp32 ``[R]``, in nats.
        truncated: Whether the response reached the maximum length before EOS.
        prompt_truncated_for_reward: Whether prompt and response were too long for the scorers, which truncate from the
            left.
        reward: Reward from the scorers.
        components: Components of the reward by name, before their weights; empty if the critic is the only one.
        model_version: Version of the reward model.
        policy_version: Version of the policy: its number of updates.
    """

    row: int
    prompt: Prompt
    prompt_ids: TokenIds
    response: str
    response_ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    truncated: bool
    prompt_truncated_for_reward: bool
    reward: float
    components: dict[str, float]
    model_version: str
    policy_version: int


@dataclass(frozen=True)
class Timings:
    """Seconds that workers spent, summed over all of them.

    Attributes:
        generating: Seconds of sampling.
        waiting: Seconds of waiting for rewards, whether or not another task was sampled meanwhile.
    """

    generating: float
    waiting: float


class RolloutWorker:
    """Samples responses and requests their rewards from scorers; runs in an actor with two threads."""

    def __init__(
        self,
        options: PolicyOptions,
        client: ScorerClient,
        max_new_tokens: int,
        patience_s: float,
        threads: int,
        use_gpu: bool,
    ) -> None:
        configure_logging()
        self._options, self._client, self._max_new_tokens = options, client, max_new_tokens
        self._patience_s, self._threads, self._use_gpu = patience_s, threads, use_gpu
        self._sampling = threading.Lock()
        self._version: int | None = None

    def ready(self) -> None:
        """Builds the policy. Not part of the constructor, whose errors would look like the loss of the actor.

        Raises:
            CriticError: The policy cannot be built.
        """
        from rlhf_critic.model.generation import create_generator

        model, temperature, self._tokenizer = self._options.model, self._options.temperature, self._options.tokenizer()
        self._generator = create_generator(model, self._tokenizer, temperature, self._use_gpu)

    def run(self, task: RolloutTask, weights: PolicyWeights) -> tuple[list[Rollout], Timings]:
        """Samples a response to each prompt and waits for the rewards; meanwhile another thread may sample.

        Raises:
            CriticError: The scorers cannot score the responses, or not in time, or the policy's output is NaN.
        """
        with self._sampling:
            started = time.perf_counter()
            if weights.version != self._version:
                self._generator.load(weights.get())
                self._version = weights.version
            torch.set_num_threads(self._threads)  # a setting of each thread
            sampled = self._generator.generate(task.prompt_ids, self._max_new_tokens, task.seed)
            texts = [self._text(response.ids, response.truncated) for response in sampled]
            generated = time.perf_counter()
        scores = score_patiently(self._client, conversations(task.prompts, texts), self._patience_s)
        timings = Timings(generated - started, time.perf_counter() - generated)
        rollouts = [
            Rollout(
                row=task.rows[index],
                prompt=task.prompts[index],
                prompt_ids=task.prompt_ids[index],
                response=texts[index],
                response_ids=response.ids,
                log_probs=response.log_probs,
                truncated=response.truncated,
                prompt_truncated_for_reward=bool(scores.truncated_S[index]),
                reward=float(scores.rewards_S[index]),
                components={name: float(numbers_S[index]) for name, numbers_S in scores.components.items()},
                model_version=scores.model_version,
                policy_version=weights.version,
            )
            for index, response in enumerate(sampled)
        ]
        return rollouts, timings

    def _text(self, ids: NDArray[np.int64], truncated: bool) -> str:
        """Decodes a response for scorers. Special tokens stay visible, because they are part of what is scored."""
        content = ids if truncated else ids[:-1]
        return str(self._tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(eq=False)
class _Worker:
    actor: Any
    is_ready: bool = False
    tasks: dict[Any, int] = field(default_factory=dict)  # from pending calls to the numbers of their tasks


class RolloutWorkers:
    """Handle of rollout workers, which replaces lost ones; a context manager that ends them.

    Args:
        workers: Number of workers.
        options: Options of the policy.
        client: Client of the scorers.
        max_new_tokens: Maximum tokens of a response.
        patience_s: See `score_patiently`.
        cpus_per_worker: CPUs that Ray reserves for each worker, and torch threads if there is no GPU.
        use_gpu: Whether each worker has a GPU.
    """

    def __init__(
        self,
        workers: int,
        options: PolicyOptions,
        client: ScorerClient,
        max_new_tokens: int,
        *,
        patience_s: float = 0.0,
        cpus_per_worker: float = 1.0,
        use_gpu: bool = False,
    ) -> None:
        self._worker_class = ray.remote(
            num_cpus=cpus_per_worker,
            num_gpus=int(use_gpu),
            max_restarts=0,
            max_concurrency=TASKS_PER_WORKER,
            runtime_env={"env_vars": compute_environment(use_gpu)},
        )(RolloutWorker)
        self._arguments = (options, client, max_new_tokens, patience_s, max(1, int(cpus_per_worker)), use_gpu)
        self._calls: dict[Any, _Worker] = {}
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._start_worker()

    def run(
        self,
        tasks: Sequence[RolloutTask],
        weights: PolicyWeights,
        timeout_s: float,
        progress: Callable[[int], None] = lambda _: None,
    ) -> tuple[list[Rollout], Timings]:
        """Makes the rollouts of all tasks, each once and in their order, even if workers are lost.

        Args:
            tasks: Tasks, which are given to free workers.
            weights: Weights of the policy.
            timeout_s: Maximum seconds for all tasks.
            progress: Called with the number of rollouts of each finished task.

        Raises:
            RolloutsUnavailable: Rollouts did not come in time, or workers were lost too often.
            RankLost: The weights were lost with the policy's rank.
            CriticError: A worker failed for a reason that another would meet too, such as `ScorerUnavailable`.
        """
        waiting = deque(range(len(tasks)))
        finished: dict[int, list[Rollout]] = {}
        spent = Timings(0.0, 0.0)
        losses = 0
        deadline = time.monotonic() + timeout_s
        try:
            while len(finished) < len(tasks):
                while waiting and (worker := self._free_worker()) is not None:
                    number = waiting.popleft()
                    call = worker.actor.run.remote(tasks[number], weights)
                    worker.tasks[call] = number
                    self._calls[call] = worker
                ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise RolloutsUnavailable(
                        f"waited {timeout_s:g} s for {len(tasks)} tasks of rollouts, and {len(finished)} are finished; "
                        f"{sum(worker.is_ready for worker in self._workers)} of {len(self._workers)} workers have "
                        "started: give the cluster more room, or wait longer (--rollout.timeout-s)"
                    )
                worker = self._calls.pop(ready[0])
                try:
                    answer = ray.get(ready[0])
                except RayTaskError as error:  # first, because a task's error may also be one of the other classes
                    if isinstance(error.cause, CriticError):
                        raise error.cause from error
                    if isinstance(error.cause, ObjectLostError):  # the weights or their owner
                        raise RankLost(
                            f"the policy's weights were lost with the rank that held them: {error}"
                        ) from error
                    raise
                except (RayActorError, ObjectLostError) as error:  # the worker, or its node with the answer
                    losses += 1
                    if losses > MAX_LOSSES * len(self._workers):
                        raise RolloutsUnavailable(
                            f"{losses} rollout workers were lost during one iteration; the last error: {error}"
                        ) from error
                    waiting.extendleft(sorted(self._replace(worker), reverse=True))
                    continue
                if ready[0] not in worker.tasks:
                    worker.is_ready = True
                    continue
                number = worker.tasks.pop(ready[0])
                finished[number], timings = answer
                spent = Timings(spent.generating + timings.generating, spent.waiting + timings.waiting)
                progress(len(finished[number]))
        except BaseException:  # the next `run` starts with no pending tasks
            for worker in self._workers:
                for call in worker.tasks:
                    self._calls.pop(call, None)
                worker.tasks.clear()
            raise
        return [rollout for number in range(len(tasks)) for rollout in finished[number]], spent

    def shutdown(self) -> None:
        """Ends the workers; may be called again."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers, self._calls = [], {}

    def __enter__(self) -> RolloutWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _free_worker(self) -> _Worker | None:
        """Returns the worker with the fewest tasks, if one can take another."""
        ready = [worker for worker in self._workers if worker.is_ready and len(worker.tasks) < TASKS_PER_WORKER]
        return min(ready, key=lambda worker: len(worker.tasks), default=None)

    def _start_worker(self) -> None:
        worker = _Worker(self._worker_class.remote(*self._arguments))
        self._workers.append(worker)
        self._calls[worker.actor.ready.remote()] = worker

    def _replace(self, lost: _Worker) -> list[int]:
        """Replaces a lost worker; returns the numbers of its tasks."""
        for other in lost.tasks:
            self._calls.pop(other, None)
        self._workers.remove(lost)
        ray.kill(lost.actor)  # if only an object was lost, the worker still holds resources that its successor needs
        self._start_worker()
        return list(lost.tasks.values())


def score_patiently(client: ScorerClient, items: Sequence[Item], patience_s: float) -> Scores:
    """Scores items, and keeps asking while no scorer answers, so that a run waits for a pool that will return.

    Args:
        client: Client of the scorers, with a deadline of its own.
        items: Items to score.
        patience_s: Seconds to keep asking after the first deadline.

    Raises:
        ScorerUnavailable: No scorer answered in this time.
        CriticError: See `rlhf_critic.scoring.client.ScorerClient.score_items`.
    """
    ends: float | None = None
    while True:
        try:
            return client.score_items(items)
        except ScorerUnavailable as error:
            now = time.monotonic()
            ends = now + patience_s if ends is None else ends
            if now >= ends:
                raise
            logger.warning("waiting for scorers longest_wait_s=%.0f reason=%s", ends - now, error)
            time.sleep(min(ASK_AGAIN_S, ends - now))


def score_again(rollouts: Sequence[Rollout], client: ScorerClient, patience_s: float = 0.0) -> list[Rollout]:
    """Scores rollouts again, all by one version of the reward model.

    Raises:
        CriticError: See `score_patiently`.
    """
    items = conversations([one.prompt for one in rollouts], [one.response for one in rollouts])
    scores = score_patiently(client, items, patience_s)
    return [
        replace(
            rollout,
            prompt_truncated_for_reward=bool(scores.truncated_S[index]),
            reward=float(scores.rewards_S[index]),
            components={name: float(numbers_S[index]) for name, numbers_S in scores.components.items()},
            model_version=scores.model_version,
        )
        for index, rollout in enumerate(rollouts)
    ]
