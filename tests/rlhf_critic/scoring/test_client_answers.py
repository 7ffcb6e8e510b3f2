"""The client refuses answers that do not belong to their call."""

import numpy as np
import pytest

from rlhf_critic.errors import ScorerFailed, VersionMismatch
from rlhf_critic.scoring.client import ScorerClient
from rlhf_critic.scoring.items import Conversation, Scores

ITEMS = [Conversation("p", "yes"), Conversation("p", "no")]


class Answers:
    """A transport whose answers are made by a function of the number of items and of the call."""

    def __init__(self, answer):
        self.answer, self.calls = answer, 0

    async def ask(self, items, values, version, timeout_s):
        self.calls += 1
        return self.answer(len(items), self.calls)

    async def close(self):
        pass


def scores_of(count, **changed):
    zeros_S = np.zeros(count, dtype=np.float32)
    good = {"rewards_S": zeros_S, "truncated_S": zeros_S.astype(np.bool_), "tokens_S": np.full(count, 2)}
    values = tuple(np.zeros(2, dtype=np.float32) for _ in range(count))
    return Scores(**{"model_version": "v1", "components": {"half": zeros_S}, "values": values, **good, **changed})


LIES = {
    "too few rewards": {"rewards_S": np.zeros(1, np.float32)},
    "too many rewards": {"rewards_S": np.zeros(3, np.float32)},
    "no rewards": {"rewards_S": np.zeros(0, np.float32)},
    "rewards in columns": {"rewards_S": np.zeros((2, 1), np.float32)},
    "too few flags": {"truncated_S": np.zeros(1, np.bool_)},
    "too few counts": {"tokens_S": np.zeros(1, np.int64)},
    "a component that is too short": {"components": {"half": np.zeros(1, np.float32)}},
    "NaN": {"rewards_S": np.array([0, np.nan], np.float32)},
    "infinity": {"rewards_S": np.array([np.inf, 0], np.float32)},
    "a component that is NaN": {"components": {"half": np.array([np.nan, 0], np.float32)}},
    "no values": {"values": None},
    "values of one item": {"values": (np.zeros(2, np.float32),)},
    "too few values": {"values": (np.zeros(2, np.float32), np.zeros(1, np.float32))},
    "values that are NaN": {"values": (np.zeros(2, np.float32), np.full(2, np.nan, np.float32))},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_does_not_belong_to_its_call_is_an_error(lie):
    transport = Answers(lambda count, _: scores_of(count, **LIES[lie]))
    refused = pytest.raises(ScorerFailed, match="the answer does not belong to a call of 2 items")
    with ScorerClient(transport, max_items_per_call=2) as client, refused:
        client.score_items(ITEMS, values=True)
    assert transport.calls == 1


def test_a_version_that_was_not_asked_for_is_no_answer():
    deaf = Answers(lambda count, _: scores_of(count))
    with ScorerClient(deaf) as client, pytest.raises(VersionMismatch, match="v7 was requested, and v1 answered"):
        client.score_items(ITEMS, version="v7")


def test_parts_with_different_components_are_not_joined():
    changes = Answers(lambda count, call: scores_of(count, components={f"name{call}": np.zeros(count, np.float32)}))
    with ScorerClient(changes, max_items_per_call=1) as client, pytest.raises(ScorerFailed, match="different comp"):
        client.score_items(ITEMS)
