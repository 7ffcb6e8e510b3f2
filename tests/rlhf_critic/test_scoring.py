"""A text has the same token ids however it comes, and what cannot be scored is refused with a word for the reason."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_critic.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring import Conversation, Limits, Text, conversations, encode_items, finish_items

LIMITS = Limits(max_items=4, max_text_bytes=100, max_tokens=40)
MAX_LENGTH = 16


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return Encoder(load_tokenizer(tiny_model), MAX_LENGTH)


def test_every_way_gives_the_ids_of_training(encoder):
    prompt, response = "please explain", "of course I am glad to explain how this works"
    wanted = encoder.encode(prompt, response)
    ways = [
        Conversation(prompt, response),
        Conversation([{"role": "user", "content": prompt}], response),
        Text(encoder.render(prompt, response)),
    ]
    for item in ways:
        assert encode_items([item], encoder, Limits()) == [wanted]
    for ids in (wanted.ids, tuple(wanted.ids), np.array(wanted.ids, dtype=np.int32)):
        assert encode_items([ids], encoder, Limits())[0].ids == wanted.ids
    assert encode_items([*ways, wanted.ids], encoder, Limits())[3].ids == wanted.ids
    assert wanted.truncated


def test_the_end_of_a_policys_text_is_put_right(encoder):
    rendered = encoder.render("please", "of course")
    body = rendered.removesuffix(encoder.ending)
    assert body != rendered
    pad = encoder.tokenizer.pad_token
    for text in (rendered, body, body + "</s></s>", body + "</s>" + pad + pad):
        (item,) = finish_items([Text(text, "of course</s>" + pad, finish=True)], encoder)
        assert item == Text(rendered, "of course")
    untouched = [Text(body), Conversation("a", "b</s>"), [1, 2]]
    assert finish_items(untouched, encoder) == untouched
    with pytest.raises(ScorerRejected, match="item 0 is empty"):
        encode_items(finish_items([Text("</s>", finish=True)], encoder), encoder, LIMITS)


REFUSED = {
    "no items": ([], "no_items", None),
    "too many": ([Text("a")] * 5, "too_many_items", None),
    "empty text": ([Text("a"), Text("")], "empty_text", 1),
    "empty conversation": ([Conversation("", "")], "empty_text", 0),
    "empty ids": ([[]], "empty_text", 0),
    "a number": ([Text(3)], "not_text", 0),
    "a response of bytes": ([Conversation("a", b"b")], "not_text", 0),
    "a part that is no text": ([Text("a", 3)], "not_text", 0),
    "a prompt of numbers": ([Conversation([1], "b")], "not_text", 0),
    "a turn without content": ([Conversation([{"role": "user"}], "b")], "not_text", 0),
    "a turn with parts": ([Conversation([{"role": "user", "content": ["x"]}], "b")], "not_text", 0),
    "a bare string": (["a"], "not_text", 0),
    "None": ([None], "not_text", 0),
    "floats": ([[1.0, 2.0]], "not_text", 0),
    "booleans": ([[True]], "not_text", 0),
    "nested ids": ([[[1], [2]]], "not_text", 0),
    "ragged ids": ([[[1], [2, 3]]], "not_text", 0),
    "an endless integer": ([[10**30]], "not_text", 0),
    "an id too high": ([[1, 10**6]], "bad_token_id", 0),
    "an id too low": ([[1, -1]], "bad_token_id", 0),
    "too many ids": ([[5] * (MAX_LENGTH + 1)], "too_many_tokens", 0),
    "too many bytes": ([Text("é" * 51)], "text_too_long", 0),
    "too many tokens": ([Text("1 2 3 " * 16)], "too_many_tokens", 0),
    "half a surrogate pair": ([Text("\ud800")], "not_unicode", 0),
    "the pad token at the end": ([[1], Text("a"), Text("a<|pad|>")], "no_end", 2),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what, encoder):
    items, kind, index = REFUSED[what]
    with pytest.raises(ScorerRejected) as refused:
        encode_items(items, encoder, LIMITS)
    assert (refused.value.kind, refused.value.item) == (kind, index)
    assert index is None or f"item {index}" in str(refused.value)


def test_limits_are_exact(encoder):
    assert len(encode_items([Text("a")] * LIMITS.max_items, encoder, LIMITS)) == LIMITS.max_items
    encode_items([Text("é" * 50)], encoder, Limits(max_text_bytes=100))
    assert encode_items([[5] * MAX_LENGTH], encoder, LIMITS)[0].ids == [5] * MAX_LENGTH
    ids = encoder.tokenize(["1 2 3 4"])[0]
    encode_items([Text("1 2 3 4")], encoder, Limits(max_tokens=len(ids)))
    with pytest.raises(ScorerRejected, match="tokens, at most"):
        encode_items([Text("1 2 3 4")], encoder, Limits(max_tokens=len(ids) - 1))


def test_an_empty_response_is_a_response(encoder):
    assert encode_items([Conversation("please", "")], encoder, LIMITS)[0] == encoder.encode("please", "")


def test_prompts_and_responses_come_in_equal_numbers():
    assert conversations(["a"], ["b"]) == [Conversation("a", "b")]
    for prompts, responses, kind in (
        (["a"], [], "unequal_lengths"),
        ("a", "b", "not_a_list"),
        (["a"], "b", "not_a_list"),
    ):
        with pytest.raises(ScorerRejected) as refused:
            conversations(prompts, responses)
        assert refused.value.kind == kind


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
items = st.one_of(
    anything, st.builds(Text, anything, anything, st.booleans()), st.builds(Conversation, anything, anything)
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(items, max_size=4))
def test_whatever_is_asked_is_encoded_or_refused(encoder, asked):
    try:
        encoded = encode_items(finish_items(asked, encoder), encoder, LIMITS)
    except ScorerRejected:
        return
    assert len(encoded) == len(asked)
    assert all(0 < len(one.ids) <= MAX_LENGTH for one in encoded)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=4))
def test_neighbours_change_nothing(encoder, texts):
    together = encode_items([Text(text + ".") for text in texts], encoder, Limits())
    assert together == [encode_items([Text(text + ".")], encoder, Limits())[0] for text in texts]
