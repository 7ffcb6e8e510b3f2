"""Distribution of a global batch over ranks and micro-batches.

A plan is a function of token ids, world size and token budget, so every rank derives the same plan independently. The
loss (a mean over the global batch) depends neither on the budget nor on the number of ranks. Units with the same prompt
stay together in a micro-batch, so that the prompt is computed once. Knows nothing about tensors, models or files.

Shape legend: U units to place.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_critic.batching.prefix_tree import (
    PrefixTree,
    TokenIds,
    lexicographic_order,
    shared_length,
    shared_lengths,
)

KEPT_TOGETHER_FROM = 0.25  # neighbours stay together if they share at least this part of the next unit's tokens


@dataclass(frozen=True)
class MicroBatch:
    """Units (preferences or sequences) that one rank computes together.

    Attributes:
        units: Positions of the units in the planned list.
        weight: 1, or 0 for a dummy. A rank without work runs dummies, because the collectives of ZeRO must match on all
            ranks.
    """

    units: tuple[int, ...]
    weight: int = 1


@dataclass
class _Group:
    """Units that stay together, by their positions in the planned list."""

    units: list[int]
    tokens: int  # computed for all units together
    shared: int = 0  # tokens that the first unit shares with the last unit of the previous group
    least_shared: int = 0  # minimum number of tokens that a unit of the group shares with the unit before it


def plan_micro_batches(
    units: Sequence[Sequence[TokenIds]],
    world_size: int,
    token_budget: int,
    prefix_tree: bool,
    known_U: Sequence[int] | None = None,
) -> list[list[MicroBatch]]:
    """Assigns units to ranks and divides the share of each rank into micro-batches within the budget.

    Groups of units are assigned in order of decreasing cost, each to the rank with the fewest tokens so far, so that
    ranks finish together. A unit larger than the budget gets a separate micro-batch. Ranks with fewer micro-batches get
    dummies of weight zero.

    Args:
        units: Sequences of each unit: two for a preference, one for a single sequence.
        world_size: Number of ranks.
        token_budget: Maximum number of tokens computed per micro-batch. Counts the tokens of the tree with
            ``prefix_tree``, else those of the padded rows.
        prefix_tree: True if micro-batches become prefix trees. Then units with long shared prefixes stay together, and
            each rank takes its units in tree order. Otherwise it takes them in order of length.
        known_U: With ``prefix_tree``, and units of one sequence, the number of first tokens of each that a cache has
            and that are not computed. None without a cache.

    Returns:
        Micro-batches of each rank, the same number for all. Every unit is in exactly one micro-batch of weight 1.

    Raises:
        ValueError: The list of units is empty.
    """
    if not units:
        raise ValueError("nothing to plan: the list of units is empty")
    known_U = known_U or [0] * len(units)
    groups = _groups_that_share(units, world_size, token_budget, known_U) if prefix_tree else _groups_by_length(units)
    shares = _place([group.tokens for group in groups], world_size)
    if prefix_tree:
        least_shared = _RangeMinimum([group.least_shared for group in groups])
        plan = [_cut_trees(groups, least_shared, share, token_budget) for share in shares]
    else:
        plan = [_cut_rows([groups[index].units[0] for index in share], units, token_budget) for share in shares]
    longest = max(len(micro_batches) for micro_batches in plan)
    dummy = MicroBatch((min(groups, key=lambda group: group.tokens).units[0],), weight=0)
    for micro_batches in plan:
        # Dummies come first, because the optimizer steps after the last micro-batch, which should be a real one.
        micro_batches[:0] = [dummy] * (longest - len(micro_batches))
    return plan


def plan_sequences(
    sequences: Sequence[TokenIds],
    world_size: int,
    token_budget: int,
    prefix_tree: bool,
    known_S: Sequence[int] | None = None,
) -> list[list[MicroBatch]]:
    """Plans single sequences of token ids; see `plan_micro_batches`.

    Raises:
        ValueError: There are no sequences, or one is empty.
    """
    for index, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise ValueError(f"sequence {index} is empty; every sequence needs at least one token")
    return plan_micro_batches([[sequence] for sequence in sequences], world_size, token_budget, prefix_tree, known_S)


def _groups_that_share(
    units: Sequence[Sequence[TokenIds]], world_size: int, token_budget: int, known_U: Sequence[int]
) -> list[_Group]:
    """Groups units in prefix-tree order. Neighbours with long shared prefixes form one group, if it fits one rank."""
    firsts = [np.asarray(unit[0]) for unit in units]
    order = lexicographic_order(firsts)
    # A prefix that a cache has costs nothing, shared or not.
    neighbours = zip(order, shared_lengths([firsts[unit] for unit in order]), strict=True)
    shared = [max(0, common - known_U[unit]) for unit, common in neighbours]
    tokens = [_tree_tokens(units[unit]) - known_U[unit] for unit in order]
    limit = min(token_budget, -(-(sum(tokens) - sum(shared)) // world_size))
    groups: list[_Group] = []
    for unit, cost, common in zip(order, tokens, shared, strict=True):
        if groups and groups[-1].tokens + cost - common <= limit and common >= KEPT_TOGETHER_FROM * cost:
            groups[-1].units.append(unit)
            groups[-1].tokens += cost - common
            groups[-1].least_shared = min(groups[-1].least_shared, common)
        else:
            groups.append(_Group([unit], cost, common, common))
    return groups


def _tree_tokens(unit: Sequence[TokenIds]) -> int:
    """Returns the number of tokens in the prefix tree of a unit."""
    if len(unit) > 2:
        return len(PrefixTree.build(unit))
    tokens = sum(len(sequence) for sequence in unit)
    return tokens if len(unit) == 1 else tokens - shared_length(np.asarray(unit[0]), np.asarray(unit[1]))


def _groups_by_length(units: Sequence[Sequence[TokenIds]]) -> list[_Group]:
    """Makes one group per unit, sorted by decreasing length of the longest sequence."""
    tokens = [sum(len(sequence) for sequence in unit) for unit in units]
    order = sorted(range(len(units)), key=lambda unit: (-_longest(units[unit]), -tokens[unit], unit))
    return [_Group([unit], tokens[unit]) for unit in order]


def _place(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Returns the indices of the costs assigned to each rank, in ascending order."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    load = [(0, rank) for rank in range(world_size)]  # a heap
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        tokens, rank = load[0]
        shares[rank].append(index)
        heapq.heapreplace(load, (tokens + costs[index], rank))
    return [sorted(share) for share in shares]


class _RangeMinimum:
    """Minimum of any range of a list, in O(1) after O(n log n): each range is two overlapping powers of two long."""

    def __init__(self, values: Sequence[int]) -> None:
        level = np.asarray(values)
        self._levels = [level.tolist()]
        while len(level) > 2 ** (len(self._levels) - 1):
            half = 2 ** (len(self._levels) - 1)
            level = np.minimum(level[:-half], level[half:])
            self._levels.append(level.tolist())

    def of(self, start: int, end: int) -> int:
        """Returns the minimum of a range that is not empty."""
        power = (end - start).bit_length() - 1
        level: list[int] = self._levels[power]
        return min(level[start], level[end - 2**power])


def _cut_trees(
    groups: Sequence[_Group], least_shared: _RangeMinimum, share: Sequence[int], token_budget: int
) -> list[MicroBatch]:
    micro_batches: list[MicroBatch] = []
    current: list[int] = []
    spent = 0
    before = -1
    for index in share:
        shared = groups[index].shared
        if before >= 0 and index > before + 1:
            # The prefix shared with an earlier group is the minimum over all neighbours in between.
            shared = min(shared, least_shared.of(before + 1, index))
        before = index
        cost = groups[index].tokens - shared
        if current and spent + cost > token_budget:
            micro_batches.append(MicroBatch(tuple(current)))
            current, spent = [], 0
        spent += cost if current else groups[index].tokens
        current += groups[index].units
    return [*micro_batches, MicroBatch(tuple(current))] if current else micro_batches


def _cut_rows(share: Sequence[int], units: Sequence[Sequence[TokenIds]], token_budget: int) -> list[MicroBatch]:
    micro_batches: list[MicroBatch] = []
    current: list[int] = []
    rows = 0
    for unit in share:
        # Units are sorted by length, so the first unit of a micro-batch sets the row length.
        if current and (rows + len(units[unit])) * _longest(units[current[0]]) > token_budget:
            micro_batches.append(MicroBatch(tuple(current)))
            current, rows = [], 0
        current.append(unit)
        rows += len(units[unit])
    return [*micro_batches, MicroBatch(tuple(current))] if current else micro_batches


def _longest(unit: Sequence[TokenIds]) -> int:
    return max(len(sequence) for sequence in unit)
