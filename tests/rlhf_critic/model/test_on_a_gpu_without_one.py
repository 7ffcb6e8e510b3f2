"""The code for GPUs, up to the kernels: whole critics by emulated operators, and a step for which no host read waits.

Tensors on torch's meta device have no numbers, so reading one on the host raises. They stand for tensors on a GPU here.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_critic.algorithms.ppo import estimate_kl
from rlhf_critic.algorithms.ppo_losses import clipped_policy_loss, clipped_value_loss
from rlhf_critic.algorithms.preference_objective import preference_loss
from rlhf_critic.algorithms.response_tokens import ResponseTokens
from rlhf_critic.batching import device_copy, prefix_tree_batch
from rlhf_critic.batching.varlen_plan import level_calls
from rlhf_critic.config.model import BodyConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.model import fused_ops, prefix_attention, varlen_kernels
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.policy import create_policy
from rlhf_critic.model.varlen_kernels import (
    EfficientAttention,
    FlashAttention,
    FlashAttentionPackage,
    Scores,
    kernel_for,
)
from rlhf_critic.training.rollout_step import copy_tokens
from tests.rlhf_critic.families import family_configs, kernels_of, random_model
from tests.rlhf_critic.model.varlen_emulation import emulated_operators

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 60, length).tolist() for length in (9, 5)]
PAIRS = [[prompt + RNG.integers(3, 60, length).tolist() for length in (4, 7)] for prompt in PROMPTS]
SEQUENCES = [ids for pair in PAIRS for ids in pair]


@pytest.fixture
def _gpu_code(monkeypatch):
    """Takes the branches for GPUs on any device, with GPUs of compute capability 9.0."""
    real = device_copy.pack
    monkeypatch.setattr(varlen_kernels, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(device_copy, "pack", lambda tensors, pin_memory: real(tensors, pin_memory=False))
    for module in (device_copy, prefix_tree_batch):
        monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(prefix_attention, "_attend_on_cpu", prefix_attention._attend_on_gpu)
    monkeypatch.setattr(fused_ops, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(fused_ops, "compiled_gated_silu", lambda device: fused_ops.gated_silu)


def critic_of(name: str) -> Critic:
    config = family_configs()[name]
    return Critic(random_model(config, kernels_of(config)[0])).train()


def results(critic: Critic) -> list[torch.Tensor]:
    """Rewards, values and all gradients."""
    critic.zero_grad()
    rewards_S, values_SL = critic(critic.batch_of(SEQUENCES), rewards_only=True), critic(critic.batch_of(SEQUENCES))
    real_SL = torch.arange(values_SL.shape[1]) < torch.tensor([len(ids) for ids in SEQUENCES])[:, None]
    (rewards_S.sin().sum() + (values_SL.sin() * real_SL).sum()).backward()
    return [rewards_S.detach(), values_SL.detach()[real_SL], *(p.grad.clone() for p in critic.parameters())]


@pytest.mark.parametrize("paths_only", [True, False], ids=["paths", "levels"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "mistral-window", "gemma2"])
def test_whole_critics_are_those_of_the_cpu(name, paths_only, request, monkeypatch):
    expected = results(critic_of(name))
    request.getfixturevalue("_gpu_code")
    monkeypatch.setattr(prefix_tree_batch, "plan_calls", lambda tree, **_: plan(tree))
    plan = prefix_tree_batch.path_calls if paths_only else level_calls
    kernel = FlashAttentionPackage() if name == "gemma2" else FlashAttention()
    monkeypatch.setattr(prefix_attention, "kernel_for", lambda query, scores: kernel)
    with emulated_operators():
        found = results(critic_of(name))
    largest = max(float(tensor.abs().max()) for tensor in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(largest, 1.0))


class Watch(TorchDispatchMode):
    """Counts operators and copies to the device, and rejects copies for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.operators[name] += 1
        result = function(*args, **(kwargs or {}))
        if name == "_to_copy" and args[0].device != result.device:
            assert result.is_meta, "a copy to the host"
            assert (kwargs or {}).get("non_blocking"), "a copy for which the host waits"
            self.copies += 1
        return result


