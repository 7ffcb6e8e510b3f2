"""A critic worker for verl that runs this project's critic in place of verl's own.

verl's trainer asks its critic twice an iteration. Hand both calls to this worker in a subclass of its trainer::

    class Trainer(RayPPOTrainer):
        def _compute_values(self, batch):
            return DataProto.from_dict({"values": self.our_critic.compute_values(batch.batch)})

        def _update_critic(self, batch):
            return DataProto(meta_info={"metrics": self.our_critic.update_critic(batch.batch)})

Prompts are padded on the left and responses on the right, as verl does it. The masks of responses may have holes, such
as the output of tools. Shape legend: B rollouts, T tokens of prompt and response, R tokens of the longest response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors import CriticGroup, CriticOptions
from rlhf_critic.algorithms import ppo


class CriticWorker:
    """Values and updates of padded batches by a `CriticGroup`.

    Args:
        options: Options of the critic.
        shards: Number of actors that the critic is sharded over.
        clip: Maximum change of a value, ``critic.cliprange_value`` of verl.
        mini_batch_size: Rollouts of each optimizer step, ``critic.ppo_mini_batch_size`` of verl.
        epochs: Passes over a batch, ``critic.ppo_epochs`` of verl.
        **placement: Keyword arguments of `CriticGroup`, such as ``use_gpu``.
    """

    def __init__(
        self,
        options: CriticOptions,
        shards: int = 1,
        *,
        clip: float = 0.5,
        mini_batch_size: int = 64,
        epochs: int = 1,
        **placement: Any,
    ) -> None:
        self.group = CriticGroup(options, shards, **placement)
        self._clip, self._size, self._epochs = clip, mini_batch_size, epochs

    def compute_values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Computes the value before every response token, fp32 ``[B, R]``, 0 at padding."""
        sequences, prompt_lengths = unpadded(batch)
        values, _ = ppo.action_values(self.group.values(sequences), prompt_lengths)
        values_BR = torch.zeros(batch["responses"].shape)
        for row, of_tokens in enumerate(values):
            values_BR[row, : len(of_tokens)] = torch.from_numpy(of_tokens)
        return values_BR

    def update_critic(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Takes the optimizer steps of one iteration on ``values`` and ``returns``; returns verl's metrics."""
        sequences, prompt_lengths = unpadded(batch)
        counts = [len(ids) - length for ids, length in zip(sequences, prompt_lengths, strict=True)]

        def rows_of(name: str) -> list[NDArray[Any]]:
            return [row[:count].cpu().numpy() for row, count in zip(batch[name], counts, strict=True)]

        masks = [row.astype(bool) for row in rows_of("response_mask")]
        returns, values, done = rows_of("returns"), rows_of("values"), []
        for _ in range(self._epochs):
            for first in range(0, len(sequences), self._size):
                part = slice(first, first + self._size)
                numbers = (sequences[part], prompt_lengths[part], returns[part], values[part])
                done.append(self.group.update(*numbers, clip=self._clip, masks=masks[part]))
        names = {"vf_loss": "loss", "vf_clipfrac": "clip_fraction", "grad_norm": "grad_norm", "lr": "learning_rate"}
        return {f"critic/{name}": float(np.mean([getattr(one, ours) for one in done])) for name, ours in names.items()}

    def save_checkpoint(self, local_path: str) -> None:
        """Saves weights, optimizer and step to a new directory, from which `CriticGroup.restore` continues."""
        self.group.save(local_path)


def unpadded(batch: Mapping[str, Tensor]) -> tuple[list[NDArray[np.int64]], Sequence[int]]:
    """Removes the padding of prompts and responses; returns token ids, and the length of each prompt."""
    responses = batch["responses"].shape[1]
    mask_BT = batch["attention_mask"].bool().cpu()
    sequences = [ids[mask].numpy() for ids, mask in zip(batch["input_ids"].cpu(), mask_BT, strict=True)]
    return sequences, mask_BT[:, :-responses].sum(1).tolist()
