"""A batch of preferences and targets of every kind has the loss and gradient of its rows, one by one."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlhf_critic.algorithms.preference_objective import Targets, blended_loss, preference_loss, reads_values
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.model.factory import create_critic_model
from tests.helpers import make_preferences

OPTIONS = TrainConfig(score_weight=0.3, label_weight=2.0, steps_weight=0.7, centering_coefficient=0.1)
PAIRS = make_preferences(3, seed=4)
RANKING = {"prompt": "please", "ranked": ["of course", "glad", "no"]}
SCORES = [{"prompt": "please", "responses": ["thank", "no"], "scores": [2.5, -1]}]
LABELS = [{"prompt": "please", "response": "glad", "label": 0.25}, {"prompt": "why", "response": "no", "label": False}]
STEPS = [
    {
        "prompt": "please",
        "steps": [{"text": "of course", "label": True}, {"text": "no"}, {"text": "no", "label": False}],
    },
    {"prompt": "why", "steps": [{"text": "glad", "label": 0.5}]},
]
MIXTURES = {
    "everything": [PAIRS[0], *STEPS, RANKING, *SCORES, PAIRS[1], *LABELS, PAIRS[2]],
    "ratings and pairs": [*SCORES, PAIRS[0], *LABELS],
    "ratings": SCORES,
    "steps": STEPS,
}


def weights_of(options):
    return {"score": options.score_weight, "label": options.label_weight, "steps": options.steps_weight}


def slow_loss(critic, row):
    values = [critic.values(critic.batch_of([ids]))[0] for ids in row.responses]
    if row.kind == "preference":
        rewards = torch.stack([of_response[-1] for of_response in values])
        chosen = [-torch.log_softmax(rewards[place:], 0)[0] for place in range(len(rewards) - 1)]
        return sum(chosen) + OPTIONS.centering_coefficient * (2 * rewards.mean()) ** 2
    losses = []
    for token, target in zip(row.tokens_A.tolist(), row.targets_A.tolist(), strict=True):
        value, wanted = values[0][token], torch.tensor(target)
        losses.append(
            (value - wanted) ** 2 if row.kind == "score" else F.binary_cross_entropy_with_logits(value, wanted)
        )
    return weights_of(OPTIONS)[row.kind] * sum(losses) / len(losses)


@pytest.mark.parametrize("prefix_tree", [True, False], ids=["tree", "padded"])
@pytest.mark.parametrize("name", MIXTURES)
def test_loss_and_gradient_are_those_of_rows_alone(tiny_model, tmp_path, name, prefix_tree):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in MIXTURES[name]))
    encoder = Encoder(load_tokenizer(tiny_model), 64)
    table = load_preferences(str(data), encoder, str(tmp_path / "cache"))
    rows = table.take(np.arange(len(table)))
    torch.manual_seed(0)
    critic = create_critic_model(tiny_model, encoder.tokenizer, None, disable_dropout=True, prefix_tree=prefix_tree)

    targets = [Targets(row.kind, row.targets_A, row.tokens_A) if row.kind != "preference" else None for row in rows]
    batch = critic.batch_of([ids for row in rows for ids in row.responses])
    output = critic(batch, rewards_only=not reads_values(OPTIONS, targets))
    assert output.dim() == (2 if any(row.kind == "steps" for row in rows) else 1)
    loss, sums = blended_loss(output, [row.responses for row in rows], targets, table.margins_N, OPTIONS)
    loss.sum().backward()
    gradients = {name: one.grad.clone() for name, one in critic.named_parameters() if one.grad is not None}

    critic.zero_grad()
    slow = torch.stack([slow_loss(critic, row) for row in rows])
    slow.sum().backward()
    torch.testing.assert_close(loss, slow.float(), rtol=1e-4, atol=1e-5)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, critic.get_parameter(parameter).grad, rtol=1e-3, atol=1e-5)
    assert int(sums[3]) == sum(row.kind in {"label", "steps"} for row in rows)


def test_preferences_alone_have_their_loss_to_the_last_bit():
    rewards = torch.randn(4, generator=torch.Generator().manual_seed(1))
    rows = [[[1, 2], [1, 3]], [[4], [5]]]
    margins = np.full(2, np.nan, dtype=np.float32)
    alone = preference_loss(rewards, rows, margins, OPTIONS)
    blended, sums = blended_loss(rewards, rows, [None, None], margins, OPTIONS)
    assert torch.equal(alone.loss_P, blended)
    assert torch.equal(alone.sums(), sums[:2])
