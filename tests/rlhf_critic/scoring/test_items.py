"""A text has the same token ids in every form, and each reason to reject an item has its own kind."""

import inspect
import re
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_critic.config.serve import CallLimits
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring import items as items_module
from rlhf_critic.scoring.items import Conversation, Text, conversations, encode_items, finish_items
from tests.helpers import CHAT_TEMPLATE

LIMITS = CallLimits(max_items=4, max_text_bytes=100, max_tokens=40)
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
        assert encode_items([item], encoder, CallLimits()) == [wanted]
    for ids in (wanted.ids, tuple(wanted.ids), np.array(wanted.ids, dtype=np.int32)):
        assert encode_items([ids], encoder, CallLimits())[0].ids == wanted.ids
    assert encode_items([*ways, wanted.ids], encoder, CallLimits())[3].ids == wanted.ids
    assert wanted.truncated


def test_the_end_of_a_policys_text_is_put_right(encoder):
    rendered = encoder.render("please", "of course")
    body = rendered.removesuffix(encoder.ending)
    assert body != rendered
    pad = encoder.tokenizer.pad_token
    for text in (rendered, body, body + "</s></s>", body + "</s>" + pad + pad):
        (item,) = finish_items([Text(text, "of course</s>" + pad, finish=True)], encoder, LIMITS)
        assert item == Text(rendered, "of course")
    untouched = [Text(body), Conversation("a", "b</s>"), [1, 2]]
    assert finish_items(untouched, encoder, LIMITS) == untouched
    with pytest.raises(ScorerRejected, match="item 0 is empty"):
        encode_items(finish_items([Text("</s>", finish=True)], encoder, LIMITS), encoder, LIMITS)


