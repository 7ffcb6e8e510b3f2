"""Muon updates hidden matrices and AdamW the rest, as torch's two optimizers do apart; a resumed one goes on."""

import copy

import pytest
import torch
from pydantic import ValidationError

from rlhf_critic.config.train import TrainConfig
from rlhf_critic.model.critic import Critic
from rlhf_critic.training.optimizer import MuonWithAdamW, create_optimizer, hidden_matrices
from tests.rlhf_critic.families import family_configs, kernels_of, random_model

OPTIONS = TrainConfig(optimizer="muon", zero_stage=0, learning_rate=3e-3, weight_decay=0.1)
SEQUENCES = [[5, 6, 7, 8, 9], [5, 6, 20, 21], [30, 31, 32]]


def critic_of(name: str) -> Critic:
    config = family_configs()[name]
    return Critic(random_model(config, kernels_of(config)[0]))


def step(critic: Critic, *optimizers: torch.optim.Optimizer) -> None:
    critic.zero_grad()
    critic.rewards(critic.batch_of(SEQUENCES)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("name", ["mixtral"])
def test_a_step_is_that_of_both_optimizers_apart(name):
    found, expected = critic_of(name), critic_of(name)
    hidden = hidden_matrices(expected)
    names = dict(expected.named_parameters())
    muon_names = {one for one, parameter in names.items() if any(parameter is matrix for matrix in hidden)}
    assert not any("embed" in one or "score" in one or "wte" in one or "experts" in one for one in muon_names)
    assert all("norm" not in one and "bias" not in one for one in muon_names)
    rest = [parameter for one, parameter in names.items() if one not in muon_names]
    muon = torch.optim.Muon(hidden, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [one for one in rest if one.dim() > 1], "weight_decay": 0.1},
        {"params": [one for one in rest if one.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    optimizer = create_optimizer(found, OPTIONS)
    assert isinstance(optimizer, MuonWithAdamW)
    for learning_rate in (3e-3, 1e-3):  # a schedule changes it
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = learning_rate
        step(found, optimizer)
        step(expected, muon, adamw)
    for one, parameter in found.named_parameters():
        assert torch.equal(parameter, names[one]), one


def test_a_loaded_state_goes_on_as_if_nothing_happened():
    through, resumed = critic_of("llama"), critic_of("llama")
    optimizer = create_optimizer(through, OPTIONS)
    step(through, optimizer)
    resumed.load_state_dict(through.state_dict())
    again = create_optimizer(resumed, OPTIONS)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for critic, one in ((through, optimizer), (resumed, again)):
        step(critic, one)
    for (name, first), second in zip(through.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_that_split_matrices_are_refused(stage):
    with pytest.raises(ValidationError, match=f"optimizer muon needs zero_stage 0, and zero_stage is {stage}"):
        TrainConfig(optimizer="muon", zero_stage=stage)
