"""Comparisons with slow definitions, and random rollouts with masks, for tests of the mathematics of PPO."""

import math

import torch

SEEDS = range(5)


def close(actual, expected, tolerance=1e-6):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def random_mask(generator):
    """Makes rollouts of many lengths: full, one action, none; some with holes, also at either end."""
    longest = generator.randint(2, 12)
    lengths = [longest, 1, 0, *(generator.randint(0, longest) for _ in range(9))]
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        holes = row > 4
        for t in range(length):
            mask[row, t] = not (holes and generator.random() < 0.4)
    return mask


def random_like(mask, scale=1.0):
    """Makes random numbers with NaN at every entry that must not be read."""
    return (scale * torch.randn(mask.shape)).masked_fill(~mask, math.nan)


def masked_numbers(x, mask):
    return [x[s, t].item() for s in range(x.shape[0]) for t in range(x.shape[1]) if mask[s, t]]


def slow_moments(numbers):
    mean = sum(numbers) / len(numbers)
    return mean, sum((x - mean) ** 2 for x in numbers) / len(numbers)
