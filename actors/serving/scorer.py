"""One scorer: a published critic, loaded and warm, that answers many callers at once and can be swapped while it does.

A plain class: Ray Serve makes replicas of it (`actors.serving.deployment`), Ray Data pools of it (`jobs.score`), and anyone may
make one by hand. Each call is answered whole by one version of the critic, the one that was there when it came; a swap
loads the next version beside the serving one and never stops it. Knows nothing of Serve, HTTP or how it is reached.

Shape legend: S items.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.runtime.storage import local_directory
from rlhf_critic.batching.planner import MicroBatch
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import CriticCard, load_critic, weights_digest
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.data.encoding import Encoded, Encoder
from rlhf_critic.errors import CheckpointError, ScorerUnavailable, VersionMismatch
from rlhf_critic.model.backbone import forward_micro_batches
from rlhf_critic.scoring.items import Item, Limits, ScorerInfo, Scores, encode_items, finish_items
from rlhf_critic.scoring.request_batcher import BatchRecord, Computed, Outputs, RequestBatcher
from rlhf_critic.scoring.reward_components import RewardComponents

if TYPE_CHECKING:
    from actors.serving.sharded_critic import ShardedCritic

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 600.0
DIGITS_OF_VERSION = 8


class LocalCritic:
    """A whole critic on this process's device; has the attributes and methods of `actors.serving.sharded_critic.ShardedCritic`."""

    def __init__(self, checkpoint: str, token_budget: int, use_gpu: bool) -> None:
        with local_directory(checkpoint) as directory:
            loaded = load_critic(directory)
        self.card: CriticCard = loaded.card
        self.encoder: Encoder = loaded.encoder
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._critic = loaded.critic.to(self._device)
        self.prefix_tree = self._critic.prefix_tree
        self.tokens_at_once = token_budget

    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed:
        """Computes one micro-batch; see `rlhf_critic.scoring.request_batcher.RequestBatcher`."""
        whole = [MicroBatch(tuple(range(len(sequences))))]
        ((_, output, tokens),) = forward_micro_batches(
            self._critic,
            sequences,
            whole,
            lambda batch, _: self._critic(batch, rewards_only=rewards_only),
            self._device,
        )
        rows = output.float().cpu().numpy()
        if rewards_only:
            return Computed(list(rows[:, None]), tokens)
        return Computed([row[: len(ids)] for row, ids in zip(rows, sequences, strict=True)], tokens)

    def check_healthy(self) -> None:
        """It cannot lose a part."""

    def close(self) -> None:
        """Frees the weights at once: the model is in reference cycles, which Serve freezes out of the collector."""
        for tensor in (*self._critic.parameters(), *self._critic.buffers()):
            tensor.data = tensor.new_empty(0)


class _Version:
    """One published critic: loaded, warm and with a queue of its own, so that no call sees two of them."""

    def __init__(
        self,
        config: ScorerConfig,
        backend: LocalCritic | ShardedCritic,
        digest: str,
        on_batch: Callable[[BatchRecord], None],
    ) -> None:
        self.config = config
        self.backend = backend
        self.encoder = backend.encoder
        self.components = RewardComponents(config.components, self._count_tokens, lambda: backend.encoder.ending)
        self.name = version_name(backend.card.version, digest, config)
        self.limits = Limits(config.max_items, config.max_text_bytes, config.max_tokens)
        self._encoding = threading.Lock()  # a tokenizer is not to be used by two threads at once
        if config.normalize:
            backend.card.reward_scale()
        self._warm_up()
        self.batcher = RequestBatcher(backend.forward, backend.tokens_at_once, backend.prefix_tree, on_batch=on_batch)

    def encode(self, items: Sequence[Item]) -> tuple[list[Item], list[Encoded]]:
        with self._encoding:
            finished = finish_items(items, self.encoder, self.limits)
            return finished, encode_items(finished, self.encoder, self.limits)

    def _count_tokens(self, text: str) -> int:
        with self._encoding:
            return self.encoder.count_tokens(text)

    def close(self) -> None:
        if not self.batcher.close(DRAIN_TIMEOUT_S):
            logger.warning("%s: calls were left unanswered after %.0f s", self.name, DRAIN_TIMEOUT_S)
        self.backend.close()

    def _warm_up(self) -> None:
        """Runs both kinds of forward pass once, which allocates what they need, and looks at what comes out."""
        ids = list(self.encoder.encode("warm-up", "warm-up").ids)
        for rewards_only in (True, False):
            (output,) = self.backend.forward([ids], rewards_only).outputs
            if not np.isfinite(output).all():
                raise CheckpointError(
                    f"{self.config.checkpoint}: this critic gives rewards that are NaN or infinite: publish another"
                )


@dataclass(frozen=True)
class _Call:
    """One call: what was asked of which version, and what is being computed for it."""

    served: _Version
    items: list[Item]
    encoded: list[Encoded]
    values: bool
    outputs: Future[Outputs]

    def finish(self, outputs: Outputs) -> Scores:
        """The answer, once the outputs are there."""
        critic_S = np.array([output[-1] for output in outputs], dtype=np.float32)
        if self.served.config.normalize:
            critic_S = self.served.backend.card.normalize(critic_S).astype(np.float32)
        rewards_S, components = self.served.components.combine(self.items, critic_S)
        return Scores(
            rewards_S=rewards_S,
            model_version=self.served.name,
            truncated_S=np.array([one.truncated for one in self.encoded]),
            tokens_S=np.array([len(one.ids) for one in self.encoded]),
            components=components,
            values=tuple(outputs) if self.values else None,
        )


