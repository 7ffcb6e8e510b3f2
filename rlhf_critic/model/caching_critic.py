"""A critic with a prefix cache: computes only the tokens whose keys and values no earlier call has left.

The keys and values of all computed tokens stay in a store of limited size, so callers that send one response at a time,
or a conversation turn by turn, share prefixes across calls. Knows nothing about requests, versions or text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_critic.batching.prefix_cache import PrefixCache, PrefixCacheFigures
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.batching.prefix_tree_batch import PrefixTreeBatch
from rlhf_critic.model.critic import Critic


class CachingCritic:
    """A critic and the cache of its prefixes. One thread calls `forward` and `known_lengths`.

    Args:
        critic: Critic in evaluation mode with a store (`rlhf_critic.model.backbone.Backbone.create_store`).
        device: Device of the critic.

    Raises:
        ValueError: The critic has no store.
    """

    def __init__(self, critic: Critic, device: torch.device) -> None:
        if critic.store is None:
            raise ValueError("the critic has no store: call create_store first")
        self._critic, self._device, self._store = critic, device, critic.store
        self._cache = PrefixCache(self._store.slots)

    @property
    def figures(self) -> PrefixCacheFigures:
        """Figures of the cache now; any thread may read them."""
        cache, size = self._cache, self._store.bytes_per_slot
        return PrefixCacheFigures(
            self._store.slots * size, cache.cached_tokens * size, cache.hit_tokens, cache.evicted_tokens
        )

    def known_lengths(self, sequences: Sequence[TokenIds], rewards_only: bool) -> list[int]:
        """Returns the number of first tokens of each sequence that would not be computed now."""
        return self._cache.known_lengths(sequences, with_values=not rewards_only)

    @torch.no_grad()
    def forward(self, sequences: Sequence[TokenIds], rewards_only: bool) -> tuple[Tensor, Tensor, int]:
        """Computes one micro-batch.

        Args:
            sequences: Token ids, none empty.
            rewards_only: Whether to compute rewards instead of values.

        Returns:
            Rewards ``[S]`` or values ``[S, L]`` and the last hidden state of each sequence, ``[S, D]``, as `Critic`
            computes them, and the number of computed tokens.
        """
        with self._cache.lease(sequences, with_values=not rewards_only) as lease:
            batch = self._critic.batch_of(sequences, self._device, lease)
            assert isinstance(batch, PrefixTreeBatch), "only prefix trees have a store"
            output, states_SD = self._critic(batch, rewards_only=rewards_only, with_states=True)
            lease.keep(batch.tree)
        return output, states_SD, batch.computed_tokens
