"""Preference files are encoded atomically and once; errors name file, line and field of bad input."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from rlhf_critic.data import preferences as preferences_module
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_dataset import concatenate, count_leaked, split_by_prompt, weigh_sources
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.data.source_parts import split_source
from rlhf_critic.errors import ConfigError, DataError

GOOD = {"prompt": "please", "chosen": "of course", "rejected": "no"}


@pytest.fixture
def encoder(tokenizer_dir):
    return Encoder(load_tokenizer(tokenizer_dir()), max_length=64)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_keep_their_order_ids_and_lines(encoder, tmp_path):
    rows = [
        {**GOOD, "margin": 0.5, "subset": "a", "judge": "left alone"},
        {"prompt": [{"role": "user", "content": "explain"}], "chosen": "glad", "rejected": "whatever"},
        {**GOOD, "chosen": "thank " * 90},
    ]
    path = tmp_path / "prefs.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    preferences = load_preferences(str(path), encoder, str(tmp_path / "cache"))
    assert len(preferences) == 3
    pairs = preferences.comparisons()
    for row, preference in enumerate(rows):
        encoded = preferences[row]
        assert encoded.responses[0].tolist() == encoder.encode(preference["prompt"], preference["chosen"]).ids
        assert encoded.responses[-1].tolist() == encoder.encode(preference["prompt"], preference["rejected"]).ids
        assert preferences.origin(row) == f"{path}:{2 * row + 1}"
        lengths = [len(encoded.responses[0]), len(encoded.responses[-1])]
        assert pairs.lengths_P2[row].tolist() == lengths
        assert preferences.tokens_N[row] == sum(lengths)
    assert preferences.subsets_N.tolist() == ["a", "", ""]
    assert pairs.subsets_P.tolist() == ["a", "", ""]
    np.testing.assert_array_equal(preferences.margins_N, [0.5, np.nan, np.nan])
    (report,) = preferences.reports.values()
    assert (report.rows, report.preferences, report.truncated, report.longest) == (3, 3, 1, 64)
    assert report.tokens == preferences.tokens_N.sum()
    assert report.shapes == {"standard, explicit prompt": 2, "conversational, explicit prompt": 1}


def test_rows_that_teach_nothing_are_counted_and_left_out(encoder, tmp_path):
    other = {**GOOD, "prompt": "explain"}
    turned = {"prompt": "please", "chosen": "no", "rejected": "of course"}
    long = {**GOOD, "chosen": "thank " * 90}
    rows = [GOOD, {**GOOD, "rejected": "of course"}, GOOD, turned, other, long]
    kept = load_preferences(write(tmp_path / "all.jsonl", rows), encoder, str(tmp_path / "cache"), overlong="skip")
    assert [kept.origin(row).rpartition(":")[2] for row in range(len(kept))] == ["1", "3", "4", "5"]
    (report,) = kept.reports.values()
    assert (report.rows, report.preferences, report.identical, report.skipped_overlong) == (6, 4, 1, 1)
    assert (report.duplicates, report.contradictions, report.truncated) == (1, 1, 0)
    cut = load_preferences(str(tmp_path / "all.jsonl"), encoder, str(tmp_path / "cache"))
    assert len(cut) == 5
    with pytest.raises(DataError, match=r"no row is left of 2: 1 are longer than encoding.max_length 64 and 1"):
        load_preferences(write(tmp_path / "no.jsonl", [long, rows[1]]), encoder, str(tmp_path), overlong="skip")


def test_rankings_become_all_their_comparisons(encoder, tmp_path):
    rows = [
        {"prompt": "please", "ranked": ["glad", "of course", "no"]},
        GOOD,
        {"prompt": "", "ranked": ["a", "b", "c", "d"]},
    ]
    preferences = load_preferences(write(tmp_path / "ranked.jsonl", rows), encoder, str(tmp_path / "cache"))
    assert preferences.sizes_N.tolist() == [3, 2, 4]
    responses = preferences.responses()
    assert [len(one.responses) for one in preferences.take([2, 0])] == [4, 3]
    pairs = preferences.comparisons()
    expected = []
    first = 0
    for row, size in enumerate(preferences.sizes_N):
        expected += [(row, first + i, first + j) for i in range(size) for j in range(i + 1, size)]
        first += size
    assert list(zip(pairs.rows_P, pairs.better_P, pairs.worse_P, strict=True)) == expected
    for (_, better, worse), lengths in zip(expected, pairs.lengths_P2, strict=True):
        assert lengths.tolist() == [len(responses[better]), len(responses[worse])]


def test_sources_are_weighed_and_keep_their_lines(encoder, tmp_path):
    sources = [
        write(tmp_path / f"{name}.jsonl", [{**GOOD, "chosen": f"{name} {n}"} for n in range(8)]) for name in "ab"
    ]
    tables = [load_preferences(source, encoder, str(tmp_path / "cache")) for source in sources]
    both = concatenate(tables)
    weighed = weigh_sources(both, [2.0, 0.5], seed=3)
    origins = [weighed.origin(row) for row in range(len(weighed))]
    assert len(origins) == 2 * 8 + 4
    assert origins[:8] == origins[8:16] == [f"{sources[0]}:{n + 1}" for n in range(8)]
    assert len(set(origins[16:])) == 4
    for row, origin in enumerate(origins):
        source, _, line = origin.rpartition(":")
        expected = tables[sources.index(source)][int(line) - 1]
        assert weighed[row].responses[0].tolist() == expected.responses[0].tolist()
        assert weighed.tokens_N[row] == sum(len(ids) for ids in expected.responses)
    again, other = weigh_sources(both, [2.0, 0.5], seed=3), weigh_sources(both, [2.0, 0.5], seed=4)
    assert weighed.fingerprint == again.fingerprint != other.fingerprint
    assert len(weigh_sources(both, [0.0, 1.0], seed=0)) == 8
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        weigh_sources(both, [1.0], seed=0)


def test_a_split_shares_no_prompt(encoder, tmp_path):
    rows = [{**GOOD, "prompt": f"prompt {n % 10}", "chosen": f"answer {n}"} for n in range(40)]
    whole = load_preferences(write(tmp_path / "whole.jsonl", rows), encoder, str(tmp_path / "cache"))
    train, validation = split_by_prompt(whole, 0.3, seed=1)
    assert (len(train), len(validation)) == (28, 12)
    assert count_leaked(train, validation) == 0
    assert count_leaked(whole, validation) == 12
    places = [[table.origin(row) for row in range(len(table))] for table in (train, validation)]
    assert sorted(places[0] + places[1]) == sorted(whole.origin(row) for row in range(40))
    assert split_by_prompt(whole, 0.3, seed=1)[1].fingerprint == validation.fingerprint
    assert split_by_prompt(whole, 0.3, seed=2)[1].fingerprint != validation.fingerprint
    with pytest.raises(DataError, match="leaves nothing"):
        split_by_prompt(whole, 0.01, seed=1)


def test_other_field_names_are_told(encoder, tmp_path):
    source = write(tmp_path / "named.jsonl", [{"question": "please", "chosen": "glad", "rejected": "no"}])
    preferences = load_preferences(source, encoder, str(tmp_path / "cache"), fields={"prompt": "question"})
    assert preferences[0].responses[0].tolist() == encoder.encode("please", "glad").ids
    with pytest.raises(ConfigError, match=r"data\.fields: unknown field question; preferences have prompt, chosen"):
        load_preferences(source, encoder, str(tmp_path / "cache"), fields={"question": "prompt"})


def test_gzip_reads_like_plain(encoder, tmp_path):
    text = "".join(json.dumps({**GOOD, "chosen": f"glad {n}"}) + "\n" for n in range(700))
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(text)
    plain, packed = (
        load_preferences(str(tmp_path / n), encoder, str(tmp_path / "cache")) for n in ("a.jsonl", "b.jsonl.gz")
    )
    assert len(plain) == len(packed) == 700
    rows = list(range(699, -1, -1))
    for one, other, row in zip(plain.take(rows), packed.take(rows), rows, strict=True):
        assert one.responses[0].tolist() == other.responses[0].tolist() == plain[row].responses[0].tolist()
        assert one.responses[-1].tolist() == other.responses[-1].tolist() == plain[row].responses[-1].tolist()
    np.testing.assert_array_equal(plain.tokens_N, packed.tokens_N)


def test_a_file_is_encoded_once_per_content_and_encoder(tokenizer_dir, tmp_path, monkeypatch):
    path, cache = tmp_path / "prefs.jsonl", str(tmp_path / "cache")
    path.write_text(json.dumps(GOOD))
    tokenizer = load_tokenizer(tokenizer_dir())
    encoder = Encoder(tokenizer, 16)
    calls = []
    encode_batch = Encoder.encode_batch
    monkeypatch.setattr(Encoder, "encode_batch", lambda self, pairs: calls.append(1) or encode_batch(self, pairs))
    first = load_preferences(str(path), encoder, cache)
    again = load_preferences(str(path), encoder, cache)
    assert len(calls) == 1
    assert again[0].responses[0].tolist() == first[0].responses[0].tolist()
    load_preferences(str(path), Encoder(tokenizer, 3), cache)
    path.write_text(json.dumps({**GOOD, "chosen": "glad"}))
    assert load_preferences(str(path), encoder, cache)[0].responses[0].tolist() == encoder.encode("please", "glad").ids
    assert len(calls) == 4  # three encodings, and the one just above
    assert not list(Path(cache).glob("preferences/.*"))


BAD_LINES = [
    ("{", r":2: not JSON"),
    (b"\xff\xfe", r":2: not UTF-8"),
    (json.dumps({"prompt": "a", "chosen": "b"}), r":2: field 'rejected': missing"),
    (json.dumps({**GOOD, "margin": float("nan")}), r":2: field 'margin': .*finite"),
    (json.dumps({**GOOD, "chosen": "<|pad|>"}), r":2: field 'chosen': .*pad token"),
    (json.dumps({"prompt": "a", "ranked": ["b", "<|pad|>"]}), r":2: field 'ranked\.1': .*pad token"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_bad_line_is_named_and_leaves_nothing_behind(tokenizer_dir, tmp_path, line, message):
    bare = Encoder(load_tokenizer(tokenizer_dir(chat_template="{{ messages[-1]['content'] }}")), 64)
    path, cache = tmp_path / "prefs.jsonl", tmp_path / "cache"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(DataError, match=f"{path}{message}"):
        load_preferences(str(path), bare, str(cache))
    assert not list(cache.glob("preferences/*"))


def test_rows_know_which_of_them_share_a_prompt(encoder, tmp_path):
    turns = [{"role": "user", "content": "please"}]
    prompts = ["please", "glad", "please", "", "", turns, turns, [], []]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "prompt": prompt}) + "\n" for prompt in prompts))
    numbers = load_preferences(str(path), encoder, str(tmp_path / "cache")).prompts_N.tolist()
    assert numbers[0] == numbers[2]
    assert numbers[5] == numbers[6]
    assert len(set(numbers)) == 7, "texts without a prompt share none"


def write_rows(path, *rows):
    named = (dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    return str(path)


def test_texts_that_repeat_their_prompt_in_most_rows_are_whole_texts(encoder, tmp_path):
    rows = [("please explain.", "please explain. of course", "please explain. no"), ("how ", " how glad", "how thank")]
    whole = load_preferences(write_rows(tmp_path / "whole.jsonl", *rows), encoder, str(tmp_path))
    (report,) = whole.reports.values()
    assert report.shapes == {"standard, explicit prompt that the responses repeat": 2}
    expected = [("please explain. ", "of course"), ("please explain. ", "no"), ("how ", "glad"), ("how ", "thank")]
    assert [ids.tolist() for ids in whole.responses()] == [encoder.encode(*pair).ids for pair in expected]


def test_an_answer_that_begins_with_its_prompt_stays_whole(encoder, tmp_path):
    rows = [("please", "please, of course", "please go"), ("how", "glad", "no"), ("how", "however", "howl")]
    few = load_preferences(write_rows(tmp_path / "few.jsonl", *rows), encoder, str(tmp_path))
    (report,) = few.reports.values()
    assert report.begin_with_prompt == 1
    assert few[0].responses[0].tolist() == encoder.encode("please", "please, of course").ids


def test_texts_of_which_only_some_repeat_the_prompt_are_refused(encoder, tmp_path):
    rows = [("please", "please thank", "please go"), ("how", "how glad", "no")]
    with pytest.raises(DataError, match=r"some.jsonl:2: field 'rejected': does not begin with the prompt, but 2 of 2"):
        load_preferences(write_rows(tmp_path / "some.jsonl", *rows), encoder, str(tmp_path))


def in_parts(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(preferences_module, "split_source", lambda source: split_source(source, rows))
    monkeypatch.setattr(preferences_module, "usable_cores", lambda: 1)  # starting others takes seconds


def many_rows(tmp_path) -> str:
    rows = [{**GOOD, "chosen": f"glad {n % 7}", "rejected": f"no {n % 5}", "subset": f"s{n % 2}"} for n in range(40)]
    rows += [{**GOOD, "chosen": "no 1", "rejected": "glad 1"}, {**GOOD, "chosen": "same", "rejected": "same"}]
    return write(tmp_path / "many.jsonl", rows)


def test_a_source_in_parts_is_the_source_in_one(encoder, tmp_path, monkeypatch):
    source = many_rows(tmp_path)
    whole = load_preferences(source, encoder, str(tmp_path / "whole"))
    in_parts(monkeypatch, 3)
    joined = load_preferences(source, encoder, str(tmp_path / "joined"))
    (report,) = joined.reports.values()
    assert joined.reports == whole.reports
    assert (report.duplicates, report.contradictions, report.identical) == (5, 1, 1)
    assert joined.fingerprint == whole.fingerprint
    for name in ("prompts_N", "prompt_keys_N", "subsets_N", "tokens_N", "sizes_N"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    rows = np.random.default_rng(0).permutation(len(whole))
    for one, other, row in zip(joined.take(rows), whole.take(rows), rows, strict=True):
        assert [ids.tolist() for ids in one.responses] == [ids.tolist() for ids in other.responses]
        assert joined.origin(row) == whole.origin(row)
    assert not list((tmp_path / "joined" / "preferences").glob("*.parts"))


def test_a_restart_encodes_only_the_parts_that_are_missing(encoder, tmp_path, monkeypatch):
    source, cache = many_rows(tmp_path), str(tmp_path / "cache")
    in_parts(monkeypatch, 5)
    encoded = []
    encode_part = preferences_module._encode_part

    def encode_until_killed(job, part):
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.append(part.number)
        encode_part(job, part)

    monkeypatch.setattr(preferences_module, "_encode_part", encode_until_killed)
    with pytest.raises(KeyboardInterrupt):
        load_preferences(source, encoder, cache)
    monkeypatch.setattr(preferences_module, "_encode_part", lambda job, part: encoded.append(part.number))
    monkeypatch.setattr(preferences_module, "_join_parts", lambda *_: None)
    with pytest.raises(FileNotFoundError):  # nothing was joined
        load_preferences(source, encoder, cache)
    assert encoded == list(range(9))


def test_an_encoder_is_the_same_in_another_process(encoder):
    """Encoders go to other processes by pickle."""
    assert pickle.loads(pickle.dumps(encoder)).encode("please", "glad") == encoder.encode("please", "glad")
