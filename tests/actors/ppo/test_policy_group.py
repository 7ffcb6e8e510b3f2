"""The policy's shards are one policy: its updates, reference, weights and checkpoints are those of a single process.

Knows nothing about critics or rewards.
"""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from actors.ppo.policy_group import PolicyGroup, PolicyOptions, PolicyWeights
from rlhf_critic.config.model import BodyConfig, OptimizerConfig
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.errors import CheckpointError, CriticError, NonFiniteLossError, PlacementError, RankLost
from rlhf_critic.model.generation import TransformersGenerator
from rlhf_critic.model.policy import Policy, create_policy, sampling_logits
from tests.actors.groups import CPUS, Rollouts, leaves_nothing, make_rollouts, processes, require_gone
from tests.helpers import slow_except

STEPS = 4
CLIP = 0.2
TEMPERATURE = 0.7
TOLERANCE = 1e-5
ROLLOUTS = make_rollouts(prompts=5)


def options_of(path: str, stage: int) -> PolicyOptions:
    optimizer = OptimizerConfig(zero_stage=stage, learning_rate=1e-3, warmup_fraction=0.0, token_budget=150)
    return PolicyOptions(BodyConfig(path=path), optimizer, "auto", STEPS, seed=0, temperature=TEMPERATURE)


def make(path: str, shards: int, stage: int, **changes: object) -> PolicyGroup:
    placement = {"cpus_per_shard": CPUS, "start_timeout_s": 200, **changes}
    return PolicyGroup(options_of(path, stage), shards, **placement)


def log_probs_alone(policy: Policy, rollouts: Rollouts) -> list[torch.Tensor]:
    """Returns log-probabilities of response tokens by transformers' forward pass, one rollout at a time."""
    found = []
    for ids, length in zip(rollouts.sequences, rollouts.prompt_lengths, strict=True):
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0, length - 1 : len(ids) - 1]
        log_probs = sampling_logits(logits, TEMPERATURE, policy.suppressed).log_softmax(-1)
        found.append(log_probs.gather(1, torch.tensor(ids[length:], dtype=torch.int64)[:, None])[:, 0])
    return found


def plain_policy(path: str) -> Policy:
    return create_policy(BodyConfig(path=path, prefix_tree=False), load_tokenizer(path))


@pytest.fixture(scope="module")
def drawn(tiny_model) -> Rollouts:
    """Makes rollouts with log-probabilities near the policy's as returns, and advantages as old values."""
    noise = np.random.default_rng(1)
    with torch.no_grad():
        log_probs = [numbers.numpy() for numbers in log_probs_alone(plain_policy(tiny_model), ROLLOUTS)]
    old = [numbers + noise.normal(0, 0.1, len(numbers)).astype(np.float32) for numbers in log_probs]
    return Rollouts(ROLLOUTS.sequences, ROLLOUTS.prompt_lengths, old, ROLLOUTS.returns)


@pytest.fixture(scope="module")
def plain_losses(tiny_model, drawn) -> list[float]:
    """Losses of updates by torch only: no group, engine, DeepSpeed or batches."""
    policy = plain_policy(tiny_model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    losses = []
    for _ in range(STEPS):
        log_probs = torch.cat(log_probs_alone(policy, drawn))
        old, advantages = (torch.from_numpy(np.concatenate(one)) for one in (drawn.returns, drawn.old_values))
        ratio = (log_probs - old).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return losses


@pytest.fixture(scope="module", params=slow_except([(2, 3)], [(1, 0), (2, 0), (2, 3)], of_fixture=True), ids=str)
def group(request, ray_address, tiny_model, tmp_path_factory):
    """A policy, with a checkpoint of its start."""
    with make(tiny_model, *request.param) as policy:
        start = tmp_path_factory.mktemp("policies") / "start"
        policy.save(start)
        yield policy, start


@pytest.fixture
def fresh(group):
    """A policy in its initial state."""
    policy, start = group
    policy.load(start)
    return policy


def test_reference_log_probs_are_those_of_transformers_for_each_rollout_by_itself(fresh, tiny_model, drawn):
    with torch.no_grad():
        wanted = [numbers.numpy() for numbers in log_probs_alone(plain_policy(tiny_model), drawn)]
    for _ in range(2):
        found = fresh.reference_log_probs(drawn.sequences, drawn.prompt_lengths)
        assert [len(numbers) for numbers in found] == [len(numbers) for numbers in wanted]
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), rtol=0, atol=TOLERANCE)
        fresh.update(*drawn.arguments, clip=CLIP)  # changes the policy and not the reference
    one = fresh.reference_log_probs(drawn.sequences[:1], drawn.prompt_lengths[:1])
    np.testing.assert_allclose(one[0], wanted[0], rtol=0, atol=TOLERANCE)


