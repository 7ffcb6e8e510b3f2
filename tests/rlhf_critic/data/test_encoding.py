"""A text always gives the same ids, whatever its neighbours, the source of the tokenizer, or the caller."""

import json

import pytest
from transformers import AutoTokenizer

from rlhf_critic.data.encoding import PAD_TOKEN, Encoder, load_tokenizer
from rlhf_critic.errors import EncodingError

PAIRS = [("please explain", "of course"), ("", "no"), ([{"role": "system", "content": "kindly"}], "glad 1 2 3")]


@pytest.mark.parametrize("peculiarity", [{}, {"pad_is_eos": True}, {"adds_bos": True}, {"chat_template": None}])
def test_plain_transformers_encodes_a_saved_tokenizer_the_same(tokenizer_dir, tmp_path, peculiarity):
    encoder = Encoder(load_tokenizer(tokenizer_dir(**peculiarity)), max_length=12)
    encoder.save(tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for prompt, response in PAIRS:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages.append({"role": "assistant", "content": response})
        text = plain.apply_chat_template(messages, tokenize=False)
        expected = encoder.encode(prompt, response).ids
        assert plain(text, truncation=True)["input_ids"] == expected
        assert plain(text, add_special_tokens=False, truncation=True)["input_ids"] == expected


def test_a_text_is_encoded_the_same_alone_and_among_others(tokenizer_dir):
    encoder = Encoder(load_tokenizer(tokenizer_dir()), max_length=64)
    assert encoder.encode_batch(PAIRS) == [encoder.encode(*pair) for pair in PAIRS]
    assert encoder.encode_batch([]) == []


def test_truncation_keeps_the_end_and_is_told(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir())
    whole = Encoder(tokenizer, max_length=1000).encode("please " * 50, "thank you")
    cut = Encoder(tokenizer, max_length=7).encode("please " * 50, "thank you")
    assert not whole.truncated
    assert cut.truncated
    assert cut.ids == whole.ids[-7:]


@pytest.mark.parametrize("response", ["of course", " 1  2\n", "👩‍👩‍👧 مرحبا é", "\ufffd", "</s><s>", ""])
def test_the_texts_of_tokens_are_the_text_in_pieces(tokenizer_dir, response):
    encoder = Encoder(load_tokenizer(tokenizer_dir()), max_length=1000)
    ids = encoder.encode("please", response).ids
    texts = encoder.token_texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == encoder.render("please", response)
    assert texts[-1].endswith("</s>")


def test_a_character_that_is_cut_off_is_seen(tokenizer_dir):
    encoder = Encoder(load_tokenizer(tokenizer_dir()), max_length=1000)
    ids = encoder.tokenizer("a👩", add_special_tokens=False)["input_ids"]
    assert encoder.token_texts(ids) == ("a", "", "", "", "👩")
    assert encoder.token_texts(ids[:-1])[-1].strip("\ufffd") == ""
    assert encoder.token_texts(ids[:-1])[-1] != ""


@pytest.mark.parametrize("peculiarity", [{}, {"pad_is_eos": True}])
def test_the_pad_token_is_one_that_ends_no_text(tokenizer_dir, peculiarity):
    tokenizer = load_tokenizer(tokenizer_dir(**peculiarity))
    assert tokenizer.pad_token == PAD_TOKEN
    assert tokenizer.pad_token_id not in {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}


def test_bos_appears_once(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir(adds_bos=True), "plain")
    ids = Encoder(tokenizer, max_length=64).encode("please", "thank you").ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id


def test_the_fingerprint_survives_saving_and_loading(tokenizer_dir, tmp_path):
    encoder = Encoder(load_tokenizer(tokenizer_dir(pad_is_eos=True)), max_length=64)
    encoder.save(tmp_path / "saved")
    before = encoder.fingerprint
    encoder.encode_batch(PAIRS)
    assert Encoder(load_tokenizer(str(tmp_path / "saved")), max_length=64).fingerprint == before


def test_the_fingerprint_tells_what_changes_the_ids(tokenizer_dir, tmp_path):
    source = tokenizer_dir()
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[0]['content'] }} {{ messages[-1]['content'] }}{{ eos_token }}")
    merges = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    fingerprints = {
        Encoder(load_tokenizer(source), 64).fingerprint,
        Encoder(load_tokenizer(source), 63).fingerprint,
        Encoder(load_tokenizer(source, "plain"), 64).fingerprint,
        Encoder(load_tokenizer(source, str(template)), 64).fingerprint,
    }
    merges["model"]["merges"].pop()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(merges))
    fingerprints.add(Encoder(load_tokenizer(source), 64).fingerprint)
    assert len(fingerprints) == 5


