"""A critic that is larger than one device: its shards in actors of their own, and one sequencer that calls them all.

ZeRO-3 gathers every layer from all ranks, so a forward pass is collective: all ranks must make the same calls in the
same order. `ShardGroup` is the only caller its actors have, and it lets one call in at a time. When a rank is lost the
others would wait for it without end; then the group ends itself, and whoever holds it starts another.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.directories import directory_at
from rlhf_critic.checkpoint import CriticCard, load_encoder, read_card
from rlhf_critic.encoding import Encoder
from rlhf_critic.errors import PlacementError, ScorerUnavailable
from rlhf_critic.prefix_tree import TokenIds
from rlhf_critic.request_batcher import Computed

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 300.0
JOIN_ATTEMPTS = 3


class Shard:
    """One rank of a sharded critic, in an actor."""

    def __init__(self, rank: int, world_size: int, use_gpu: bool) -> None:
        self._use_gpu = use_gpu
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")

    def free_address(self) -> tuple[str, int]:
        """This node's address and a port that is free there now; another process may take it before it is used."""
        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, address: str, port: int) -> None:
        """Meets the other ranks."""
        from rlhf_critic.distributed import init_distributed

        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        init_distributed("nccl" if self._use_gpu else "gloo", timeout=timedelta(seconds=CALL_TIMEOUT_S))

    def load(self, checkpoint: str, token_budget: int) -> bool:
        """Loads this rank's shard; returns whether its batches are prefix trees."""
        from rlhf_critic.inference import InferenceEngine

        with directory_at(checkpoint) as directory:
            self._engine = InferenceEngine.from_checkpoint(directory, token_budget)
        return self._engine.critic.prefix_tree

    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed:
        """See `ShardGroup.forward`."""
        with torch.no_grad():
            rewards_or_values = self._engine.rewards if rewards_only else self._engine.values
            outputs = [np.atleast_1d(output) for output in rewards_or_values(sequences)]
        return Computed(outputs, self._engine.computed_tokens)


class ShardGroup:
    """The handle of a critic's shards; takes the place of a critic in one process.

    Args:
        checkpoint: A critic directory, path or URI, reachable from every shard.
        token_budget: The most tokens that a shard computes at once.
        shards: How many there are.
        cpus_per_shard: CPUs that Ray reserves for each.
        use_gpu: One GPU for each, and NCCL (not yet run on a GPU).

    Attributes:
        card: The critic's card.
        encoder: Its encoder.
        prefix_tree: Whether its batches are prefix trees.
        tokens_at_once: The most tokens that the group computes at once.

    Raises:
        CheckpointError: The critic cannot be loaded.
        PlacementError: The cluster has no room for the shards, and got none in time.
    """

    def __init__(
        self, checkpoint: str, token_budget: int, shards: int, cpus_per_shard: float = 1.0, use_gpu: bool = False
    ) -> None:
        self._sequencer = threading.Lock()
        self._is_lost = False
        self._shards: list[Any] = []
        self._own_group: PlacementGroup | None = None
        with directory_at(checkpoint) as directory:
            self.card: CriticCard = read_card(directory)
            self.encoder: Encoder = load_encoder(directory, self.card)
        self.tokens_at_once = token_budget * shards
        resources = {"CPU": cpus_per_shard, **({"GPU": 1.0} if use_gpu else {})}
        try:
            group, first_bundle = self._place(shards, resources)
            actor_class = ray.remote(num_cpus=cpus_per_shard, num_gpus=int(use_gpu), max_restarts=0)(Shard)
            self._shards = [
                actor_class.options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, first_bundle + rank)
                ).remote(rank, shards, use_gpu)
                for rank in range(shards)
            ]
            self._join()
            loaded = self._all("load the critic", "load", checkpoint, token_budget, timeout_s=START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.prefix_tree: bool = loaded[0]

    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed:
        """Computes a micro-batch; each shard takes a part of it. See `rlhf_critic.request_batcher.RequestBatcher`.

        Raises:
            ScorerUnavailable: A shard is lost or did not answer in time; the group has ended itself.
        """
        arrays = ray.put([np.asarray(ids, dtype=np.int64) for ids in sequences])
        try:
            computed: Computed = self._all("score", "forward", arrays, rewards_only, timeout_s=CALL_TIMEOUT_S)[0]
        except RayError as error:
            # The ranks may no longer agree on what comes next, so none of them can be used.
            self._is_lost = True
            self.close()
            raise ScorerUnavailable(
                f"a scorer lost one of its {len(self._shards)} shards, or it failed ({type(error).__name__}): ask again"
            ) from error
        return computed

    def require_whole(self) -> None:
        """Checks that no shard was lost.

        Raises:
            ScorerUnavailable: One was.
        """
        if self._is_lost:
            raise ScorerUnavailable("a shard of this scorer was lost; it must be started again")

    def close(self) -> None:
        """Ends the shards and gives back what they had reserved."""
        for shard in self._shards:
            ray.kill(shard)
        if self._own_group is not None:
            ray.util.remove_placement_group(self._own_group)

    def _place(self, shards: int, resources: dict[str, float]) -> tuple[PlacementGroup, int]:
        """Where the shards go: into the bundles behind this actor's own, if it has some, else into new ones."""
        current = ray.util.get_current_placement_group()
        if current is not None and current.bundle_count > shards:
            return current, 1
        self._own_group = ray.util.placement_group([resources] * shards, strategy="PACK")
        if not self._own_group.wait(START_TIMEOUT_S):
            raise PlacementError(
                f"{shards} shards with {resources} each could not be placed within {START_TIMEOUT_S:g} s: ask for "
                "fewer, or let the autoscaler add nodes"
            )
        return self._own_group, 0

    def _join(self) -> None:
        """Lets the ranks meet; a port that was free may be taken in between, so it is tried again."""
        for attempt in range(1, JOIN_ATTEMPTS + 1):
            try:
                address, port = ray.get(self._shards[0].free_address.remote(), timeout=START_TIMEOUT_S)
                self._all("meet", "join", address, port, timeout_s=START_TIMEOUT_S)
                return
            except (RayActorError, GetTimeoutError):
                raise
            except RayError:
                if attempt == JOIN_ATTEMPTS:
                    raise

    def _all(self, doing: str, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """Calls a method on all shards; one caller at a time, so that all ranks make all calls in one order."""
        with self._sequencer:
            calls = [getattr(shard, method).remote(*arguments) for shard in self._shards]
            try:
                return ray.get(calls, timeout=timeout_s)
            except GetTimeoutError as error:
                raise ScorerUnavailable(f"waited {timeout_s:g} s for {len(calls)} shards to {doing}") from error
