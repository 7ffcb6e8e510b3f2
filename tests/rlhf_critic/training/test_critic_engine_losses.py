"""Each loss option gives the loss and gradient of a slow loop, over ranks and micro-batches."""

import json
import math

import numpy as np
import pytest
import torch

from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_dataset import EncodedPreference, EncodedPreferences
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import DataError
from rlhf_critic.model.factory import create_critic_model
from tests.helpers import make_preferences, slow_except
from tests.rlhf_critic.training.critic_runs import make

PAIRS = [{**row, "margin": number % 3} for number, row in enumerate(make_preferences(7, seed=4))]
RANKINGS = [
    {"prompt": row["prompt"], "ranked": [row["chosen"], "of course", row["rejected"], "no"][: 3 + number % 2]}
    for number, row in enumerate(make_preferences(3, seed=6))
]
OPTIONS = {
    "margin": {"margin_scale": 0.5},
    "smoothing": {"label_smoothing": 0.1},
    "centering": {"centering_coefficient": 0.01},
    "per_token": {"loss": "per_token", "label_smoothing": 0.05},
    "rankings": {"centering_coefficient": 0.1},
    "targets": {"margin_scale": 0.5, "score_weight": 0.3, "label_weight": 2.0, "steps_weight": 0.7},
}
QUESTION = "please explain"
TARGETS = [
    {"prompt": QUESTION, "response": "of course", "score": 2.5},
    {"prompt": QUESTION, "responses": ["thank", "no"], "scores": [1.0, -0.5]},
    {"prompt": QUESTION, "response": "whatever", "label": False},
    {"prompt": QUESTION, "response": "glad", "label": 0.25},
    {"prompt": QUESTION, "steps": [{"text": "of course", "label": True}, {"text": "no", "label": None}]},
    {"prompt": QUESTION, "steps": [{"text": text, "label": text == "glad"} for text in ("glad", "no", "whatever")]},
]


def step_once(
    source: str, data: str, cache: str, stage: int, changes: dict
) -> tuple[dict[str, float], EncodedPreferences]:
    engine, preferences, _ = make(source, data, cache, stage, token_budget=120, **changes)
    engine.validate_preferences(preferences)
    metrics = engine.train_step(preferences, np.arange(len(preferences)))
    evaluation = engine.evaluate(preferences)
    pointwise = evaluation.pointwise.rows if evaluation.pointwise else 0
    assert pointwise == (preferences.kinds_N > 0).sum()
    figures = {
        name: getattr(metrics, name) for name in ("loss", "accuracy", "margin", "grad_norm", "tokens", "micro_batches")
    }
    return figures, evaluation.preferences


def refuse(source: str, data: str, cache: str, changes: dict) -> str:
    engine, preferences, _ = make(source, data, cache, 0, **changes)
    with pytest.raises(DataError) as refused:
        engine.validate_preferences(preferences)
    return str(refused.value)


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log(1 + torch.exp(-x))


def smoothed(advantage: torch.Tensor, smoothing: float) -> torch.Tensor:
    return -(1 - smoothing) * log_sigmoid(advantage) - smoothing * log_sigmoid(-advantage)


def slow_pointwise_loss(values: torch.Tensor, row: EncodedPreference, options: TrainConfig) -> torch.Tensor:
    """Computes the loss of one row with targets from the values at every token of its response."""
    losses = []
    for token, target in zip(row.tokens_A.tolist(), row.targets_A.tolist(), strict=True):
        value = values[token]
        is_score = row.kind == "score"
        losses.append(
            (value - target) ** 2 if is_score else -target * log_sigmoid(value) - (1 - target) * log_sigmoid(-value)
        )
    return getattr(options, f"{row.kind}_weight") * sum(losses) / len(losses)


def slow_loss(values: list[torch.Tensor], ids: list[list[int]], margin: float, options: TrainConfig) -> torch.Tensor:
    """Computes the loss of one preference from the values at every token of each response."""
    rewards = [of_response[-1] for of_response in values]
    if options.loss == "per_token":
        end = max(map(len, ids))
        start = next((t for t in range(min(map(len, ids))) if ids[0][t] != ids[1][t]), min(map(len, ids)))
        held = [[of_response[min(t, len(of_response) - 1)] for t in range(end)] for of_response in values]
        losses = [smoothed(held[0][t] - held[1][t], options.label_smoothing) for t in range(min(start, end - 1), end)]
        loss = sum(losses) / len(losses)
    elif len(rewards) == 2:
        loss = smoothed(rewards[0] - rewards[1] - options.margin_scale * margin, options.label_smoothing)
    else:
        loss = sum(
            -torch.log(torch.exp(rewards[place]) / sum(torch.exp(reward) for reward in rewards[place:]))
            for place in range(len(rewards))
        )
    mean = sum(rewards) / len(rewards)
    return loss + options.centering_coefficient * (2 * mean) ** 2


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("world_size", "stage"), slow_except([(2, 2)], [(1, 0), (2, 2)]))
def test_losses_and_gradients_are_those_of_a_slow_loop(ranks, tiny_model, tmp_path, name, world_size, stage):
    rows = {"rankings": [*PAIRS, *RANKINGS], "targets": [*PAIRS, *TARGETS]}.get(name, PAIRS)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = OPTIONS[name]
    figures, compared = ranks(world_size).run(step_once, tiny_model, str(data), str(tmp_path), stage, changes)[0]

    options = TrainConfig(**changes)
    encoder = Encoder(load_tokenizer(tiny_model), max_length=64)
    preferences = load_preferences(str(data), encoder, str(tmp_path))
    torch.manual_seed(0)
    critic = create_critic_model(tiny_model, encoder.tokenizer, None, disable_dropout=True, prefix_tree=False)
    total, right, margins = torch.zeros(()), [], []
    for row, preference in enumerate(preferences.take(range(len(preferences)))):
        ids = [response.tolist() for response in preference.responses]
        values = [critic.values(critic.batch_of([response]))[0] for response in ids]
        if len(ids) == 1:
            total = total + slow_pointwise_loss(values[0], preference, options)
            continue
        total = total + slow_loss(values, ids, float(rows[row].get("margin", 0.0)), options)
        rewards = [of_response[-1].item() for of_response in values]
        orders = [rewards[i] > rewards[j] for i in range(len(rewards)) for j in range(i + 1, len(rewards))]
        right.append(sum(orders) / len(orders))
        margins.append(rewards[0] - rewards[-1])
    mean = total / len(preferences)
    mean.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in critic.parameters() if p.grad is not None))
    assert figures["loss"] == pytest.approx(mean.item(), rel=1e-4)
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert figures["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert figures["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert figures["tokens"] == preferences.tokens_N.sum()
    assert figures["micro_batches"] > 1
    assert compared == sum(size * (size - 1) // 2 for size in preferences.sizes_N)


def test_a_loss_that_is_not_defined_for_a_preference_is_refused(ranks, tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [PAIRS[0], RANKINGS[0]]))
    messages = [
        ranks(1).run(refuse, tiny_model, str(data), str(tmp_path), changes)[0]
        for changes in ({"loss": "per_token"}, {"margin_scale": 1.0})
    ]
    assert messages[0].startswith(f"{data}:2: ranks more than two responses, but train.loss per_token takes two")
    assert messages[1].startswith(f"{data}:2: field 'margin': missing here and in 1 of 2")
