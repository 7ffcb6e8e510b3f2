"""One scorer: loads a published critic, answers many callers at once, and swaps to another critic meanwhile.

`Scorer` is a plain class. Ray Serve makes replicas of it (`actors.serving.deployment`), Ray Data makes workers of it
(`jobs.score`), and any process can create one. One version of the critic answers a whole call: the version served when
the call arrived. A swap loads the next version beside the current one without interrupting it. Knows nothing about
Serve, HTTP or how it is reached.

Shape legend: S items.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.runtime.storage import local_directory
from rlhf_critic.batching.planner import MicroBatch
from rlhf_critic.batching.prefix_cache import PrefixCacheFigures
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import CriticCard, OpenedCritic
from rlhf_critic.checkpoint.reward_model import verify_reward_model
from rlhf_critic.config.model import Dtype, resolve_dtype
from rlhf_critic.config.serve import CallLimits, ScorerConfig, UncertaintyComponent
from rlhf_critic.data.encoding import Encoded, Encoder
from rlhf_critic.errors import CheckpointError, ScorerUnavailable, VersionMismatch
from rlhf_critic.model.backbone import forward_micro_batches
from rlhf_critic.model.caching_critic import CachingCritic
from rlhf_critic.model.device import configure_device, is_working, select_device
from rlhf_critic.model.factory import DTYPE_OF
from rlhf_critic.scoring.items import Adjusted, Item, ScorerInfo, Scores, encode_items, finish_items
from rlhf_critic.scoring.request_batcher import BatchRecord, Computed, OutOfDeviceMemory, Outputs, RequestBatcher
from rlhf_critic.scoring.reward_components import RewardComponents

if TYPE_CHECKING:
    from actors.serving.sharded_critic import ShardedCritic

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 600.0
STUCK_S = 1800.0  # a micro-batch that takes longer hangs
THREADS = 32


class LocalCritic:
    """An opened critic on this process's device; computes at most ``token_budget`` tokens at once.

    Keeps keys and values of prefixes in ``prefix_cache_bytes``, if its family can; 0 keeps none.

    Raises:
        CheckpointError: See `rlhf_critic.checkpoint.critic_directory.OpenedCritic.build`.
    """

    def __init__(
        self,
        opened: OpenedCritic,
        token_budget: int,
        use_gpu: bool,
        dtype: Dtype = "float32",
        prefix_cache_bytes: int = 0,
    ) -> None:
        self._device = select_device(use_gpu)
        configure_device(self._device, DTYPE_OF[dtype])
        loaded = opened.load(DTYPE_OF[dtype])
        self._posterior = loaded.posterior and loaded.posterior.to(self._device)
        self.has_stds = loaded.posterior is not None
        self.card: CriticCard = loaded.card
        self.encoder: Encoder = loaded.encoder
        self._critic = loaded.critic.to(self._device)
        self.prefix_tree = self._critic.prefix_tree
        self.tokens_at_once = token_budget
        self._broken = ""
        cached = prefix_cache_bytes > 0 and self._critic.create_store(prefix_cache_bytes, self._device)
        self._caching = CachingCritic(self._critic, self._device) if cached else None
        self.known_lengths = self._caching.known_lengths if self._caching else None

    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed:
        """Computes one micro-batch; see `rlhf_critic.scoring.request_batcher.RequestBatcher`.

        Raises:
            OutOfDeviceMemory: The micro-batch is too large for the device.
            ScorerUnavailable: The device does not work any more.
        """
        self.check_healthy()
        try:
            return self._forward(sequences, rewards_only)
        except torch.OutOfMemoryError as error:
            message = str(error)
        except RuntimeError as error:
            if is_working(self._device):
                raise
            self._broken = f"the device of this scorer does not work any more: {error}"
            raise ScorerUnavailable(self._broken) from error
        torch.cuda.empty_cache()  # here, because an exception keeps the tensors of its frames
        raise OutOfDeviceMemory(
            f"{sum(map(len, sequences))} tokens in {len(sequences)} sequences do not fit the device's memory: use a "
            f"lower token_budget or max_tokens, or a device with more memory ({message})"
        )

    def _forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed:
        if self._caching:
            before = self._caching.figures
            output, states_SD, tokens = self._caching.forward(sequences, rewards_only)
            figures = self._caching.figures
            cached = (
                figures.hit_tokens - before.hit_tokens,
                figures.evicted_tokens - before.evicted_tokens,
                figures.bytes,
            )
            return Computed(self._arrays(output, states_SD, sequences, rewards_only), tokens, *cached)
        whole = [MicroBatch(tuple(range(len(sequences))))]
        ((_, (output, states_SD), tokens),) = forward_micro_batches(
            self._critic,
            sequences,
            whole,
            lambda batch, _: self._critic(batch, rewards_only=rewards_only, with_states=True),
            self._device,
        )
        return Computed(self._arrays(output, states_SD, sequences, rewards_only), tokens)

    @torch.no_grad()
    def _arrays(
        self, output: torch.Tensor, states_SD: torch.Tensor, sequences: Sequence[TokenIds], rewards_only: bool
    ) -> Outputs:
        """Returns the reward or the values of each sequence, and its standard deviation after them if there is one."""
        rows = output.float().cpu().numpy()
        outputs = list(rows[:, None])
        if not rewards_only:
            outputs = [row[: len(ids)] for row, ids in zip(rows, sequences, strict=True)]
        if self._posterior is None:
            return outputs
        stds_S = self._posterior.stds(states_SD).cpu().numpy()
        return [np.append(output, std) for output, std in zip(outputs, stds_S, strict=True)]

    @property
    def prefix_cache(self) -> PrefixCacheFigures | None:
        """Figures of the prefix cache; None without one."""
        return self._caching.figures if self._caching else None

    def check_healthy(self) -> None:
        """Checks that the device works.

        Raises:
            ScorerUnavailable: An earlier micro-batch found that it does not.
        """
        if self._broken:
            raise ScorerUnavailable(self._broken)

    def close(self) -> None:
        """Frees the weights at once. Serve excludes the model's reference cycles from garbage collection."""
        for tensor in (*self._critic.parameters(), *self._critic.buffers()):
            tensor.data = tensor.new_empty(0)
        if self._critic.store:
            self._critic.store.free()
        if not self._broken:
            torch.cuda.empty_cache()  # does nothing without a GPU


