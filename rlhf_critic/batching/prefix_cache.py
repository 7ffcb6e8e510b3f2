"""Prefix cache: a radix tree over token ids that remembers which slot of a store holds each token's keys and values.

A forward pass takes a *lease* on the cached prefixes of its sequences. During the lease they are not evicted, and slots
are reserved for the tokens that the pass computes. At its end the computed runs are added to the tree. When no slot is
free, the tokens that were used longest ago are evicted, from the ends of paths, so every cached token keeps its
ancestors. A token's keys and values depend on the tokens before it and on the weights, so one cache serves one critic.
One thread uses a cache. Knows nothing about tensors or models.

Shape legend: S sequences, N tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from rlhf_critic.batching.prefix_tree import IntArray, PrefixTree, TokenIds, shared_length

_NONE: IntArray = np.empty(0, dtype=np.int64)

# Minimum part of a sequence that a cached prefix must have to be used. Every later token attends to the prefix in a
# separate call, which takes as long as computing about 2 % of the tokens. So it is cheaper to compute a BOS, or the
# first tokens of a chat template, again.
USED_FROM = 1 / 32


@dataclass(eq=False)
class _Node:
    """Tokens that follow those of the parent, and their slots."""

    ids_N: IntArray
    slots_N: IntArray
    has_values: bool
    parent: _Node | None
    leases: int = 0
    children: dict[int, _Node] = field(default_factory=dict)


@dataclass(frozen=True)
class PrefixCacheFigures:
    """Figures of a prefix cache.

    Attributes:
        max_bytes: Size of its store.
        bytes: Bytes of the store that are in use.
        hit_tokens: Tokens of scored sequences that it had, each sequence counted separately, since it began.
        evicted_tokens: Tokens that it evicted since it began.
    """

    max_bytes: int
    bytes: int
    hit_tokens: int
    evicted_tokens: int


@dataclass(frozen=True, eq=False)
class Lease:
    """Cached prefixes of the sequences of one forward pass.

    Attributes:
        slots_S: Slots of the first tokens of each sequence that are cached, at most all but the last: ``S`` arrays.
    """

    slots_S: list[IntArray]
    _cache: PrefixCache
    _sequences: list[IntArray]
    _has_values: bool
    _reserved: list[IntArray] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of cached tokens of all sequences together, each counted separately."""
        return sum(map(len, self.slots_S))

    def reserve(self, tokens: int) -> IntArray:
        """Returns slots for the first tokens that the pass computes, fewer than asked for if the cache has no more."""
        self._reserved.append(self._cache._take(tokens))
        return self._reserved[-1]

    def keep(self, tree: PrefixTree) -> None:
        """Adds the computed tokens of the pass, which are now in the slots of `reserve`, in the order of the tree."""
        slots = np.concatenate([_NONE, *self._reserved])
        self._reserved.clear()
        columns = (tree.run_starts_R, tree.run_ends_R, tree.run_sequences_R)
        for run in tree.computed_runs.tolist():
            start, end, sequence = (int(column[run]) for column in columns)
            first = int(tree.position_ids_T[start])
            own, slots = slots[: end - start], slots[end - start :]
            self._cache._add(self._sequences[sequence], first, own, self._has_values)
        assert not len(slots), "there are no more slots than computed tokens"


def _count_lease(node: _Node, change: int) -> None:
    while node.parent is not None:
        node.leases += change
        node = node.parent