def test_updates_are_those_of_a_plain_loop(fresh, plain_losses, drawn):
    losses = [fresh.update(*drawn.arguments, clip=CLIP).loss for _ in range(STEPS)]
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-4, atol=TOLERANCE)
    assert losses[-1] < losses[0] - 0.01, "nothing was learned"


def test_a_policy_that_went_on_from_a_checkpoint_is_the_one_that_never_stopped(fresh, drawn, tmp_path):
    fresh.update(*drawn.arguments, clip=CLIP)
    fresh.save(tmp_path / "checkpoint")
    undisturbed = [fresh.update(*drawn.arguments, clip=CLIP) for _ in range(2)]
    fresh.save(tmp_path / "undisturbed")
    fresh.load(tmp_path / "checkpoint")
    assert [fresh.update(*drawn.arguments, clip=CLIP) for _ in range(2)] == undisturbed
    fresh.save(tmp_path / "resumed")
    weights, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "resumed"))
    for name, tensor in weights.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


def test_weights_make_a_generator_the_policy(fresh, tiny_model, drawn, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    for _ in range(2):
        fresh.update(*drawn.arguments, clip=CLIP)
    weights = fresh.weights()
    assert weights.version == 2
    tensors = weights.get()
    fresh.save(tmp_path / "saved")
    saved = create_policy(BodyConfig(path=str(tmp_path / "saved")), tokenizer).model.state_dict()
    generator = TransformersGenerator(BodyConfig(path=tiny_model), tokenizer, TEMPERATURE, torch.device("cpu"))
    assert tensors.keys() == generator._policy.model.state_dict().keys()
    generator.load(tensors)
    for name, tensor in generator._policy.model.state_dict().items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
    # Its samples have the log-probabilities of the saved policy in transformers' forward pass.
    prompts = [ids[:length] for ids, length in zip(drawn.sequences, drawn.prompt_lengths, strict=True)][:4]
    responses = generator.generate(prompts, max_new_tokens=8, seed=3)
    sequences = [[*prompt, *response.ids.tolist()] for prompt, response in zip(prompts, responses, strict=True)]
    rollouts = Rollouts(sequences, [len(prompt) for prompt in prompts], [], [])
    with torch.no_grad():
        wanted = log_probs_alone(plain_policy(str(tmp_path / "saved")), rollouts)
    for response, log_probs in zip(responses, wanted, strict=True):
        np.testing.assert_allclose(response.log_probs, log_probs.numpy(), rtol=0, atol=TOLERANCE)


def test_weights_are_read_in_the_object_store_without_a_copy(ray_address):
    given = {"a": torch.randn(1024, 256).bfloat16(), "b": torch.tensor(2.5), "c": torch.randn(4, 3).T}
    weights = PolicyWeights.put(7, given)
    first, second = weights.get(), weights.get()
    for name, tensor in given.items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=0)
    assert first["a"].data_ptr() == second["a"].data_ptr()


def test_a_saved_policy_loads_in_plain_transformers(fresh, drawn, tmp_path):
    fresh.update(*drawn.arguments, clip=CLIP)
    fresh.save(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in fresh.weights().get().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="exists already"):
        fresh.save(tmp_path / "saved")


