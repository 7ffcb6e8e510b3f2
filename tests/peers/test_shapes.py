"""Requests and answers of peers, as recorded in shapes.json. These tests run without the peers."""

import json
from pathlib import Path

import pytest

from rlhf_critic.scoring.http_schema import ClassifyRequest, ClassifyResponse, GetRewardRequest, GetRewardResponse

SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
REQUESTS = {"/classify": ClassifyRequest, "/get_reward": GetRewardRequest}
ANSWERS = {"/classify": ClassifyResponse, "/get_reward": GetRewardResponse}


def cases(kind):
    return [(endpoint, sender) for endpoint, shapes in SHAPES[kind].items() for sender in shapes]


def shape_of(value):
    """Returns the names and types of a JSON value; all entries of a list have the shape of its first one."""
    if isinstance(value, dict):
        return {name: shape_of(entry) for name, entry in value.items()}
    return [shape_of(value[0])] if isinstance(value, list) else type(value).__name__


@pytest.mark.parametrize(("endpoint", "sender"), cases("requests"))
def test_a_recorded_request_is_taken_with_everything_that_it_asks(endpoint, sender):
    asked = SHAPES["requests"][endpoint][sender]
    taken = REQUESTS[endpoint].model_validate(asked).model_dump(mode="json", exclude_unset=True)
    for name in ("input", "messages", "query", "prompts", "labels", "model"):
        assert shape_of(taken.get(name)) == shape_of(asked.get(name))


@pytest.mark.parametrize(("endpoint", "sender"), cases("answers"))
def test_our_answer_has_the_fields_that_a_recorded_one_has(endpoint, sender):
    recorded = SHAPES["answers"][endpoint][sender]
    ours = {**recorded, "model_version": "v"} if endpoint == "/get_reward" else recorded
    dumped = ANSWERS[endpoint].model_validate(ours).model_dump(mode="json")
    assert {name: shape_of(dumped[name]) for name in recorded} == shape_of(recorded)