class _Version:
    """One published critic: loaded, warmed up, with its own queue, so that one version answers a whole call."""

    def __init__(
        self,
        config: ScorerConfig,
        dtype: Dtype,
        backend: LocalCritic | ShardedCritic,
        digest: str,
        on_batch: Callable[[BatchRecord], None],
    ) -> None:
        self.config = config
        self.backend = backend
        self.encoder = backend.encoder
        self.components = RewardComponents(config.components, self._count_tokens, lambda: backend.encoder.ending)
        self.name = version_name(backend.card.version, digest, config, dtype)
        self.limits = CallLimits(**config.model_dump(include=set(CallLimits.model_fields)))
        self._encoding = threading.Lock()  # two threads must not use a tokenizer at once
        bos_token = self.encoder.tokenizer.bos_token or ""
        self._bos_token = bos_token if self.encoder.render("warm-up", "warm-up").startswith(bos_token) else ""
        # For components, which may hang. Never shut down: the last calls finish after `close`.
        self.finishing = ThreadPoolExecutor(THREADS, thread_name_prefix="finish")
        if config.normalize:
            backend.card.reward_scale()
        check_calibrated(config, backend.has_stds)
        self._warm_up()
        self.batcher = RequestBatcher(
            backend.forward,
            backend.tokens_at_once,
            backend.prefix_tree,
            on_batch=on_batch,
            known_lengths=backend.known_lengths,
        )

    def encode(self, items: Sequence[Item]) -> tuple[list[Item], list[Encoded]]:
        wishes = [item if isinstance(item, Adjusted) else Adjusted(item) for item in items]
        with self._encoding:
            finished = finish_items([one.begun(self._bos_token) for one in wishes], self.encoder, self.limits)
            encoded = encode_items(finished, self.encoder, self.limits)
        return finished, [one.shortened(whole) for one, whole in zip(wishes, encoded, strict=True)]

    def token_texts(self, items: Sequence[Item], encoded: list[Encoded]) -> tuple[tuple[str, ...], ...] | None:
        """Returns the texts of the tokens, if an item asks for them."""
        if not any(isinstance(item, Adjusted) and item.token_texts for item in items):
            return None
        with self._encoding:
            return tuple(self.encoder.token_texts(one.ids) for one in encoded)

    def _count_tokens(self, text: str) -> int:
        with self._encoding:
            return self.encoder.count_tokens(text)

    def close(self) -> None:
        if not self.batcher.close(DRAIN_TIMEOUT_S):
            logger.warning("shut down with unfinished calls version=%s after_s=%.0f", self.name, DRAIN_TIMEOUT_S)
        self.backend.close()

    def _warm_up(self) -> None:
        """Runs both kinds of forward pass once, which allocates their memory, and checks the outputs."""
        ids = list(self.encoder.encode("warm-up", "warm-up").ids)
        for rewards_only in (True, False):
            (output,) = self.backend.forward([ids], rewards_only).outputs
            if not np.isfinite(output).all():
                raise CheckpointError(
                    f"{self.config.checkpoint}: this critic gives rewards that are NaN or infinite: publish another"
                )