@pytest.mark.parametrize("loss", ["sequence", "per_token"])
@pytest.mark.usefixtures("_gpu_code")
def test_nothing_waits_for_the_gpu_between_the_batch_and_the_gradients(loss):
    critic = critic_of("llama").to(torch.bfloat16).to("meta")
    options = TrainConfig(loss=loss, margin_scale=0.0 if loss == "per_token" else 1.0)
    with Watch() as watch:
        batch = critic.batch_of(SEQUENCES, "meta")
        output = critic(batch, rewards_only=loss != "per_token")
        result = preference_loss(output, PAIRS, np.ones(len(PAIRS), dtype=np.float32), options)
        result.sums()
        result.loss_P.sum().backward()
    layers = critic.config.num_hidden_layers
    assert watch.operators["_flash_attention_forward"] == watch.operators["_flash_attention_backward"] == layers
    # The batch with its attention calls, the numbers of the loss and, for values, their places.
    assert watch.copies == (3 if loss == "per_token" else 2)


@pytest.mark.usefixtures("_gpu_code")
def test_nothing_waits_for_the_gpu_in_the_steps_of_ppo(tiny_model):
    prompt_lengths = [9, 9, 5, 5]
    tokens = ResponseTokens.of(SEQUENCES, prompt_lengths)
    numbers = [np.ones(len(tokens.rows_A)), np.zeros(len(tokens.rows_A), np.float32)]
    shortened = [ids[:-1] for ids in SEQUENCES]
    critic = critic_of("llama").to(torch.bfloat16).to("meta")
    policy = create_policy(BodyConfig(path=tiny_model, dtype="bfloat16"), load_tokenizer(tiny_model)).to("meta")
    for model in (critic, policy):
        with Watch() as watch:
            batch = model.batch_of(shortened, "meta")
            on_device, (returns_A, old_A) = copy_tokens(tokens, "meta", numbers)
            if model is critic:
                values_A = critic(batch)[on_device.rows_A, on_device.columns_A]
                loss_A, _ = clipped_value_loss(values_A, old_A, returns_A, 0.2)
            else:
                stats = policy(batch, *on_device, 1.0, True)
                loss_A, _ = clipped_policy_loss(stats.log_probs_A, old_A, returns_A, 0.2)
                estimate_kl(old_A, stats.log_probs_A.detach(), "k3")
                loss_A = loss_A - 0.01 * stats.entropies_A
            loss_A.sum().backward()
        assert watch.copies == 3  # the batch, its places, and the response tokens with their numbers


def test_the_watch_sees_what_makes_the_host_wait():
    number = torch.ones(3, device="meta")
    with Watch(), pytest.raises(AssertionError, match="the host waits"):
        torch.ones(3).to("meta")
    with Watch(), pytest.raises((RuntimeError, NotImplementedError)):
        number.sum().item()
    with Watch(), pytest.raises((RuntimeError, NotImplementedError)):
        number.cpu()


@pytest.mark.usefixtures("_gpu_code")
@pytest.mark.parametrize(
    ("dtype", "size", "scores", "kernel"),
    [
        (torch.bfloat16, 128, Scores(1.0), FlashAttention),
        (torch.float16, 256, Scores(1.0, window=5), FlashAttention),
        (torch.float32, 64, Scores(1.0), EfficientAttention),
        (torch.bfloat16, 288, Scores(1.0), EfficientAttention),
        (torch.float32, 64, Scores(1.0, window=5), None),
        (torch.float32, 64, Scores(1.0, softcap=5.0), None),
        (torch.bfloat16, 64, Scores(1.0, softcap=5.0), None),  # the package is not installed here
    ],
)
def test_kernels_are_chosen_by_dtype_and_scores(dtype, size, scores, kernel):
    chosen = kernel_for(torch.empty(1, 4, 3, size, dtype=dtype, device="meta"), scores)
    assert type(chosen) is (kernel or type(None))