class PrefixCache:
    """A radix tree over token ids whose tokens own slots.

    Args:
        slots: Number of slots, the maximum number of cached tokens.

    Attributes:
        hit_tokens: Tokens of sequences that were found so far, each sequence counted separately.
        evicted_tokens: Tokens that were evicted so far.
    """

    def __init__(self, slots: int) -> None:
        self.hit_tokens = 0
        self.evicted_tokens = 0
        self._root = _Node(_NONE, _NONE, True, None)
        # The nodes, used longest ago first. Using a path moves its nodes to the end, the root's child last, so a node
        # stands before its parent and the first node without a lease is a leaf.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        self._slots = slots
        self._unused = 0  # slots from here on were never taken
        self._freed: list[IntArray] = []
        self._free_count = slots

    @property
    def cached_tokens(self) -> int:
        """Number of slots in use."""
        return self._slots - self._free_count

    def known_lengths(self, sequences: Sequence[TokenIds], with_values: bool) -> list[int]:
        """Returns the number of first tokens of each sequence that a lease would find now."""
        arrays = (np.asarray(sequence, dtype=np.int64) for sequence in sequences)
        return [sum(used for _, used in self._find(ids[:-1], with_values)) for ids in arrays]

    @contextmanager
    def lease(self, sequences: Sequence[TokenIds], with_values: bool) -> Iterator[Lease]:
        """Finds the cached prefixes of sequences and keeps them until the end of the block.

        The last token of a sequence is never taken from the cache, because its output is wanted.

        Args:
            sequences: Token ids, none empty.
            with_values: Whether the pass needs the critic's values at cached tokens and computes those of the others.
        """
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        paths = [self._find(ids[:-1], with_values) for ids in arrays]
        slots_S = [np.concatenate([_NONE, *(node.slots_N[:used] for node, used in path)]) for path in paths]
        lease = Lease(slots_S, self, arrays, with_values)
        self.hit_tokens += lease.tokens
        ends = [path[-1][0] for path in paths if path]
        for end in ends:
            self._touch(end)
            _count_lease(end, 1)
        try:
            yield lease
        finally:
            for end in ends:  # along the parents of now, because a split may have added some
                _count_lease(end, -1)
            for slots in lease._reserved:
                self._release(slots)

    def _find(self, ids: IntArray, with_values: bool) -> list[tuple[_Node, int]]:
        """Returns the nodes along the longest cached prefix, and the number of tokens of each that belong to it.

        Returns none if the prefix is too short to be used.
        """
        path = []
        node, start = self._root, 0
        while start < len(ids):
            child = node.children.get(int(ids[start]))
            if child is None or (with_values and not child.has_values):
                break
            used = shared_length(child.ids_N, ids[start : start + len(child.ids_N)])
            path.append((child, used))
            start += used
            if used < len(child.ids_N):
                break
            node = child
        return path if start >= USED_FROM * len(ids) else []

    def _touch(self, node: _Node) -> None:
        while node.parent is not None:
            self._order.move_to_end(node)
            node = node.parent

    def _add(self, ids: IntArray, first: int, slots_N: IntArray, has_values: bool) -> None:
        """Adds the tokens of ``ids`` from ``first`` on that have slots, or releases the slots of known tokens."""
        ids = ids[: first + len(slots_N)]
        node, start = self._root, 0
        while start < len(ids):
            child = node.children.get(int(ids[start]))
            if child is None:
                break
            used = shared_length(child.ids_N, ids[start : start + len(child.ids_N)])
            if used < len(child.ids_N):
                child = self._split(child, used)
            start += used
            again = slots_N[max(0, start - used - first) : max(0, start - first)]
            if has_values and not child.has_values and len(again) == used and not child.leases:
                child.slots_N, again, child.has_values = again, child.slots_N, True
            self._release(again)
            node = child
        if first <= start < len(ids):
            # Without values at the parent, those of the child could not be found.
            leaf = _Node(ids[start:].copy(), slots_N[start - first :].copy(), has_values and node.has_values, node)
            node.children[int(ids[start])] = leaf
            self._order[leaf] = None
            node = leaf
        elif start < first:
            self._release(slots_N)  # the tokens before them are not cached
        self._touch(node)

    def _split(self, node: _Node, length: int) -> _Node:
        """Splits a node; returns the new parent with its first tokens."""
        assert node.parent is not None, "the root has no tokens"
        head = _Node(
            node.ids_N[:length].copy(), node.slots_N[:length].copy(), node.has_values, node.parent, node.leases
        )
        node.parent.children[int(node.ids_N[0])] = head
        node.ids_N, node.slots_N, node.parent = node.ids_N[length:].copy(), node.slots_N[length:].copy(), head
        head.children[int(node.ids_N[0])] = node
        self._order[head] = None
        self._touch(node)
        return head

    def _take(self, slots: int) -> IntArray:
        """Takes free slots, after evictions if need be; fewer if leases hold the others."""
        self._evict(slots - self._free_count)
        slots = min(slots, self._free_count)
        self._free_count -= slots
        taken, missing = [_NONE], slots
        while missing and self._freed:
            freed = self._freed.pop()
            taken.append(freed[:missing])
            if missing < len(freed):
                self._freed.append(freed[missing:])
            missing -= len(taken[-1])
        taken.append(np.arange(self._unused, self._unused + missing))
        self._unused += missing
        return np.concatenate(taken)

    def _evict(self, tokens: int) -> None:
        """Evicts tokens, those first that were used longest ago."""
        skipped = []
        while tokens > 0 and self._order:
            node = next(iter(self._order))
            if node.leases:
                self._order.pop(node)
                skipped.append(node)
                continue
            assert not node.children, "a node stands before its parent"
            kept = max(0, len(node.ids_N) - tokens)
            tokens -= len(node.ids_N) - kept
            self.evicted_tokens += len(node.ids_N) - kept
            self._release(node.slots_N[kept:])
            if kept:
                node.ids_N, node.slots_N = node.ids_N[:kept].copy(), node.slots_N[:kept].copy()
            else:
                self._order.pop(node)
                assert node.parent is not None, "the root is not in the order"
                del node.parent.children[int(node.ids_N[0])]
        for node in reversed(skipped):
            self._order[node] = None
            self._order.move_to_end(node, last=False)

    def _release(self, slots_N: IntArray) -> None:
        if len(slots_N):
            self._freed.append(slots_N)
            self._free_count += len(slots_N)
