"""Order of the data: the rows that each step takes. Knows nothing about tensors, models or files.

Shape legend: N rows of the data, G rows of a step.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.batching.prefix_tree import IntArray


def steps_in(num_preferences: int, global_batch_size: int, epochs: float) -> int:
    """Returns the number of optimizer steps that show each preference ``epochs`` times; the last may be short."""
    return -(-round(num_preferences * epochs) // global_batch_size)


class DataOrder:
    """Order in which the steps of a run take the rows of its data.

    Epochs follow each other without a gap. Each epoch shows all rows once, grouped by prompt. The order of the prompts
    and of the rows within a prompt is sampled from ``(seed, epoch)``. A step may take the end of one epoch and the
    beginning of the next. Comparisons of one prompt in the same step share its computation, as in Ouyang et al. (2022),
    section 3.5.

    The order of the newest epoch is kept, 4 bytes a row. So an epoch is sorted once, and a step costs O(its rows).
    """

    def __init__(self, prompts_N: NDArray[np.integer], seed: int) -> None:
        """Takes the prompt number of each row. Rows with the same number share a prompt.

        Args:
            prompts_N: Prompt numbers from 0.
            seed: Seed of the order.
        """
        self._prompts_N = prompts_N
        self._seed = seed
        self._kept: tuple[int, NDArray[np.int32]] | None = None  # the newest epoch and its order

    def rows_of_step(self, size: int, step: int, epochs: float | None = None) -> IntArray:
        """Returns the rows of one step, int64 ``[G]``.

        Args:
            size: Rows per step. Only the last step may have fewer.
            step: Step number, from 0. Any step may be asked for; steps of one epoch after each other are the cheapest.
            epochs: Number of times that each row is shown in total. None means without end.

        Raises:
            ValueError: ``step`` is past the end.
        """
        num_rows = len(self._prompts_N)
        end = math.inf if epochs is None else round(num_rows * epochs)
        first, last = step * size, int(min((step + 1) * size, end))
        if first >= last:
            raise ValueError(f"step {step} is past the end: {end} rows in steps of {size}")
        positions_G = np.arange(first, last)
        rows_G = np.empty(len(positions_G), dtype=np.int64)
        for epoch in range(first // num_rows, (last - 1) // num_rows + 1):
            in_epoch_G = positions_G // num_rows == epoch
            rows_G[in_epoch_G] = self._order_of_epoch(epoch)[positions_G[in_epoch_G] % num_rows]
        return rows_G

    def _order_of_epoch(self, epoch: int) -> NDArray[np.int32]:
        if self._kept is None or self._kept[0] != epoch:
            self._kept = None  # two orders at once would double the memory
            self._kept = epoch, self._sorted_rows(epoch)
        return self._kept[1]

    def _sorted_rows(self, epoch: int) -> NDArray[np.int32]:
        """Sorts the rows by the random places of their prompts, and by their own random places within a prompt."""
        rng = np.random.default_rng([self._seed, epoch])
        place_of_prompt = rng.permutation(int(self._prompts_N.max()) + 1)
        place_N = rng.permutation(len(self._prompts_N))
        row_at_place_N = np.empty(len(place_N), dtype=np.int32)
        row_at_place_N[place_N] = np.arange(len(place_N), dtype=np.int32)
        # Sorting one number a row is several times as fast as sorting by two keys. It is below 2**63 up to 3e9 rows.
        keys_N = place_of_prompt[self._prompts_N]
        keys_N *= len(place_N)
        keys_N += place_N
        keys_N.sort()
        keys_N %= len(place_N)
        return row_at_place_N[keys_N]


def is_due(step: int, every: int) -> bool:
    """Returns whether something that happens every ``every`` steps (0: never) happens after this step."""
    return every > 0 and step % every == 0
