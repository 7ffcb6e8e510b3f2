"""A scorer's critic that is larger than one device: its shards are the ranks of a group.

ZeRO-3 gathers every layer from all ranks, so a forward pass is collective; see `actors.runtime.rank_group`. Knows
nothing about what is scored, or for whom.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import ray
import torch

from actors.runtime.rank_group import Rank, RankGroup
from actors.runtime.storage import local_directory
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import CriticCard, OpenedCritic
from rlhf_critic.checkpoint.reward_model import open_reward_model
from rlhf_critic.config.model import Dtype, resolve_dtype
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.errors import RankLost, ScorerUnavailable
from rlhf_critic.scoring.request_batcher import Computed

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 300.0


class ShardedCriticRank(Rank):
    """One rank of a sharded critic."""

    def node(self) -> str:
        """Returns the id of this rank's node."""
        return ray.get_runtime_context().get_node_id()

    def open_critic(self, checkpoint: str, ranks: Sequence[int]) -> str | None:
        """Opens the critic's directory if this is one of ``ranks``, and keeps it open until `load` is done."""
        self._opened = ExitStack()
        return str(self._opened.enter_context(local_directory(checkpoint))) if self.rank in ranks else None

    def load(self, directories: Sequence[str], config: ScorerConfig, dtype: Dtype) -> bool:
        """Loads this rank's shard from its node's directory; returns whether its batches are prefix trees."""
        from rlhf_critic.model.factory import DTYPE_OF
        from rlhf_critic.training.inference_engine import InferenceEngine

        with self._opened:
            opened = open_reward_model(directories[self.rank], config.checkpoint, config.encoding, verify=False)
            self._engine = InferenceEngine.from_checkpoint(opened, config.token_budget, DTYPE_OF[dtype])
        return self._engine.critic.prefix_tree

    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed | None:
        """See `ShardedCritic.forward`; the first rank returns the result."""
        with torch.no_grad():
            rewards_or_values = self._engine.rewards if rewards_only else self._engine.values
            outputs = [np.atleast_1d(output) for output in rewards_or_values(sequences)]
        if (stds_S := self._engine.stds_S) is not None:
            outputs = [np.append(output, std) for output, std in zip(outputs, stds_S, strict=True)]
        return Computed(outputs, self._engine.computed_tokens) if self.rank == 0 else None


class ShardedCritic:
    """The handle of a critic's shards, used as an `actors.serving.scorer.LocalCritic` is.

    Args:
        config: Options of the scorer. The node of every shard must reach its checkpoint.
        directory: Directory of the checkpoint on this machine, verified by the caller.
        opened: The critic of that directory.
        shards: Number of shards; each reserves ``cpus_per_shard`` and, with ``use_gpu``, a GPU.

    Raises:
        CheckpointError: The critic cannot be loaded.
        PlacementError: The cluster did not have room for the shards in time.
    """

    def __init__(
        self,
        config: ScorerConfig,
        directory: Path,
        opened: OpenedCritic,
        shards: int,
        cpus_per_shard: float,
        use_gpu: bool,
    ) -> None:
        self.card: CriticCard = opened.card
        self.encoder: Encoder = opened.encoder
        self.has_stds = opened.posterior() is not None
        self.tokens_at_once = config.token_budget * shards
        self.known_lengths = self.prefix_cache = None
        if config.prefix_cache_bytes:
            logger.warning("no prefix cache: a critic on several shards does not have one")
        self._is_lost = False
        self._group = RankGroup(
            "scorer",
            ShardedCriticRank,
            shards,
            cpus_per_rank=cpus_per_shard,
            use_gpu=use_gpu,
            call_timeout_s=CALL_TIMEOUT_S,
            in_own_bundles=True,  # the replica reserves bundles that hold a served critic and its successor
        )
        try:
            directories = self._directories(config.checkpoint, directory)
            arguments = (directories, config, resolve_dtype(config.dtype, use_gpu))
            loaded = self._group.call_all("load the critic", "load", *arguments, timeout_s=LOAD_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.prefix_tree: bool = loaded[0]

    def _directories(self, checkpoint: str, directory: Path) -> list[str]:
        """Returns the directory that each rank reads. On each other node, one rank opens it for the others there."""
        nodes = self._group.call_all("name its node", "node")
        own = ray.get_runtime_context().get_node_id()
        first = {node: nodes.index(node) for node in nodes if node != own}
        opened = self._group.call_all(
            "open the critic", "open_critic", checkpoint, list(first.values()), timeout_s=LOAD_TIMEOUT_S
        )
        return [str(directory) if node == own else opened[first[node]] for node in nodes]

    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> Computed:
        """Computes a micro-batch, a part on each shard. See `rlhf_critic.scoring.request_batcher.RequestBatcher`.

        Raises:
            ScorerUnavailable: A shard was lost or did not answer in time; the group has ended.
        """
        arrays = ray.put([np.asarray(ids, dtype=np.int64) for ids in sequences])
        try:
            return self._group.call_all("score", "forward", arrays, rewards_only)[0]
        except RankLost as error:
            self._is_lost = True
            shards = len(self._group)
            raise ScorerUnavailable(f"a scorer lost one of its {shards} shards ({error}): try again") from error

    def check_healthy(self) -> None:
        """Raises an error if a shard was lost.

        Raises:
            ScorerUnavailable: A shard was lost.
        """
        if self._is_lost:
            raise ScorerUnavailable("a shard of this scorer was lost; start the scorer again")

    def close(self) -> None:
        """Ends the shards and releases what Ray reserved for them."""
        self._group.close()
