"""Which preferences a step takes, and which rank and micro-batch computes each of them.

Everything here is a function of token ids and numbers: a seed, a step, a world size, a token budget. So every rank
derives the same plan by itself, a resumed run meets the same preferences, and the loss (a mean over the global batch)
depends neither on the budget nor on the number of ranks. What shares a prompt is kept together, in a step and in a
micro-batch, because together the prompt is computed once. Knows nothing of tensors, models or files.

Shape legend: N preferences of a data set, G of a global batch, U units to place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_critic.batching.prefix_tree import PrefixTree, TokenIds, lexicographic_order, shared_lengths

# Units stay together where computing the next one apart would cost at least a third more tokens.
KEPT_TOGETHER_FROM = 0.25


@dataclass(frozen=True)
class MicroBatch:
    """Units (preferences or sequences) that go through the critic together on one rank.

    Attributes:
        units: Their positions in the list that was planned.
        weight: 1, or 0 for a dummy that a rank runs only because the others still have work: ZeRO's collectives must
            match on all ranks.
    """

    units: tuple[int, ...]
    weight: int = 1


@dataclass
class _Group:
    """Units that stay together.

    Attributes:
        units: Their positions in the list that was planned.
        tokens: What they cost together.
        shared: Tokens that its first unit shares with the unit before, which ends the group before.
        least_shared: The least that any of its units shares with the unit before.
    """

    units: list[int]
    tokens: int
    shared: int = 0
    least_shared: int = 0


def plan_micro_batches(
    units: Sequence[Sequence[TokenIds]], world_size: int, token_budget: int, prefix_tree: bool
) -> list[list[MicroBatch]]:
    """Places units on ranks and cuts each rank's share into micro-batches within the budget.

    The costliest first, each group of units goes to the rank with the fewest tokens so far, so that ranks finish
    together. A unit dearer than the budget gets a micro-batch of its own. Ranks with fewer micro-batches get dummies of
    weight zero.

    Args:
        units: The sequences of each unit: two for a preference, one for a sequence by itself.
        world_size: Number of ranks.
        token_budget: The most tokens computed for a micro-batch: with ``prefix_tree`` those of its tree, else those of
            its padded rows.
        prefix_tree: Whether micro-batches become prefix trees. Then units that share much are kept together and every
            rank takes its units in the order of the tree; otherwise in the order of their lengths.

    Returns:
        For each rank its micro-batches, equally many for all. Every unit is in exactly one micro-batch of weight 1.

    Raises:
        ValueError: There are no units.
    """
    if not units:
        raise ValueError("there is nothing to plan: no units were given")
    groups = _groups_that_share(units, world_size, token_budget) if prefix_tree else _groups_by_length(units)
    shares = _place([group.tokens for group in groups], world_size)
    if prefix_tree:
        plan = [_cut_trees(groups, share, token_budget) for share in shares]
    else:
        plan = [_cut_rows([groups[index].units[0] for index in share], units, token_budget) for share in shares]
    most = max(len(micro_batches) for micro_batches in plan)
    dummy = MicroBatch((min(groups, key=lambda group: group.tokens).units[0],), weight=0)
    for micro_batches in plan:
        # First, not last: the optimizer steps after the last micro-batch, which should be a real one.
        micro_batches[:0] = [dummy] * (most - len(micro_batches))
    return plan


def plan_sequences(
    sequences: Sequence[TokenIds], world_size: int, token_budget: int, prefix_tree: bool
) -> list[list[MicroBatch]]:
    """`plan_micro_batches` for single sequences of token ids.

    Raises:
        ValueError: There is no sequence, or an empty one.
    """
    for index, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise ValueError(f"sequence {index} is empty; every sequence needs at least one token")
    return plan_micro_batches([[sequence] for sequence in sequences], world_size, token_budget, prefix_tree)


def _groups_that_share(units: Sequence[Sequence[TokenIds]], world_size: int, token_budget: int) -> list[_Group]:
    """Units in the order of the prefix tree; neighbours that share much are one group, if a rank can take it."""
    firsts = [np.asarray(unit[0]) for unit in units]
    order = lexicographic_order(firsts)
    shared = shared_lengths([firsts[unit] for unit in order])
    tokens = [len(units[unit][0]) if len(units[unit]) == 1 else len(PrefixTree.build(units[unit])) for unit in order]
    most = min(token_budget, -(-(sum(tokens) - sum(shared)) // world_size))
    groups: list[_Group] = []
    for unit, cost, common in zip(order, tokens, shared, strict=True):
        fits = groups and groups[-1].tokens + cost - common <= most
        if fits and common >= KEPT_TOGETHER_FROM * cost:
            groups[-1].units.append(unit)
            groups[-1].tokens += cost - common
            groups[-1].least_shared = min(groups[-1].least_shared, common)
        else:
            groups.append(_Group([unit], cost, common, common))
    return groups


def _groups_by_length(units: Sequence[Sequence[TokenIds]]) -> list[_Group]:
    """Every unit by itself, the one with the longest sequence first."""
    tokens = [sum(len(sequence) for sequence in unit) for unit in units]
    order = sorted(range(len(units)), key=lambda unit: (-_longest(units[unit]), -tokens[unit], unit))
    return [_Group([unit], tokens[unit]) for unit in order]


def _place(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """For each rank the indices of its costs, in their order."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = min(range(world_size), key=load.__getitem__)
        shares[rank].append(index)
        load[rank] += costs[index]
    return [sorted(share) for share in shares]


def _cut_trees(groups: Sequence[_Group], share: Sequence[int], token_budget: int) -> list[MicroBatch]:
    micro_batches: list[MicroBatch] = []
    current: list[int] = []
    spent = 0
    for position, index in enumerate(share):
        # What a group shares with an earlier one is the least that all neighbours between them share.
        between = groups[share[position - 1] + 1 : index] if position else []
        shared = min([groups[index].shared, *(group.least_shared for group in between)])
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
    for unit in share:
        # Sorted by length, so the first unit of a micro-batch decides how long its rows are.
        rows = sum(len(units[other]) for other in (*current, unit))
        if current and rows * _longest(units[current[0]]) > token_budget:
            micro_batches.append(MicroBatch(tuple(current)))
            current = []
        current.append(unit)
    return [*micro_batches, MicroBatch(tuple(current))] if current else micro_batches


def _longest(unit: Sequence[TokenIds]) -> int:
    return max(len(sequence) for sequence in unit)
