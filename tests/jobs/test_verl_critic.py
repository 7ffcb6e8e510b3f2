"""The critic worker for verl reads padded batches with holes, and gives the numbers of a critic without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors import CriticOptions
from jobs.examples.verl_critic import CriticWorker, unpadded
from rlhf_critic.algorithms.ppo_losses import clipped_value_loss
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from tests.actors.groups import CPUS

PAD, PROMPT_LENGTHS, RESPONSE_LENGTHS, LONGEST = 0, [3, 5, 5], [4, 2, 6], 6


def make_batch() -> dict[str, torch.Tensor]:
    """Makes three rollouts as verl pads them; two share a prompt, and one has a hole."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.full((3, 5 + LONGEST), PAD), torch.zeros(3, 5 + LONGEST, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS, strict=True)):
        mask[row, 5 - prompt : 5 + response] = 1
        ids[row, 5 - prompt : 5 + response] = torch.randint(3, 300, (prompt + response,), generator=generator)
    ids[2, :5] = ids[1, :5]
    response_mask = mask[:, 5:].clone()
    response_mask[2, 2:4] = 0
    numbers = {name: torch.randn(3, LONGEST, generator=generator) for name in ("returns", "values")}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "responses": ids[:, 5:],
        "response_mask": response_mask,
        **numbers,
    }


def test_padding_is_removed_on_both_sides():
    batch = make_batch()
    sequences, lengths = unpadded(batch)
    assert lengths == PROMPT_LENGTHS
    for row, ids in enumerate(sequences):
        first = 5 - PROMPT_LENGTHS[row]
        assert ids.tolist() == batch["input_ids"][row, first : 5 + RESPONSE_LENGTHS[row]].tolist()


@pytest.mark.slow
def test_values_and_updates_are_those_of_the_critic_alone(ray_address, critics):
    batch, critic = make_batch(), load_critic(critics["first"]).critic
    options = CriticOptions(ModelConfig(path=critics["first"]), TrainConfig(token_budget=400), total_steps=2)
    worker = CriticWorker(options, clip=0.5, mini_batch_size=2, epochs=1, cpus_per_shard=CPUS)
    try:
        values = worker.compute_values(batch)
        losses = []
        for row, ids in enumerate(unpadded(batch)[0]):
            with torch.no_grad():
                alone = critic.values(critic.batch_of([ids]))[0][PROMPT_LENGTHS[row] - 1 : -1]
            count = RESPONSE_LENGTHS[row]
            torch.testing.assert_close(values[row, :count], alone, atol=1e-5, rtol=0)
            assert not values[row, count:].any()
            mask = batch["response_mask"][row, :count].bool()
            numbers = batch["values"][row, :count][mask], batch["returns"][row, :count][mask]
            losses.append(clipped_value_loss(alone[mask], *numbers, 0.5)[0])
        first = worker.update_critic({name: tensor[:2] for name, tensor in batch.items()})
        assert first["critic/vf_loss"] == pytest.approx(torch.cat(losses[:2]).mean().item(), rel=1e-4)
        assert np.isfinite(worker.update_critic(batch)["critic/grad_norm"])
        assert worker.group.state().step == 3
    finally:
        worker.group.shutdown()
