"""The load-balancing loss of a sequence is transformers' for this sequence alone, in trees and in padded batches."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rlhf_critic.batching.padded import PaddedBatch
from rlhf_critic.errors import ConfigError
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.router_loss import RouterRecorder
from tests.rlhf_critic.families import family_configs, kernels_of, random_model

SEQUENCES = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12], [5, 6, 7], [20, 21, 22, 23]]
LENGTHS = [len(ids) for ids in SEQUENCES]


def critic_of(name: str) -> Critic:
    config = family_configs()[name]
    return Critic(random_model(config, kernels_of(config)[0]))


def loss_alone(critic: Critic, ids: list[int]) -> torch.Tensor:
    config = critic.model.config
    output = critic.model.base_model(input_ids=torch.tensor([ids]), output_router_logits=True)
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return load_balancing_loss_func(output.router_logits, experts, config.num_experts_per_tok)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_losses_and_gradients_are_those_of_each_sequence_alone(name, checkpointing):
    critic = critic_of(name).train()
    weights_S = torch.tensor([1.0, -2.0, 3.0, 0.5])
    (torch.stack([loss_alone(critic, ids) for ids in SEQUENCES]) * weights_S).sum().backward()
    expected = {key: one.grad.clone() for key, one in critic.named_parameters() if one.grad is not None}
    alone_S = torch.stack([loss_alone(critic, ids) for ids in SEQUENCES]).detach()
    if checkpointing:
        critic.gradient_checkpointing_enable()
    for batch in (critic.batch_of(SEQUENCES), PaddedBatch.from_sequences(SEQUENCES, 0)):
        critic.zero_grad()
        with RouterRecorder(critic.model) as routers:
            critic(batch, rewards_only=True, every_token=True)
        loss_S = routers.loss(batch, LENGTHS)
        torch.testing.assert_close(loss_S.detach(), alone_S, rtol=0.0, atol=1e-6)
        (loss_S * weights_S).sum().backward()
        largest = max(gradient.abs().max() for gradient in expected.values())
        for key, gradient in expected.items():
            found = dict(critic.named_parameters())[key].grad
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=float(1e-5 * largest), msg=key)
    critic(critic.batch_of(SEQUENCES))  # records nothing outside the block
    assert len(routers._logits) == len(routers._routers)


def test_a_dense_model_is_refused():
    with pytest.raises(ConfigError, match=r"router_loss_coefficient: the model family llama has no routers"):
        RouterRecorder(critic_of("llama").model)
