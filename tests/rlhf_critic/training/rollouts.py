"""Rollouts for updates of values or of a policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rollouts:
    """Input of an update: token ids, and two numbers for each response token."""

    sequences: list[list[int]]
    prompt_lengths: list[int]
    targets: list[np.ndarray]
    old: list[np.ndarray]

    def part(self, *rows: int) -> Rollouts:
        return Rollouts(*([column[row] for row in rows] for column in vars(self).values()))


def make_rollouts(seed: int) -> Rollouts:
    """Makes three prompts, one of a single token, with four rollouts each; some responses are empty or one token."""
    rng = np.random.default_rng(seed)
    sequences, prompt_lengths = [], []
    for prompt_length in (1, 9, 14):
        prompt = rng.integers(3, 300, prompt_length).tolist()
        for response_length in (0, 1, *rng.integers(2, 12, 2)):
            sequences.append(prompt + rng.integers(3, 300, response_length).tolist())
            prompt_lengths.append(prompt_length)
    counts = [len(ids) - length for ids, length in zip(sequences, prompt_lengths, strict=True)]
    return Rollouts(
        sequences,
        prompt_lengths,
        [rng.normal(0.5, 1.0, count).astype(np.float32) for count in counts],
        [rng.normal(0.0, 0.5, count).astype(np.float32) for count in counts],
    )
