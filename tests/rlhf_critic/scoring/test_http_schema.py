"""Scores and items survive HTTP to the last bit, and invalid messages are rejected."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError

from rlhf_critic.scoring.http_schema import (
    ClassifyRequest,
    ErrorResponse,
    GetRewardRequest,
    ScoreRequest,
    ScoreResponse,
)
from rlhf_critic.scoring.items import Conversation, Scores, Text

fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
some_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
said_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def rewards(count):
    return arrays.arrays(np.float32, count, elements=fp32)


@st.composite
def any_scores(draw):
    count = draw(st.integers(1, 6))
    return Scores(
        rewards_S=draw(rewards(count)),
        model_version=draw(some_text),
        truncated_S=draw(arrays.arrays(np.bool_, count)),
        tokens_S=draw(arrays.arrays(np.int64, count, elements=st.integers(0, 2**31))),
        components=draw(st.dictionaries(some_text, rewards(count), max_size=3)),
        values=draw(st.none() | st.tuples(*[rewards(st.integers(1, 9)) for _ in range(count)])),
        token_texts=draw(st.none() | st.tuples(*[st.lists(some_text).map(tuple) for _ in range(count)])),
    )


def same(one, other):
    """Returns whether arrays are equal in every bit, including the sign of zero."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def through_pydantic(response):
    return response.model_dump_json()


def through_pythons_json(response):
    return json.dumps(response.model_dump(mode="json"), ensure_ascii=False)


@settings(max_examples=200, deadline=None)
@given(any_scores(), st.sampled_from([through_pydantic, through_pythons_json]))
def test_scores_cross_the_wire_with_every_bit(scores, write):
    back = ScoreResponse.model_validate_json(write(ScoreResponse.of(scores))).to_scores()
    assert back.model_version == scores.model_version
    for name in ("rewards_S", "truncated_S", "tokens_S"):
        assert same(getattr(back, name), getattr(scores, name)), name
    assert list(back.components) == list(scores.components)
    assert all(same(back.components[name], value_S) for name, value_S in scores.components.items())
    assert (back.values is None) == (scores.values is None)
    assert back.token_texts == scores.token_texts
    assert scores.values is None or len(back.values) == len(scores.values)
    assert all(same(one, other) for one, other in zip(back.values or (), scores.values or (), strict=True))


def test_the_ends_of_fp32_cross_the_wire():
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    rewards_S = np.array([0.0, -0.0, tiny, -tiny, huge, -huge, 0.1, 1 + 2**-23, 16777217.0], dtype=np.float32)
    nothing_S = np.zeros(9, dtype=np.int64)
    scores = Scores(rewards_S, "v", nothing_S.astype(np.bool_), nothing_S)
    back = ScoreResponse.model_validate_json(ScoreResponse.of(scores).model_dump_json()).to_scores()
    assert same(back.rewards_S, rewards_S)


turns = st.lists(st.fixed_dictionaries({"role": said_text, "content": some_text}), max_size=3)
token_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
items = st.one_of(
    st.builds(Conversation, some_text, some_text),
    st.builds(Conversation, turns, some_text),
    st.builds(Conversation, turns.map(tuple), some_text),
    st.builds(Text, said_text, st.none() | some_text, st.booleans()),
    token_ids,
    token_ids.map(tuple),
    token_ids.map(lambda ids: np.array(ids, dtype=np.int64)),
    token_ids.map(lambda ids: np.array(ids, dtype=np.uint32)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(items, min_size=1, max_size=6), st.booleans(), st.none() | said_text)
def test_items_cross_the_wire(asked, values, version):
    body = json.dumps(ScoreRequest.of(asked, values, version), ensure_ascii=False)
    request = ScoreRequest.model_validate_json(body)
    assert (request.values, request.version) == (values, version)
    back = [item.to_item() for item in request.items]
    for one, other in zip(back, asked, strict=True):
        if isinstance(other, Conversation):
            prompt = other.prompt if isinstance(other.prompt, str) else list(other.prompt)
            assert one == Conversation(prompt, other.response)
        elif isinstance(other, Text):
            assert one == other
            assert isinstance(one, Text)
        else:
            assert isinstance(one, np.ndarray)
            assert (one.dtype, one.tolist()) == (np.int64, np.asarray(other).tolist())


def test_a_chat_is_its_last_turn_in_answer_to_the_others():
    chat = {"messages": [{"role": "user", "content": "please"}, {"role": "assistant", "content": "of course"}]}
    (item,) = ScoreRequest.model_validate({"items": [chat]}).items
    assert item.to_item() == Conversation([{"role": "user", "content": "please"}], "of course")


@pytest.mark.parametrize(
    "request_",
    [
        {"items": []},
        {},
        {"items": [{}]},
        {"items": ["a"]},
        {"items": [{"text": ""}]},
        {"items": [{"text": "a", "finish": "yes"}]},
        {"items": [{"prompt": "a"}]},
        {"items": [{"prompt": "a", "response": 3}]},
        {"items": [{"prompt": "a", "response": "b", "text": "c"}]},
        {"items": [{"prompt": [{"role": "", "content": "a"}], "response": "b"}]},
        {"items": [{"prompt": [{"role": "user"}], "response": "b"}]},
        {"items": [{"messages": []}]},
        {"items": [{"token_ids": []}]},
        {"items": [{"token_ids": [-1]}]},
        {"items": [{"token_ids": [2**31]}]},
        {"items": [{"token_ids": [1.0]}]},
        {"items": [{"token_ids": [True]}]},
        {"items": [{"token_ids": ["1"]}]},
        {"items": [{"text": "a"}], "values": 1},
        {"items": [{"text": "a"}], "version": ""},
        {"items": [{"text": "a"}], "more": 1},
    ],
    ids=json.dumps,
)
def test_what_is_no_request_is_refused(request_):
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate_json(json.dumps(request_))


@pytest.mark.parametrize(
    ("model", "request_"),
    [
        (ScoreRequest, {"items": [0] * 10_000}),
        (ScoreRequest, {"items": [{"token_ids": ["a"] * 10_000}]}),
        (ScoreRequest, {"items": [{"messages": [0] * 10_000}]}),
        (ScoreRequest, {"items": [{"prompt": [0] * 10_000, "response": "a"}]}),
        (GetRewardRequest, {"query": [0] * 10_000}),
        (GetRewardRequest, {"query": ["a"], "prompts": [0] * 10_000}),
        (ClassifyRequest, {"input": [{}] * 10_000}),
        (ClassifyRequest, {"input": [[{}] * 10_000]}),
        (ClassifyRequest, {"messages": [0] * 10_000}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else next(iter(value)),
)
def test_a_list_of_what_is_no_item_is_not_read_to_its_end(model, request_):
    """Guards memory: one error per entry would exhaust it for a body of a few megabytes."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate(request_)
    assert refused.value.error_count() < 20


def test_an_error_says_which_item_it_is_about_or_that_it_is_about_none():
    told = {"kind": "empty_text", "message": "item 3 is empty"}
    assert ErrorResponse.model_validate({"error": told}).error.item is None
    assert ErrorResponse.model_validate({"error": {**told, "item": 3}}).error.item == 3
