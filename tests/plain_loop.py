"""The optimizer of plain training loops, by torch and transformers alone, for comparison with the engines."""

from __future__ import annotations

import torch
from torch import nn
from transformers import get_scheduler

MAX_NORM = 1.0


class PlainOptimizer:
    """AdamW that decays matrices alone, behind clipped gradients, with a schedule of its rate.

    Args:
        model: The module to train.
        schedule: Name of the schedule in transformers.
        warmup_steps: Steps of warm-up.
        total_steps: Steps of the whole schedule.
        learning_rate: The highest rate.
    """

    def __init__(
        self, model: nn.Module, schedule: str, warmup_steps: int, total_steps: int, learning_rate: float = 3e-3
    ) -> None:
        self._parameters = list(model.parameters())
        matrices = [one for one in self._parameters if one.dim() > 1]
        others = [one for one in self._parameters if one.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(0.9, 0.95),
        )
        self.schedule = get_scheduler(schedule, self._optimizer, warmup_steps, total_steps)

    def step(self) -> float:
        """Takes a step on the gradients and clears them; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._parameters, MAX_NORM).item()
        self._optimizer.step()
        self.schedule.step()
        self._optimizer.zero_grad()
        return norm
