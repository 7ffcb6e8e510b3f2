"""Which preferences a step takes, and which rank and micro-batch computes each of them.

Everything here is a function of numbers only: lengths, a seed, a step, a world size, a token budget. So every rank
derives the same plan by itself, a resumed run meets the same preferences, and the loss (a mean over the global batch)
depends neither on the budget nor on the number of ranks. Knows nothing of tensors, models or files.

Shape legend: N preferences (or sequences) of a data set, G of a global batch, U units to place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def steps_in(num_preferences: int, global_batch_size: int, epochs: float) -> int:
    """Optimizer steps that show each of ``num_preferences`` preferences ``epochs`` times; the last may be short."""
    return -(-round(num_preferences * epochs) // global_batch_size)


def global_batch(num_preferences: int, global_batch_size: int, epochs: float, seed: int, step: int) -> IntArray:
    """The rows of the preferences of one optimizer step, ``[G]``.

    Epochs follow each other without a gap: each is a permutation of all rows drawn from ``(seed, epoch)``, and a batch
    may take the end of one and the beginning of the next. Only the very last batch may be shorter than
    ``global_batch_size``.

    Raises:
        ValueError: ``step`` is past the end.
    """
    end = round(num_preferences * epochs)
    first, last = step * global_batch_size, min((step + 1) * global_batch_size, end)
    if first >= last:
        raise ValueError(f"step {step} is past the end: {end} preferences in batches of {global_batch_size}")
    positions_G = np.arange(first, last)
    rows_G = np.empty(len(positions_G), dtype=np.int64)
    for epoch in range(first // num_preferences, (last - 1) // num_preferences + 1):
        permutation_N = np.random.default_rng([seed, epoch]).permutation(num_preferences)
        in_epoch_G = positions_G // num_preferences == epoch
        rows_G[in_epoch_G] = permutation_N[positions_G[in_epoch_G] % num_preferences]
    return rows_G


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


def plan_micro_batches(lengths_U2: IntArray, world_size: int, token_budget: int) -> list[list[MicroBatch]]:
    """Places units on ranks and cuts each rank's share into micro-batches of padded rows.

    Longest first, each unit goes to the rank with the fewest tokens so far, so that ranks finish together; then each
    rank cuts its units, which are now sorted by length, so that rows times longest row stays within the budget. A unit
    longer than the budget gets a micro-batch of its own. Ranks with fewer micro-batches get dummies of weight zero.

    Args:
        lengths_U2: Tokens of every row of every unit: ``[U, 2]`` for preferences, ``[U, 1]`` for single sequences.
        world_size: Number of ranks.
        token_budget: The most padded tokens of a micro-batch.

    Returns:
        For each rank its micro-batches, equally many for all. Every unit is in exactly one micro-batch of weight 1.

    Raises:
        ValueError: There are no units.
    """
    if len(lengths_U2) == 0:
        raise ValueError("there is nothing to plan: no units were given")
    tokens_U, longest_U = lengths_U2.sum(axis=1), lengths_U2.max(axis=1)
    rows_per_unit = lengths_U2.shape[1]
    longest_first = np.lexsort((np.arange(len(longest_U)), -tokens_U, -longest_U))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for unit in longest_first:
        rank = min(range(world_size), key=lambda candidate: (load[candidate], candidate))
        shares[rank].append(int(unit))
        load[rank] += int(tokens_U[unit])
    plan = [_cut(share, longest_U, rows_per_unit, token_budget) for share in shares]
    most = max(len(micro_batches) for micro_batches in plan)
    dummy = MicroBatch((int(longest_first[-1]),), weight=0)
    for micro_batches in plan:
        # First, not last: the optimizer steps after the last micro-batch, which should be a real one.
        micro_batches[:0] = [dummy] * (most - len(micro_batches))
    return plan


def plan_sequences(sequences: Sequence[Sequence[int]], world_size: int, token_budget: int) -> list[list[MicroBatch]]:
    """`plan_micro_batches` for single sequences of token ids.

    Raises:
        ValueError: There is no sequence, or an empty one.
    """
    lengths = np.array([[len(sequence)] for sequence in sequences], dtype=np.int64).reshape(-1, 1)
    if not lengths.all():
        raise ValueError(f"sequence {int(np.argmin(lengths))} is empty; every sequence needs at least one token")
    return plan_micro_batches(lengths, world_size, token_budget)


def _cut(share: Sequence[int], longest_U: IntArray, rows_per_unit: int, token_budget: int) -> list[MicroBatch]:
    micro_batches: list[MicroBatch] = []
    current: list[int] = []
    for unit in share:
        # Sorted by length, so the first unit of a micro-batch decides how long its rows are.
        widest = int(longest_U[current[0]]) if current else 0
        if current and (len(current) + 1) * rows_per_unit * widest > token_budget:
            micro_batches.append(MicroBatch(tuple(current)))
            current = []
        current.append(unit)
    if current:
        micro_batches.append(MicroBatch(tuple(current)))
    return micro_batches
