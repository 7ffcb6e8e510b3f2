"""Scorers give the value at the end of each step, by every way to ask."""

import json

import numpy as np
import pytest

from actors.serving.scorer import Scorer
from rlhf_critic.checkpoint.critic_directory import load_critic
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.errors import ScorerFailed, ScorerRejected
from rlhf_critic.scoring.client import _join, _validate
from rlhf_critic.scoring.http_schema import ScoreRequest, ScoreResponse
from rlhf_critic.scoring.items import Conversation, StepConversation
from rlhf_critic.scoring.local import value_sequences
from rlhf_critic.scoring.rows import parse_scorable
from tests.actors.scorers import save_tiny_critic

STEPS = ["of course", "thank you", "no"]
ITEMS = [StepConversation("please", STEPS), Conversation("please", "no"), StepConversation("why", STEPS[:1])]


@pytest.fixture(scope="module")
def critic(tiny_model, tmp_path_factory):
    return save_tiny_critic(tiny_model, tmp_path_factory.mktemp("critic") / "one", 1, "tiny@1")


@pytest.fixture(scope="module")
def scorer(critic):
    made = Scorer(ScorerConfig(checkpoint=critic))
    yield made
    made.close()


def test_step_values_are_the_values_of_training_at_the_ends_of_steps(critic, scorer):
    scores = scorer.score(ITEMS)
    loaded = load_critic(critic)
    encoded = [loaded.encoder.encode_steps(item.prompt, item.steps) for item in (ITEMS[0], ITEMS[2])]
    values = value_sequences(loaded.critic, [one.ids for one in encoded], 512)
    for found, value_T, one in zip(scores.step_values[::2], values, encoded, strict=True):
        np.testing.assert_allclose(found, value_T[list(one.step_tokens)], atol=1e-5)
    assert scores.step_values[1] is None
    assert scores.values is None
    np.testing.assert_allclose(scores.rewards_S[0], scorer.score([ITEMS[0].joined()]).rewards_S[0], atol=1e-5)
    assert scorer.score(ITEMS[1:2]).step_values is None


def test_steps_cross_the_wire_and_parts_are_joined(scorer):
    sent = ScoreRequest.model_validate(json.loads(json.dumps(ScoreRequest.of(ITEMS, False, None))))
    scores = scorer.score([model.to_item() for model in sent.items])
    received = ScoreResponse.model_validate_json(ScoreResponse.of(scores).model_dump_json()).to_scores()
    _validate(received, ITEMS, False, None)
    joined = _join([received, scorer.score(ITEMS[1:2])])
    assert [None if values is None else len(values) for values in joined.step_values] == [3, None, 1, None]
    with pytest.raises(ScorerFailed, match="not one value per step"):
        _validate(received, [StepConversation("please", STEPS[:2]), *ITEMS[1:]], False, None)


@pytest.mark.parametrize("steps", [STEPS, [{"text": step, "label": True} for step in STEPS]], ids=["texts", "objects"])
def test_rows_to_score_may_have_steps(steps):
    assert parse_scorable("file:1", {"prompt": "please", "steps": steps}, {}) == [
        StepConversation("please", tuple(STEPS))
    ]
    row = {"prompt": "please", "response": "no", "steps": 3}  # another program's field is passed through
    assert parse_scorable("file:1", row, {}) == [Conversation("please", "no")]


@pytest.mark.parametrize(
    ("steps", "kind"),
    [("abc", "not_text"), ([1], "not_text"), (["a", " "], "template_refused"), ([], "template_refused")],
)
def test_steps_that_cannot_be_scored_are_refused(scorer, steps, kind):
    with pytest.raises(ScorerRejected) as refused:
        scorer.score([ITEMS[1], StepConversation("please", steps)])
    assert (refused.value.kind, refused.value.item) == (kind, 1)


def test_a_step_before_the_critics_limit_is_refused(critic, scorer):
    limit = load_critic(critic).encoder.max_length
    with pytest.raises(ScorerRejected, match="steps before the last"):
        scorer.score([StepConversation("please", ["of course"] * limit)])
