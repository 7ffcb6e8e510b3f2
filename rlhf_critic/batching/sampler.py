"""The order of an epoch: which rows a training step takes. Knows no tensors, models or files."""

from __future__ import annotations

import numpy as np

from rlhf_critic.batching.prefix_tree import IntArray


def steps_in(num_preferences: int, global_batch_size: int, epochs: float) -> int:
    """Optimizer steps that show each of ``num_preferences`` preferences ``epochs`` times; the last may be short."""
    return -(-round(num_preferences * epochs) // global_batch_size)


def global_batch(prompts_N: IntArray, global_batch_size: int, epochs: float, seed: int, step: int) -> IntArray:
    """The rows of the preferences of one optimizer step, ``[G]``.

    Epochs follow each other without a gap: each shows all rows once, prompt by prompt, the prompts and the rows of each
    in an order drawn from ``(seed, epoch)``. A batch may take the end of one epoch and the beginning of the next; only
    the very last may be shorter than ``global_batch_size``. Comparisons of the same prompt in one step, as in Ouyang et
    al. (2022), section 3.5, share its computation.

    Args:
        prompts_N: The number of each row's prompt: rows with the same number share it.
        global_batch_size: Rows of a step.
        epochs: How often each row is shown in all.
        seed: Of the order.
        step: From 0.

    Raises:
        ValueError: ``step`` is past the end.
    """
    num_preferences = len(prompts_N)
    end = round(num_preferences * epochs)
    first, last = step * global_batch_size, min((step + 1) * global_batch_size, end)
    if first >= last:
        raise ValueError(f"step {step} is past the end: {end} preferences in batches of {global_batch_size}")
    positions_G = np.arange(first, last)
    rows_G = np.empty(len(positions_G), dtype=np.int64)
    for epoch in range(first // num_preferences, (last - 1) // num_preferences + 1):
        rng = np.random.default_rng([seed, epoch])
        place_of_prompt = rng.permutation(int(prompts_N.max()) + 1)
        order_N = np.lexsort((rng.permutation(num_preferences), place_of_prompt[prompts_N]))
        in_epoch_G = positions_G // num_preferences == epoch
        rows_G[in_epoch_G] = order_N[positions_G[in_epoch_G] % num_preferences]
    return rows_G


def is_due(step: int, every: int) -> bool:
    """Returns whether something that happens every ``every`` steps (0: never) happens after this step."""
    return every > 0 and step % every == 0
