"""A scorer's critic that is larger than one device: its shards are the ranks of a group, and it is called like one.

ZeRO-3 gathers every layer from all ranks, so a forward pass is collective; see `actors.runtime.rank_group`. Knows nothing of
what is scored, or who asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ray
import torch

from actors.runtime.rank_group import Rank, RankGroup
from actors.runtime.storage import local_directory
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import CriticCard, load_encoder, read_card
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.errors import RankLost, ScorerUnavailable
from rlhf_critic.scoring.request_batcher import Computed

LOAD_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 300.0


class ShardedCriticRank(Rank):
    """One rank of a sharded critic."""

    def load(self, checkpoint: str, token_budget: int) -> bool:
        """Loads this rank's shard; returns whether its batches are prefix trees."""
        from rlhf_critic.training.inference_engine import InferenceEngine

        with local_directory(checkpoint) as directory:
            self._engine = InferenceEngine.from_checkpoint(directory, token_budget)
        return self._engine.critic.prefix_tree

    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed | None:
        """See `ShardedCritic.forward`; the first rank answers."""
        with torch.no_grad():
            rewards_or_values = self._engine.rewards if rewards_only else self._engine.values
            outputs = [np.atleast_1d(output) for output in rewards_or_values(sequences)]
        return Computed(outputs, self._engine.computed_tokens) if self.rank == 0 else None


class ShardedCritic:
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
        with local_directory(checkpoint) as directory:
            self.card: CriticCard = read_card(directory)
            self.encoder: Encoder = load_encoder(directory, self.card)
        self.tokens_at_once = token_budget * shards
        self._is_lost = False
        self._group = RankGroup(
            "scorer",
            ShardedCriticRank,
            shards,
            cpus_per_rank=cpus_per_shard,
            use_gpu=use_gpu,
            call_timeout_s=CALL_TIMEOUT_S,
            in_own_bundles=True,  # a replica reserves them with itself, for the critic it serves and the next one
        )
        try:
            loaded = self._group.call_all("load the critic", "load", checkpoint, token_budget, timeout_s=LOAD_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.prefix_tree: bool = loaded[0]

    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed:
        """Computes a micro-batch; each shard takes a part of it. See `rlhf_critic.scoring.request_batcher.RequestBatcher`.

        Raises:
            ScorerUnavailable: A shard is lost or did not answer in time; the group has ended itself.
        """
        arrays = ray.put([np.asarray(ids, dtype=np.int64) for ids in sequences])
        try:
            computed: Computed = self._group.call_all("score", "forward", arrays, rewards_only)[0]
        except RankLost as error:
            self._is_lost = True
            shards = len(self._group)
            raise ScorerUnavailable(f"a scorer lost one of its {shards} shards ({error}): ask again") from error
        return computed

    def check_healthy(self) -> None:
        """Checks that no shard was lost.

        Raises:
            ScorerUnavailable: One was.
        """
        if self._is_lost:
            raise ScorerUnavailable("a shard of this scorer was lost; it must be started again")

    def close(self) -> None:
        """Ends the shards and gives back what they had reserved."""
        self._group.close()