def test_a_damaged_checkpoint_is_refused_and_the_group_goes_on(group, drawn, tmp_path):
    policy, start = group
    damaged = Path(shutil.copytree(start, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        policy.load(damaged)
    assert len(policy.reference_log_probs(drawn.sequences, drawn.prompt_lengths)) == len(drawn.sequences)


def test_bad_rollouts_are_refused_and_the_group_goes_on(fresh, plain_losses, drawn):
    none = np.zeros(0, dtype=np.float32)
    one = np.zeros(1, dtype=np.float32)
    bad = [
        (Rollouts([], [], [], []), "no rollout has a response token"),
        (Rollouts([[3, 4]], [2], [none], [none]), "no rollout has a response token"),
        (drawn.changed(2, returns=np.ones(1000, dtype=np.float32)), r"rollout 2: old_log_probs has the shape"),
        (drawn.changed(2, old_values=np.full_like(drawn.returns[2], np.nan)), "rollout 2: advantages is nan"),
        (Rollouts([[3, 100_000]], [1], [one], [one]), "sequence 0: token ids from 3 to 100000"),
    ]
    for rollouts, message in bad:
        with pytest.raises(ValueError, match=message):
            fresh.update(*rollouts.arguments, clip=CLIP)
    with pytest.raises(ValueError, match="sequence 0: token ids from -1"):
        fresh.reference_log_probs([[-1, 3]], [1])
    with pytest.raises(ValueError, match="rollout 0: a prompt of 3 tokens"):
        fresh.reference_log_probs([[1, 3]], [3])
    assert fresh.reference_log_probs([], []) == []
    assert [len(numbers) for numbers in fresh.reference_log_probs([[3, 4]], [2])] == [0]
    assert fresh.update(*drawn.arguments, clip=CLIP).loss == pytest.approx(plain_losses[0], rel=1e-4, abs=TOLERANCE)


def test_the_handle_does_not_leave_its_process(group):
    with pytest.raises(TypeError, match=r"policy group stays in its process.*an actor of your own"):
        ray.cloudpickle.dumps(group[0])


@pytest.mark.slow
def test_a_lost_shard_ends_the_group(ray_address, tiny_model, drawn):
    with leaves_nothing(), make(tiny_model, 2, 3) as policy:
        ranks = processes(policy._ranks)
        threading.Timer(1.0, lambda: os.kill(ranks[0].pid, signal.SIGKILL)).start()
        deadline = time.monotonic() + 30
        with pytest.raises(RankLost, match="policy rank"):
            while time.monotonic() < deadline:
                policy.update(*drawn.arguments, clip=CLIP)
        require_gone(ranks)
        with pytest.raises(RankLost, match="has ended"):
            policy.weights()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_group(ray_address, tiny_model, drawn):
    with leaves_nothing(), make(tiny_model, 1, 0) as policy:
        ranks = processes(policy._ranks)
        # A probability far below the policy's, so that the ratio is infinite.
        huge = drawn.changed(
            0, returns=np.full_like(drawn.returns[0], -1e6), old_values=-np.ones_like(drawn.returns[0])
        )
        with pytest.raises(NonFiniteLossError, match="rollout 0"):
            policy.update(*huge.arguments, clip=CLIP)
        require_gone(ranks)


@pytest.mark.slow
def test_a_group_that_cannot_start_leaves_nothing_behind(ray_address, tiny_model, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    unweighted = shutil.copytree(tiny_model, tmp_path / "unweighted")
    (unweighted / "model.safetensors").unlink()
    with leaves_nothing():
        with pytest.raises(CriticError, match="nowhere"):
            make(nowhere, 1, 0)
        with pytest.raises(CheckpointError, match="unweighted"):
            make(str(unweighted), 2, 3)
        with pytest.raises(PlacementError, match=r"policy ranks .* could not be placed within 3 s"):
            make(tiny_model, 2, 0, cpus_per_shard=400, start_timeout_s=3)