@dataclass(frozen=True)
class _Call:
    """One call: the items, the version that answers them, and the pending outputs."""

    served: _Version
    items: list[Item]
    encoded: list[Encoded]
    token_texts: tuple[tuple[str, ...], ...] | None
    values: bool
    outputs: Future[Outputs]

    def finish(self, outputs: Outputs) -> Scores:
        stds_S = None
        if self.served.backend.has_stds:
            stds_S = np.array([output[-1] for output in outputs], dtype=np.float32)
            outputs = [output[:-1] for output in outputs]
        critic_S = np.array([output[-1] for output in outputs], dtype=np.float32)
        if self.served.config.normalize:
            card = self.served.backend.card
            critic_S = card.normalize(critic_S).astype(np.float32)
            stds_S = None if stds_S is None else (stds_S / card.reward_scale()[1]).astype(np.float32)
        rewards_S, components = self.served.components.combine(self.items, critic_S, stds_S)
        return Scores(
            rewards_S=rewards_S,
            model_version=self.served.name,
            truncated_S=np.array([one.truncated for one in self.encoded]),
            tokens_S=np.array([len(one.ids) for one in self.encoded]),
            components=components,
            values=tuple(outputs) if self.values else None,
            token_texts=self.token_texts,
            stds_S=stds_S,
        )


