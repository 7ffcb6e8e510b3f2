"""Prompts of every shape become the text before a response; bad prompts are rejected by file and line."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.prompts import Prompts, load_prompts, split_prompts
from rlhf_critic.data.special_tokens import validate_same_tokens
from rlhf_critic.errors import DataError, EncodingError
from tests.helpers import save_tiny_tokenizer

TEXT = "please explain"
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "glad to"},
    {"role": "user", "content": "why?"},
]
SPOKEN = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}"
)


def encoder_of(directory, template="auto", max_length=4096) -> Encoder:
    return Encoder(load_tokenizer(str(directory), template), max_length)


def write(path, prompts, field="prompt") -> str:
    path.write_text("".join(json.dumps({field: prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return str(path)


@pytest.fixture
def encoder(tokenizer_dir) -> Encoder:
    return encoder_of(tokenizer_dir(chat_template=SPOKEN))


@pytest.mark.parametrize("peculiarity", [{}, {"adds_bos": True}, {"pad_is_eos": True}])
@pytest.mark.parametrize("template", ["auto", "plain"])
@pytest.mark.parametrize("prompt", [TEXT, TURNS], ids=["text", "turns"])
@pytest.mark.parametrize("response", [" of course", "! naïve", ""])
def test_ids_are_the_beginning_of_what_the_critic_reads(
    prompt, response, template, peculiarity, tokenizer_dir, tmp_path
):
    encoder = encoder_of(tokenizer_dir(chat_template=SPOKEN, **peculiarity), template)
    loaded = load_prompts([write(tmp_path / "prompts.jsonl", [prompt])], encoder, 100)
    (ids,) = loaded.ids
    assert list(loaded.prompts) == [prompt]
    whole = encoder.encode(prompt, response).ids
    assert whole[: len(ids)] == list(ids)
    assert encoder.tokenizer.decode(whole[len(ids) :]).startswith(response)
    assert len(whole) > len(ids), "an end at least comes after it"


def test_what_comes_before_a_response_is_found_whatever_the_prompt_says(encoder):
    for prompt in ("␂", "a ␂ b", "<|assistant|>\n", "", [*TURNS[:1], {"role": "assistant", "content": "␂"}]):
        opening = encoder.open(prompt)
        assert encoder.render(prompt, "glad") == opening + "glad" + encoder.ending


def test_long_prompts_lose_their_beginning_and_are_counted(encoder, tmp_path):
    prompts = ["no", "please " * 40, "thank you", "very " * 60]
    source = write(tmp_path / "prompts.jsonl", prompts)
    whole, cut = (load_prompts([source], encoder, most) for most in (1000, 30))
    assert (whole.truncated, cut.truncated) == (0, 2)
    assert [ids[-30:] for ids in whole.ids] == list(cut.ids)
    assert cut.prompts == whole.prompts
    assert "2 of them truncated from the left" in str(cut)
    assert "lost" not in str(whole)
    exact = max(len(ids) for ids in whole.ids)
    assert load_prompts([source], encoder, exact).truncated == 0


def test_sources_follow_each_other_and_a_field_may_have_another_name(encoder, tmp_path):
    first = write(tmp_path / "a.jsonl", ["one", "two"], field="instruction")
    Dataset.from_list([{"instruction": "three", "prompt": "no"}]).to_parquet(tmp_path / "b.parquet")
    loaded = load_prompts([first, str(tmp_path / "b.parquet")], encoder, 100, {"prompt": "instruction"})
    assert list(loaded.prompts) == ["one", "two", "three"]
    assert len(loaded) == 3


def test_a_run_knows_its_prompts_again_by_their_ids(encoder, tmp_path):
    source = write(tmp_path / "prompts.jsonl", ["one two three four", "please"])
    loaded = load_prompts([source], encoder, 100)
    assert load_prompts([source], encoder, 100).fingerprint == loaded.fingerprint
    moved = load_prompts([write(tmp_path / "moved.jsonl", loaded.prompts)], encoder, 100)
    assert moved.fingerprint == loaded.fingerprint
    assert load_prompts([source], encoder, 5).fingerprint != loaded.fingerprint
    assert loaded.select([1, 0]).fingerprint != loaded.fingerprint
    plain = encoder_of(encoder.tokenizer.name_or_path, "plain")
    assert load_prompts([source], plain, 100).fingerprint != loaded.fingerprint


BAD = {
    "no field": ('{"text": "a"}', "field 'prompt': must be a text, or a list of turns"),
    "a number": ('{"prompt": 3}', "field 'prompt': must be a text"),
    "a turn without a role": (
        '{"prompt": [{"content": "a"}]}',
        "field 'prompt.0.role': Field required; fix or remove this row",
    ),
    "not JSON": ('{"prompt": ', "not JSON"),
    "a role that the template refuses": (
        '{"prompt": [{"role": "wizard", "content": "a"}]}',
        r"field 'prompt': .*\['wizard', 'assistant'\].*only user and assistant",
    ),
    "half of a surrogate pair": ('{"prompt": "a\\ud800"}', "field 'prompt': .*surrogates not allowed"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_refused_by_file_and_line(what, encoder, tmp_path):
    row, message = BAD[what]
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + row + "\n")
    with pytest.raises(DataError, match=f"^{path}:2: {message}"):
        load_prompts([str(path)], encoder, 100)


def test_a_prompt_without_a_token_is_refused_where_nothing_comes_before_it(tokenizer_dir, tmp_path):
    source = write(tmp_path / "prompts.jsonl", ["a", ""])
    directory = tokenizer_dir(chat_template=SPOKEN)
    with pytest.raises(DataError, match=r"prompts.jsonl:2: field 'prompt': has no token.*chat template"):
        load_prompts([source], encoder_of(directory, "plain"), 100)
    assert len(load_prompts([source], encoder_of(directory), 100).ids[1]) > 1


def test_no_prompt_is_both_trained_on_and_held_out():
    numbers = [7, 3, 7, 1, 2, 7, 3, 9, 8, 5, 4, 6]
    prompts = Prompts(("s",), tuple(map(str, numbers)), tuple((n,) for n in numbers), 0)
    for seed in range(20):
        train, held_out = split_prompts(prompts, 0.3, seed)
        assert not set(train.ids) & set(held_out.ids)
        assert Counter([*train.ids, *held_out.ids]) == Counter(prompts.ids)
        assert [(int(text),) for text in (*train.prompts, *held_out.prompts)] == [*train.ids, *held_out.ids]
        assert len(set(held_out.ids)) == round(0.3 * len(set(numbers)))
    assert split_prompts(prompts, 0.3, 1) == split_prompts(prompts, 0.3, 1)
    assert split_prompts(prompts, 0.3, 1) != split_prompts(prompts, 0.3, 2)


@pytest.mark.parametrize(("distinct", "fraction"), [(1, 0.5), (4, 0.1), (4, 0.9), (3, 0.0)])
def test_a_split_that_leaves_nothing_on_one_side_is_refused(distinct, fraction):
    ids = tuple((number % distinct,) for number in range(12))
    with pytest.raises(DataError, match=f"a fraction of {fraction} of {distinct} different prompts leaves nothing"):
        split_prompts(Prompts(("s",), tuple("a" * 12), ids, 0), fraction, 0)


def test_tokenizers_with_the_same_ids_may_differ_in_their_pad_token_only(tokenizer_dir, tmp_path):
    policy = load_tokenizer(tokenizer_dir())
    for peculiarity in ({"pad_is_eos": True}, {"adds_bos": True}, {"chat_template": None}):
        other = load_tokenizer(save_tiny_tokenizer(tmp_path / "other", **peculiarity))
        validate_same_tokens(policy, other)
        validate_same_tokens(other, policy)
    padded = load_tokenizer(tokenizer_dir())
    padded.add_special_tokens({"pad_token": "<nothing>"})
    validate_same_tokens(policy, padded)
    validate_same_tokens(padded, policy)


def test_tokenizers_with_other_ids_are_refused_by_a_token_that_differs(tokenizer_dir):
    policy, longer, swapped = (load_tokenizer(tokenizer_dir()) for _ in range(3))
    longer.add_tokens(["<tool>"])
    for pair in ((policy, longer), (longer, policy)):
        with pytest.raises(EncodingError, match=rf"1 entries differ, such as '<tool>' with the id {len(policy)}"):
            validate_same_tokens(*pair)
    state = json.loads(swapped.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    one, other = (swapped.tokenize(word)[0] for word in ("q", "z"))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(json.dumps(state))
    with pytest.raises(EncodingError, match=r"4 entries differ, such as '[qz]' with the id"):
        validate_same_tokens(policy, swapped)
