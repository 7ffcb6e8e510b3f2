"""Updates on traces of agents equal a plain loop: masks with holes, several turns, and means over sequences.

The functions that take a `source` are sent to real ranks (Ray actors) and run there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_critic.config.model import BodyConfig, ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.model.policy import create_policy
from rlhf_critic.training.critic_engine import CriticEngine
from rlhf_critic.training.policy_engine import PolicyEngine
from tests.rlhf_critic.model.policies import from_the_definition, plain_policy

OPTIONS = TrainConfig(learning_rate=3e-3, schedule="constant", warmup_fraction=0.0, token_budget=10_000)
CLIPS = {"clip": 0.2, "clip_high": 0.4, "dual_clip": 1.5}


@dataclass(frozen=True)
class Traces:
    """Traces of an agent: token ids, masks of the policy's tokens, and two numbers for each response token."""

    sequences: list[list[int]]
    prompt_lengths: list[int]
    masks: list[np.ndarray]
    targets: list[np.ndarray]
    old: list[np.ndarray]


def make_traces() -> Traces:
    """Makes traces of one prompt that share their first turn and a tool's output, and one that ends with a tool."""
    rng = np.random.default_rng(0)
    prompt, first, output = (rng.integers(3, 300, length).tolist() for length in (6, 4, 5))
    traces = []
    for number in range(4):
        second = rng.integers(3, 300, 3 + number).tolist()
        turns = [(first, True), (output, False), (second, True)]
        traces.append(turns + ([(output, False)] if number == 3 else []))
    traces += [[([7, 8], False)], [([9], True)]]  # one without a token of the policy, and one of a single token
    sequences = [prompt + [token for ids, _ in trace for token in ids] for trace in traces]
    masks = [np.repeat([is_ours for _, is_ours in trace], [len(ids) for ids, _ in trace]) for trace in traces]

    def numbers(scale: float) -> list[np.ndarray]:
        rows = [rng.normal(-1.0, scale, len(mask)).astype(np.float32) for mask in masks]
        return [np.where(mask, row, np.nan).astype(np.float32) for mask, row in zip(masks, rows, strict=True)]

    return Traces(sequences, [6] * len(traces), masks, numbers(1.0), numbers(0.5))


def mean_of(losses: list[torch.Tensor], mean: str) -> torch.Tensor:
    """Averages the losses of each trace's actions over tokens, or over traces that have some."""
    losses = [one for one in losses if len(one)]
    return torch.cat(losses).mean() if mean == "token" else torch.stack([one.mean() for one in losses]).mean()


def update_critic(source: str, mean: str) -> tuple[float, float, int]:
    traces = make_traces()
    engine = CriticEngine.from_pretrained(
        Encoder(load_tokenizer(source), max_length=64), ModelConfig(path=source, head_init="normal"), OPTIONS, 4
    )
    arguments = traces.sequences, traces.prompt_lengths, traces.targets, traces.old, 0.2
    metrics = engine.update(*arguments, masks=traces.masks, mean=mean)
    return metrics.loss, metrics.grad_norm, metrics.computed_tokens


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_the_critics_update_on_traces_is_that_of_a_plain_loop(ranks, tiny_model, mean):
    traces = make_traces()
    torch.manual_seed(OPTIONS.seed)
    head_1D = create_critic_model(tiny_model, load_tokenizer(tiny_model), None).model.score.weight.detach()
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.score.weight.data.copy_(head_1D)
    losses = []
    for ids, length, mask, targets, old in zip(*vars(traces).values(), strict=True):
        values_L = model.base_model(torch.tensor([ids])).last_hidden_state[0] @ model.score.weight[0]
        of_actions = []
        for action in np.flatnonzero(mask):
            value, target, before = values_L[length + action - 1], float(targets[action]), float(old[action])
            near = value.clamp(before - 0.2, before + 0.2)
            of_actions.append(torch.maximum((value - target) ** 2, (near - target) ** 2) / 2)
        losses.append(torch.stack(of_actions) if of_actions else torch.zeros(0))
    expected = mean_of(losses, mean)
    expected.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)).item()
    ((loss, grad_norm, computed),) = ranks(1).run(update_critic, tiny_model, mean)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert grad_norm == pytest.approx(norm, rel=1e-4)
    # Prompt, first turn and tool output once; the last action of a trace and what follows it not at all.
    seconds = sum(3 + number - 1 for number in range(4))
    assert computed == 6 + 4 + 5 + seconds


def update_policy(source: str, mean: str) -> tuple[float, float]:
    traces = make_traces()
    engine = PolicyEngine(load_tokenizer(source), BodyConfig(path=source), OPTIONS, 4, 0, 1.0)
    old = [row - 5.0 for row in traces.old]
    arguments = traces.sequences, traces.prompt_lengths, old, traces.targets
    metrics = engine.update(*arguments, **CLIPS, masks=traces.masks, mean=mean)
    return metrics.loss, metrics.grad_norm


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_the_policys_update_on_traces_is_that_of_a_plain_loop(ranks, tiny_model, mean):
    traces = make_traces()
    model = plain_policy(tiny_model)
    suppressed = create_policy(BodyConfig(path=tiny_model), load_tokenizer(tiny_model)).suppressed
    drawn = from_the_definition(model, traces.sequences, traces.prompt_lengths, 1.0, suppressed)
    counts = [len(mask) for mask in traces.masks]
    losses = []
    for log_probs, mask, targets, old in zip(
        drawn.log_probs_A.split(counts), traces.masks, traces.targets, traces.old, strict=True
    ):
        of_actions = []
        for action in np.flatnonzero(mask):
            advantage, ratio = float(targets[action]), (log_probs[action] - float(old[action] - 5.0)).exp()
            one = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.4))
            of_actions.append(one if advantage >= 0 else torch.minimum(one, torch.tensor(-1.5 * advantage).double()))
        losses.append(torch.stack(of_actions) if of_actions else torch.zeros(0, dtype=torch.float64))
    expected = mean_of(losses, mean)
    expected.backward()
    norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)).item()
    ((loss, grad_norm),) = ranks(1).run(update_policy, tiny_model, mean)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert grad_norm == pytest.approx(norm, rel=1e-3)