def test_a_template_that_asks_for_the_date_gets_the_same_one_for_ever(tokenizer_dir, tmp_path):
    template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[-1]['content'] }}{{ eos_token }}"
    encoder = Encoder(load_tokenizer(tokenizer_dir(chat_template=template)), max_length=64)
    assert encoder.render("please", "glad") == "01 Jan 2025 glad</s>"
    encoder.save(tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "please"}, {"role": "assistant", "content": "glad"}]
    assert plain.apply_chat_template(messages, tokenize=False) == "01 Jan 2025 glad</s>"
    assert Encoder(load_tokenizer(str(tmp_path / "saved")), max_length=64).fingerprint == encoder.fingerprint


@pytest.mark.parametrize("space", [" ", "\n", "  "])
def test_an_ending_that_begins_with_space_goes_whole(tokenizer_dir, space):
    """Llama 2 has such a template. Removing the shorter of two endings first would leave the space."""
    template = f"{{{{ messages[-1]['content'] }}}}{{{{ {space!r} + eos_token }}}}"
    encoder = Encoder(load_tokenizer(tokenizer_dir(chat_template=template)), max_length=64)
    assert encoder.ending == f"{space}</s>"
    for end in ("", "</s>", encoder.ending, f"</s>{encoder.ending}", f"{encoder.ending}</s>{PAD_TOKEN}"):
        assert encoder.without_ending(f"glad{end}") == "glad"


def test_many_endings_are_gone_at_once(tokenizer_dir):
    encoder = Encoder(load_tokenizer(tokenizer_dir()), max_length=64)
    assert encoder.without_ending("glad" + "</s>" * 1_000_000) == "glad"


def test_a_byte_order_mark_of_a_template_is_no_text(tokenizer_dir, tmp_path):
    source = tokenizer_dir()
    template = load_tokenizer(source).chat_template
    (tmp_path / "marked.jinja").write_text("\ufeff" + template, encoding="utf-8")
    assert load_tokenizer(source, str(tmp_path / "marked.jinja")).chat_template == template
    own = tokenizer_dir(chat_template="\ufeff" + template)
    assert load_tokenizer(own).chat_template == template
    # A critic that was trained with the mark keeps its encoding.
    assert load_tokenizer(own, keeps_template=True).chat_template == "\ufeff" + template


def test_texts_without_a_clear_end_are_refused(tokenizer_dir):
    encoder = Encoder(load_tokenizer(tokenizer_dir(chat_template="{{ messages[-1]['content'] }}")), max_length=64)
    with pytest.raises(EncodingError, match="must not end with the pad token"):
        encoder.encode("please", f"glad{PAD_TOKEN}")
    with pytest.raises(EncodingError, match="must have tokens"):
        encoder.encode("please", "")
    with pytest.raises(EncodingError, match="half of a surrogate pair is not valid text") as refused:
        encoder.encode_batch([("please", "glad"), ("please", "\ud83d")])
    assert refused.value.index == 1


def test_bad_tokenizers_and_templates_are_refused(tokenizer_dir, tmp_path):
    with pytest.raises(EncodingError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(EncodingError, match="is not 'auto', 'plain' or a readable file"):
        load_tokenizer(tokenizer_dir(), "palin")
    refusing = tokenizer_dir(chat_template="{{ raise_exception('only two turns') }}")
    with pytest.raises(EncodingError, match=r"roles \['user', 'assistant'\]: only two turns"):
        Encoder(load_tokenizer(refusing), 64).encode("please", "glad")
    unsafe = AutoTokenizer.from_pretrained(tokenizer_dir(pad_is_eos=True))
    with pytest.raises(EncodingError, match="no separate pad token"):
        Encoder(unsafe, 64)