class Scorer:
    """One replica.

    Args:
        config: What to serve.
        shards: Actors that share the critic; 1 keeps it in this process.
        cpus_per_shard: CPUs that Ray reserves for each of them, where there are several.
        use_gpu: Whether to use a GPU, or one for each of them (not yet run on a GPU).
        on_batch: Called after every micro-batch, for metrics.

    Raises:
        CheckpointError: The critic is not whole, not the one with ``config.digest``, has another encoding than it was
            fitted with, holds a pickle, or lacks the mean and deviation that ``config.normalize`` needs.
        ConfigError: A component cannot be made.
    """

    def __init__(
        self,
        config: ScorerConfig,
        shards: int = 1,
        cpus_per_shard: float = 1.0,
        use_gpu: bool = False,
        on_batch: Callable[[BatchRecord], None] = lambda _: None,
    ) -> None:
        self._shards, self._cpus_per_shard, self._use_gpu = shards, cpus_per_shard, use_gpu
        self._on_batch = on_batch
        self._publishing = threading.Lock()
        self._version = self._load(config)

    def score(self, items: Sequence[Item], *, values: bool = False, version: str | None = None) -> Scores:
        """Scores items, and answers when they are done. May be called by many threads at once.

        Args:
            items: What to score.
            values: Whether to give the value at every token too.
            version: Answer only if this is the version that is served.

        Raises:
            ScorerRejected: An item cannot be scored.
            VersionMismatch: Another version is served.
            ScorerUnavailable: A shard was lost, or the scorer is shutting down.
            CriticError: The critic's output is not finite, or a component failed.
        """
        call = self._begin(items, values, version)
        return call.finish(call.outputs.result())

    async def score_async(self, items: Sequence[Item], *, values: bool = False, version: str | None = None) -> Scores:
        """`score` for an event loop; cancelling it takes the items out of the queue."""
        beginning = asyncio.ensure_future(asyncio.to_thread(self._begin, items, values, version))
        try:
            call = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(_give_up)  # the thread goes on, and puts them in the queue
            raise
        outputs = await asyncio.wrap_future(call.outputs)
        return await asyncio.to_thread(call.finish, outputs)

    def publish(self, config: ScorerConfig) -> None:
        """Serves ``config`` from now on. Returns when calls that came before have been answered by what was there.

        Raises:
            CriticError: As at the start; then nothing has changed.
        """
        with self._publishing:
            if config == self._version.config:
                return
            previous, self._version = self._version, self._load(config)
        previous.close()

    def info(self) -> ScorerInfo:
        """What is served."""
        served = self._version
        return ScorerInfo(
            model_version=served.name,
            checkpoint=served.config.checkpoint,
            fingerprint=served.encoder.fingerprint,
            max_length=served.encoder.max_length,
            limits=served.limits,
            normalized=served.config.normalize,
            components={component.name: component.weight for component in served.config.components},
        )

    def check_healthy(self) -> None:
        """Checks that it can answer.

        Raises:
            ScorerUnavailable: A shard was lost.
        """
        self._version.backend.check_healthy()

    def close(self) -> None:
        """Answers what is waiting and lets go of the critic."""
        self._version.close()

    def _begin(self, items: Sequence[Item], values: bool, version: str | None) -> _Call:
        while True:
            served = self._version
            if version is not None and version != served.name:
                raise VersionMismatch(f"version {version} was asked for, this scorer serves {served.name}")
            finished, encoded = served.encode(items)
            sequences = [np.asarray(one.ids, dtype=np.int64) for one in encoded]
            try:
                outputs = served.batcher.submit(sequences, rewards_only=not values)
                return _Call(served, finished, encoded, values, outputs)
            except ScorerUnavailable:
                if served is self._version:
                    raise
                # It was replaced since: ask its successor.

    def _load(self, config: ScorerConfig) -> _Version:
        with local_directory(config.checkpoint) as directory:
            digest = weights_digest(directory)
        if config.digest not in {None, digest}:
            raise CheckpointError(
                f"{config.checkpoint}: its files are not those that were published (SHA-256 {digest[:12]} instead of "
                f"{str(config.digest)[:12]}): do not change a published critic, publish the new one under another path"
            )
        backend: LocalCritic | ShardedCritic
        if self._shards == 1:
            backend = LocalCritic(config.checkpoint, config.token_budget, self._use_gpu)
        else:
            from actors.serving.sharded_critic import ShardedCritic

            backend = ShardedCritic(
                config.checkpoint, config.token_budget, self._shards, self._cpus_per_shard, self._use_gpu
            )
        try:
            return _Version(config, backend, digest, self._on_batch)
        except BaseException:
            backend.close()
            raise


def _give_up(beginning: asyncio.Future[_Call]) -> None:
    if not beginning.cancelled() and beginning.exception() is None:
        beginning.result().outputs.cancel()


def version_name(version: str, digest: str, config: ScorerConfig) -> str:
    """Names what decides a reward: the critic, and a hash of its files and of how rewards are made of its output."""
    how = config.model_dump_json(include={"normalize", "components"})
    return f"{version}#{hashlib.sha256(f'{digest}{how}'.encode()).hexdigest()[:DIGITS_OF_VERSION]}"