@pytest.mark.parametrize("bos", ["<s>", "</s>"])
@pytest.mark.parametrize("finish", [True, False])
def test_padding_written_as_text_changes_nothing(finish, bos, tokenizer_dir):
    """BOS is also EOS in GPT-2 and OPT."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir(chat_template="{{ bos_token }}" + CHAT_TEMPLATE))
    tokenizer.bos_token = bos
    tokenizer.save_pretrained(tokenizer.name_or_path)
    encoder = Encoder(load_tokenizer(tokenizer.name_or_path), MAX_LENGTH)
    rendered = encoder.render("please", "of course")
    assert rendered.startswith(f"{bos}<|user|>")
    ways = [
        left * count + rendered + right * more
        for left in (encoder.tokenizer.pad_token, "</s>", "<unk>", f"{encoder.tokenizer.pad_token} ")
        for right in (encoder.tokenizer.pad_token, "</s>")
        for count in (0, 1, 6)
        for more in (0, 1, 6)
    ]
    finished = finish_items([Text(way, finish=finish) for way in ways], encoder, CallLimits())
    assert {item.text for item in finished} == {rendered}
    assert finish_items([Text(f"a {bos} b")], encoder, CallLimits()) == [Text(f"a {bos} b")]
    empty = Encoder(load_tokenizer(tokenizer.name_or_path, "plain"), MAX_LENGTH)
    assert finish_items([Text("</s>")], empty, CallLimits()) == [Text("</s>")]


def test_a_text_that_is_too_long_is_refused_before_its_end_is_worked_on(encoder):
    endless = [Text("</s>" * 1_000_000, finish=True), Text("a", "</s>" * 1_000_000, finish=True)]
    assert finish_items(endless, encoder, LIMITS) == endless
    for item in endless:
        with pytest.raises(ScorerRejected, match="maximum 100"):
            encode_items([item], encoder, LIMITS)


good_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
good_turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": good_text}), max_size=3
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(good_text, good_turns), good_text)
def test_any_conversation_has_the_ids_of_training_and_says_what_it_lost(encoder, prompt, response):
    (wanted,) = encoder.encode_batch([(prompt, response)])
    whole = encoder.tokenize([encoder.render(prompt, response)])[0]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ways = [Text(encoder.render(prompt, response))]
    if response or "".join(turn["content"] for turn in turns):
        ways += [Conversation(prompt, response), Conversation(turns, response), Conversation(tuple(turns), response)]
        ways += [Conversation(np.array(turns, dtype=object), response)] * bool(turns)
        ways += [Conversation([MappingProxyType(turn) for turn in turns], response)]
    encoded = encode_items([*ways, wanted.ids], encoder, CallLimits())
    assert encoded[:-1] == [wanted] * len(ways)
    assert encoded[-1].ids == wanted.ids == whole[-MAX_LENGTH:]
    assert wanted.truncated == (len(whole) > MAX_LENGTH)


def an_iterator_of_turns():
    yield {"role": "user", "content": "please"}


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
    "an image": ([Conversation([{"role": "user", "content": [{"type": "image"}]}], "b")], "not_text", 0),
    "a response that calls a number": ([Conversation("a", {"role": "assistant", "tool_calls": 3})], "not_text", 0),
    "a response of the user": ([Conversation("a", {"role": "user", "content": "b"})], "no_response", 0),
    "a bare string": (["a"], "not_text", 0),
    "None": ([None], "not_text", 0),
    "floats": ([[1.0, 2.0]], "not_text", 0),
    "booleans": ([[True]], "not_text", 0),
    "nested ids": ([[[1], [2]]], "not_text", 0),
    "ragged ids": ([[[1], [2, 3]]], "not_text", 0),
    "an endless integer": ([[10**30]], "not_text", 0),
    "bytes": ([b"ab"], "not_text", 0),
    "bytes that could be ids": ([bytearray(b"ab")], "not_text", 0),
    "a view of bytes": ([memoryview(b"ab")], "not_text", 0),
    "a dictionary": ([{"text": "a"}], "not_text", 0),
    "a single id": ([5], "not_text", 0),
    "a tensor with a gradient": ([torch.ones(2, requires_grad=True)], "not_text", 0),
    "a prompt that is used up": ([Conversation(an_iterator_of_turns(), "b")], "not_text", 0),
    "a prompt of bytes": ([Conversation(b"", "b")], "not_text", 0),
    "a prompt that is a turn": ([Conversation({"role": "user", "content": "a"}, "b")], "not_text", 0),
    "a prompt of arrays": ([Conversation(np.array([1, 2]), "b")], "not_text", 0),
    "a ragged prompt": ([Conversation([[1], [2, 3]], "b")], "not_text", 0),
    "no prompt at all": ([Conversation(None, "b")], "not_text", 0),
    "half a surrogate pair in a role": ([Conversation([{"role": "\ud800", "content": "a"}], "b")], "not_unicode", 0),
    "a response of too many bytes": ([Text("a", "r" * 101)], "text_too_long", 0),
    "too many bytes in a role": ([Conversation([{"role": "r" * 99, "content": "a"}], "b")], "text_too_long", 0),
    "padded ids": ("padded", "no_end", 0),
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
    if items == "padded":
        items = [[5, encoder.tokenizer.pad_token_id]]
    with pytest.raises(ScorerRejected) as refused:
        encode_items(items, encoder, LIMITS)
    assert (refused.value.kind, refused.value.item) == (kind, index)
    assert index is None or f"item {index}" in str(refused.value)


def test_an_item_is_named_wherever_it_stands(encoder):
    for bad in (Text(""), Text("1 2 3 " * 16), Text("a<|pad|>"), [10**6], None, Conversation("a", None)):
        for index in range(4):
            items = [Text("a"), [1], Conversation("a", "b")]
            items.insert(index, bad)
            with pytest.raises(ScorerRejected, match=f"item {index}[: ]") as refused:
                encode_items(items, encoder, LIMITS)
            assert refused.value.item == index


def test_a_conversation_that_the_template_refuses(tokenizer_dir):
    template = "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[-1].content }}</s>"
    encoder = Encoder(load_tokenizer(tokenizer_dir(chat_template=template)), MAX_LENGTH)
    with pytest.raises(ScorerRejected, match=r"item 1: .*no system") as refused:
        encode_items([Text("a"), Conversation([{"role": "system", "content": "a"}], "b")], encoder, LIMITS)
    assert (refused.value.kind, refused.value.item) == ("template_refused", 1)


def test_every_refusal_has_a_row():
    said = set(re.findall(r'(?:_rejected|ScorerRejected)\(\s*"(\w+)"', inspect.getsource(items_module)))
    assert said == {kind for _, kind, _ in REFUSED.values()} | {"template_refused", "unequal_lengths", "not_a_list"}


def test_limits_are_exact(encoder):
    assert len(encode_items([Text("a")] * LIMITS.max_items, encoder, LIMITS)) == LIMITS.max_items
    encode_items([Text("é" * 50)], encoder, CallLimits(max_text_bytes=100))
    rendered = encoder.render("é", "é")
    exact = CallLimits(max_text_bytes=len(rendered.encode()))
    assert encode_items([Conversation("é", "é")], encoder, exact) == encode_items([Text(rendered)], encoder, exact)
    for item in (Conversation("é", "é"), Text(rendered)):
        with pytest.raises(ScorerRejected, match="bytes, maximum"):
            encode_items([item], encoder, CallLimits(max_text_bytes=exact.max_text_bytes - 1))
    assert encode_items([[5] * MAX_LENGTH], encoder, LIMITS)[0].ids == [5] * MAX_LENGTH
    last = len(encoder.tokenizer) - 1
    assert encode_items([[last, 0]], encoder, LIMITS)[0].ids == [last, 0]
    with pytest.raises(ScorerRejected, match=f"token id {last + 1} is not in"):
        encode_items([[last + 1, 0]], encoder, LIMITS)
    digits = [Text("1" * MAX_LENGTH), Text("1" * (MAX_LENGTH + 1))]
    assert [(len(one.ids), one.truncated) for one in encode_items(digits, encoder, LIMITS)] == [
        (MAX_LENGTH, False),
        (MAX_LENGTH, True),
    ]
    ids = encoder.tokenize(["1 2 3 4"])[0]
    encode_items([Text("1 2 3 4")], encoder, CallLimits(max_tokens=len(ids)))
    with pytest.raises(ScorerRejected, match="tokens, maximum"):
        encode_items([Text("1 2 3 4")], encoder, CallLimits(max_tokens=len(ids) - 1))


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


some_text = st.text(st.characters(), max_size=9) | st.sampled_from(
    ["\ud800", "a\0", "</s>", "<|pad|>", "a<|pad|>", "[]"]
)
some_array = st.sampled_from("?bBhHiIlLefdgFDSUOmM").map(lambda kind: np.zeros(2, dtype=kind)) | st.sampled_from(
    [np.array(5), np.zeros((2, 2), int), np.array([], int), np.array([{}, None]), np.int64(3), np.array(["a"])]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | some_text | st.binary(max_size=3) | some_array,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(some_text, inner, max_size=3),
        st.fixed_dictionaries({"role": inner, "content": inner}),
        st.lists(st.fixed_dictionaries({"role": some_text, "content": some_text, "name": inner}), max_size=2),
    ),
    max_leaves=6,
)
items = st.one_of(
    anything, st.builds(Text, anything, anything, st.booleans()), st.builds(Conversation, anything, anything)
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(items, max_size=4))
def test_whatever_is_asked_is_encoded_or_rejected(encoder, asked):
    try:
        encoded = encode_items(finish_items(asked, encoder, LIMITS), encoder, LIMITS)
    except ScorerRejected:
        return
    assert len(encoded) == len(asked)
    assert all(0 < len(one.ids) <= MAX_LENGTH for one in encoded)


good_items = st.one_of(
    st.builds(lambda text: Text(text + "."), good_text),
    st.builds(
        lambda prompt, response: Conversation(prompt, response + "."), st.one_of(good_text, good_turns), good_text
    ),
    st.lists(st.integers(0, 255), min_size=1, max_size=MAX_LENGTH),
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(good_items, min_size=1, max_size=6))
def test_neighbours_change_nothing(encoder, asked):
    together = encode_items(asked, encoder, CallLimits())
    assert together == [encode_items([item], encoder, CallLimits())[0] for item in asked]
