"""Rollouts: Ray actors that draw responses from the policy and have them judged, and the pool of them.

A worker draws the next task's responses while scorers judge the last ones. What is drawn depends on the task alone, not
on the worker, so a task whose worker was lost is given to another and comes out the same; workers may come and go.
Knows nothing of critics, advantages or updates.
"""

from __future__ import annotations

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
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.data.conversation import Prompt
from rlhf_critic.errors import CriticError, RankLost, RolloutsUnavailable
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Conversation

TASKS_PER_WORKER = 2  # one is drawn, one is judged
MOST_LOSSES = 5  # of each worker on average, for one call; more are no accident


@dataclass(frozen=True)
class RolloutTask:
    """What a worker does at once.

    Attributes:
        rows: The prompt of each rollout, as its number in the data; several may be equal.
        prompts: The prompts.
        prompt_ids: Their token ids.
        seed: Of what is drawn.
    """

    rows: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[TokenIds, ...]
    seed: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """A response of the policy, judged.

    Attributes:
        row: The number of its prompt in the data.
        prompt: The prompt.
        prompt_ids: Its token ids.
        response: The text of the response, without EOS.
        response_ids: Its token ids, EOS included where it came to its end; int64 ``[R]``.
        log_probs: With which each was drawn, fp32 ``[R]``, in nats.
        truncated: Whether it was cut.
        prompt_truncated_for_reward: Whether it and its prompt were too long for the scorers, which then leave out the beginning.
        reward: What scorers gave it.
        components: Of the reward, before their weights; empty where the critic is the only one.
        model_version: Which version of the reward model that was.
        policy_version: Updates of the policy that drew it.
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
    """Seconds that workers spent, over all of them.

    Attributes:
        generating: Drawing responses.
        waiting: For rewards, while nothing else was drawn or also while it was.
    """

    generating: float
    waiting: float


class RolloutWorker:
    """Draws responses and asks scorers for their rewards; runs in an actor with two threads.

    Args:
        options: Of the policy.
        client: Of the scorers.
        max_new_tokens: Most tokens of a response.
        threads: Torch threads, where there is no GPU.
        use_gpu: Whether it has a GPU.
    """

    def __init__(
        self, options: PolicyOptions, client: ScorerClient, max_new_tokens: int, threads: int, use_gpu: bool
    ) -> None:
        self._options = options
        self._client = client
        self._max_new_tokens = max_new_tokens
        self._threads = threads
        self._use_gpu = use_gpu
        self._drawing = threading.Lock()
        self._version: int | None = None

    def ready(self) -> None:
        """Builds the policy; a call of its own, because what an actor's constructor raises looks like its loss.

        Raises:
            CriticError: It cannot be built.
        """
        from rlhf_critic.model.generation import create_generator

        options = self._options
        self._tokenizer = options.tokenizer()
        self._generator = create_generator(options.model, self._tokenizer, options.temperature, self._use_gpu)

    def run(self, task: RolloutTask, weights: PolicyWeights) -> tuple[list[Rollout], Timings]:
        """Draws a response to each prompt and waits for their rewards; meanwhile another thread may draw.

        Raises:
            CriticError: The scorers cannot judge them, or did not in time; or the policy's output is NaN.
        """
        with self._drawing:
            started = time.perf_counter()
            if weights.version != self._version:
                self._generator.load(ray.get(weights.tensors[0]))
                self._version = weights.version
            torch.set_num_threads(self._threads)  # which is each thread's own
            drawn = self._generator.generate(task.prompt_ids, self._max_new_tokens, task.seed)
            texts = [self._text(response.ids, response.truncated) for response in drawn]
            generated = time.perf_counter()
        scores = self._client.score_items(
            [Conversation(prompt, text) for prompt, text in zip(task.prompts, texts, strict=True)]
        )
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
            for index, response in enumerate(drawn)
        ]
        return rollouts, timings

    def _text(self, ids: NDArray[np.int64], truncated: bool) -> str:
        """The response as scorers read it. Special tokens in it are shown: the critic judges what was said."""
        content = ids if truncated else ids[:-1]
        return str(self._tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(eq=False)
class _Worker:
    """A worker as its pool sees it."""

    actor: Any
    is_ready: bool = False
    tasks: dict[Any, int] = field(default_factory=dict)  # of its calls, the number of the task


class RolloutWorkers:
    """Rollout workers, which are replaced when they are lost; a context manager that ends them.

    Args:
        workers: How many.
        options: Of the policy.
        client: Of the scorers.
        max_new_tokens: Most tokens of a response.
        cpus_per_worker: CPUs that Ray reserves for each; torch threads where there is no GPU.
        use_gpu: One GPU for each (not yet run on a GPU).
    """

    def __init__(
        self,
        workers: int,
        options: PolicyOptions,
        client: ScorerClient,
        max_new_tokens: int,
        *,
        cpus_per_worker: float = 1.0,
        use_gpu: bool = False,
    ) -> None:
        environment = {} if use_gpu else {"DS_ACCELERATOR": "cpu"}
        self._worker_class = ray.remote(
            num_cpus=cpus_per_worker,
            num_gpus=int(use_gpu),
            max_restarts=0,
            max_concurrency=TASKS_PER_WORKER,
            runtime_env={"env_vars": environment},
        )(RolloutWorker)
        self._arguments = (options, client, max_new_tokens, max(1, int(cpus_per_worker)), use_gpu)
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
        """Makes the rollouts of some tasks, each once, whoever is lost on the way.

        Args:
            tasks: Given to whichever worker is free.
            weights: Of the policy that draws.
            timeout_s: For all of them.
            progress: Is told the number of rollouts that were finished just now.

        Returns:
            The rollouts, task by task, and what workers spent.

        Raises:
            RolloutsUnavailable: They were not there in time, or workers were lost again and again.
            RankLost: The weights were lost with the policy's shard.
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
                        f"waited {timeout_s:g} s for {len(tasks)} tasks of rollouts, and {len(finished)} are there; "
                        f"{sum(worker.is_ready for worker in self._workers)} of {len(self._workers)} workers have "
                        "started: give the cluster more room, or wait longer (--rollout.timeout-s)"
                    )
                worker = self._calls.pop(ready[0])
                try:
                    answer = ray.get(ready[0])
                except RayTaskError as error:  # first: what a task raised may be of the other classes, too
                    if isinstance(error.cause, CriticError):
                        raise error.cause from error
                    if isinstance(error.cause, ObjectLostError):  # or its owner was
                        raise RankLost(
                            f"the policy's weights were lost with the shard that held them: {error}"
                        ) from error
                    raise
                except (RayActorError, ObjectLostError) as error:  # it is gone, or its node with what it had made
                    losses += 1
                    if losses > MOST_LOSSES * len(self._workers):
                        raise RolloutsUnavailable(
                            f"{losses} rollout workers were lost during one iteration, the last one so: {error}"
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
        except BaseException:
            self._abandon()
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
        """The worker with the least to do, if one can take a task."""
        ready = [worker for worker in self._workers if worker.is_ready and len(worker.tasks) < TASKS_PER_WORKER]
        return min(ready, key=lambda worker: len(worker.tasks), default=None)

    def _start_worker(self) -> None:
        worker = _Worker(self._worker_class.remote(*self._arguments))
        self._workers.append(worker)
        self._calls[worker.actor.ready.remote()] = worker

    def _replace(self, lost: _Worker) -> list[int]:
        """Puts another in the place of a lost worker; returns the tasks that it had."""
        numbers = [*lost.tasks.values()]
        for other in lost.tasks:
            self._calls.pop(other, None)
        self._workers.remove(lost)
        ray.kill(lost.actor)  # if only an object of it was lost, it still holds what its successor needs
        self._start_worker()
        return numbers

    def _abandon(self) -> None:
        """Forgets what was asked for: whoever asks again gets all of it anew."""
        for worker in self._workers:
            for call in worker.tasks:
                self._calls.pop(call, None)
            worker.tasks.clear()


def score_again(rollouts: Sequence[Rollout], client: ScorerClient) -> list[Rollout]:
    """The same rollouts, all judged by one version of the reward model.

    Raises:
        CriticError: See `rlhf_critic.scoring.client.ScorerClient.score_items`.
    """
    scores = client.score_items([Conversation(rollout.prompt, rollout.response) for rollout in rollouts])
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
