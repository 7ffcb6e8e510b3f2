"""Order of the data: the rows that each step takes. Knows nothing about tensors, models or files."""

from __future__ import annotations

import math

import numpy as np

from rlhf_critic.batching.prefix_tree import IntArray


def steps_in(num_preferences: int, global_batch_size: int, epochs: float) -> int:
    """Returns the number of optimizer steps that show each preference ``epochs`` times; the last may be short."""
    return -(-round(num_preferences * epochs) // global_batch_size)


def rows_of_step(prompts_N: IntArray, size: int, seed: int, step: int, epochs: float | None = None) -> IntArray:
    """Returns the rows of one step, int64 ``[G]``.

    Epochs follow each other without a gap. Each epoch shows all rows once, grouped by prompt. The order of the prompts
    and of the rows within a prompt is sampled from ``(seed, epoch)``. A step may take the end of one epoch and the
    beginning of the next. Comparisons of one prompt in the same step share its computation, as in Ouyang et al. (2022),
    section 3.5.

    Args:
        prompts_N: Prompt number of each row. Rows with the same number share a prompt.
        size: Rows per step. Only the last step may have fewer.
        seed: Seed of the data order.
        step: Step number, from 0.
        epochs: Number of times that each row is shown in total. None means without end.

    Raises:
        ValueError: ``step`` is past the end.
    """
    num_rows = len(prompts_N)
    end = math.inf if epochs is None else round(num_rows * epochs)
    first, last = step * size, int(min((step + 1) * size, end))
    if first >= last:
        raise ValueError(f"step {step} is past the end: {end} rows in steps of {size}")
    positions_G = np.arange(first, last)
    rows_G = np.empty(len(positions_G), dtype=np.int64)
    for epoch in range(first // num_rows, (last - 1) // num_rows + 1):
        rng = np.random.default_rng([seed, epoch])
        rank_of_prompt = rng.permutation(int(prompts_N.max()) + 1)
        order_N = np.lexsort((rng.permutation(num_rows), rank_of_prompt[prompts_N]))
        in_epoch_G = positions_G // num_rows == epoch
        rows_G[in_epoch_G] = order_N[positions_G[in_epoch_G] % num_rows]
    return rows_G


def is_due(step: int, every: int) -> bool:
    """Returns whether something that happens every ``every`` steps (0: never) happens after this step."""
    return every > 0 and step % every == 0