class Scorer:
    """One replica.

    Args:
        config: Critic and options to serve.
        shards: Number of actors that share the critic; 1 keeps it in this process.
        cpus_per_shard: CPUs that Ray reserves for each shard, if there are several.
        use_gpu: Whether to use a GPU, or one per shard.
        on_batch: Called after every micro-batch, for metrics.

    Raises:
        CheckpointError: The critic is incomplete or damaged, does not match ``config.digest``, is encoded differently
            than in training, contains a pickle, or lacks the mean and deviation that ``config.normalize`` needs,
            or the calibration that a component of uncertainty needs.
        ConfigError: A component cannot be created.
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
        self._beginning = ThreadPoolExecutor(THREADS, thread_name_prefix="encode")
        self._version = self._load(config)

    def score(self, items: Sequence[Item], *, values: bool = False, version: str | None = None) -> Scores:
        """Scores items and waits for the result. Threads may call it concurrently.

        Args:
            items: Items to score.
            values: Whether to return the value at every token too.
            version: Version that must answer; None accepts any.

        Raises:
            ScorerRejected: An item cannot be scored.
            VersionMismatch: The scorer serves another version.
            ScorerUnavailable: A shard was lost, or the scorer is shutting down.
            CriticError: The critic's output is not finite, or a component failed.
        """
        call = self._begin(items, values, version)
        return call.finish(call.outputs.result())

    async def score_async(self, items: Sequence[Item], *, values: bool = False, version: str | None = None) -> Scores:
        """Scores like `score`, for an event loop. Cancelling it removes the items from the queue."""
        loop = asyncio.get_running_loop()
        beginning = loop.run_in_executor(self._beginning, self._begin, items, values, version)
        try:
            call = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(_cancel_call)  # the thread continues and queues the items
            raise
        outputs = await asyncio.wrap_future(call.outputs)
        if call.served.components.is_critic_alone:
            return call.finish(outputs)
        return await loop.run_in_executor(call.served.finishing, call.finish, outputs)

    def publish(self, config: ScorerConfig) -> None:
        """Switches to ``config``. Returns when the previous version has answered the calls that it had accepted.

        Raises:
            CriticError: The same errors as at the start. The scorer then continues with the previous version.
        """
        with self._publishing:
            if config == self._version.config:
                return
            previous, self._version = self._version, self._load(config)
        previous.close()

    def info(self) -> ScorerInfo:
        """Describes the served version."""
        served = self._version
        return ScorerInfo(
            model_version=served.name,
            checkpoint=served.config.checkpoint,
            fingerprint=served.encoder.fingerprint,
            max_length=served.encoder.max_length,
            limits=served.limits,
            normalized=served.config.normalize,
            components={component.name: component.weight for component in served.config.components},
            prefix_cache=served.backend.prefix_cache,
        )

    def check_healthy(self) -> None:
        """Checks that the scorer can answer.

        Raises:
            ScorerUnavailable: A shard or the device was lost, the critic computes without end, or all calls of a
                component hang.
        """
        served = self._version
        served.backend.check_healthy()
        served.components.check_healthy()
        if served.batcher.busy_s > STUCK_S:
            raise ScorerUnavailable(f"the critic has computed one micro-batch for more than {STUCK_S:g} s")

    def close(self) -> None:
        """Answers the waiting calls and frees the critic."""
        self._version.close()

    def _begin(self, items: Sequence[Item], values: bool, version: str | None) -> _Call:
        while True:
            served = self._version
            if version is not None and version != served.name:
                raise VersionMismatch(f"version {version} was requested, this scorer serves {served.name}")
            finished, encoded = served.encode(items)
            sequences = [np.asarray(one.ids, dtype=np.int64) for one in encoded]
            try:
                outputs = served.batcher.submit(sequences, rewards_only=not values)
                return _Call(served, finished, encoded, served.token_texts(items, encoded), values, outputs)
            except ScorerUnavailable:
                if served is self._version:
                    raise
                # The version was replaced meanwhile: submit to its successor.

    def _load(self, config: ScorerConfig) -> _Version:
        # One download and one verification; the backend reads the weights from this directory.
        with local_directory(config.checkpoint) as directory:
            model = verify_reward_model(directory, config.checkpoint, config.encoding)
            if config.digest not in {None, model.digest}:
                raise CheckpointError(
                    f"{config.checkpoint}: these files are not the published ones (SHA-256 {model.digest[:12]}, "
                    f"expected {str(config.digest)[:12]}): restore them, and publish a changed critic under another "
                    "path"
                )
            dtype = resolve_dtype(config.dtype, self._use_gpu)
            if self._shards == 1:
                backend: LocalCritic | ShardedCritic = LocalCritic(
                    model.opened, config.token_budget, self._use_gpu, dtype, config.prefix_cache_bytes
                )
            else:
                from actors.serving.sharded_critic import ShardedCritic

                backend = ShardedCritic(
                    config, directory, model.opened, self._shards, self._cpus_per_shard, self._use_gpu
                )
        try:
            return _Version(config, dtype, backend, model.digest, self._on_batch)
        except BaseException:
            backend.close()
            raise


def _cancel_call(beginning: asyncio.Future[_Call]) -> None:
    if not beginning.cancelled() and beginning.exception() is None:
        beginning.result().outputs.cancel()


def check_calibrated(config: ScorerConfig, has_stds: bool) -> None:
    """Checks that a critic has the standard deviations that its reward needs.

    Raises:
        CheckpointError: A component is the uncertainty, and the critic is not calibrated.
    """
    if not has_stds and any(isinstance(component, UncertaintyComponent) for component in config.components):
        raise CheckpointError(
            f"{config.checkpoint}: a pessimistic reward needs standard deviations, and this critic has none: run "
            f"rlhf-critic calibrate {config.checkpoint} DATA first, or leave out --pessimism"
        )


def version_name(version: str, digest: str, config: ScorerConfig, dtype: Dtype) -> str:
    """Returns the name of a served version: the critic's name, and a hash of everything that decides a reward."""
    # Without time limits, which decide no reward.
    how = config.model_dump_json(
        include={"normalize", "components"}, exclude={"components": {"__all__": {"timeout_s"}}}
    )
    how += "" if dtype == "float32" else dtype  # names from before the option stay
    return f"{version}#{hashlib.sha256(f'{digest}{how}'.encode()).hexdigest()[:8]}"
