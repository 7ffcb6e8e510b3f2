"""Rows that overlap with a benchmark are those of the definition, are left out, and are counted for each source."""

import json
import pickle

import numpy as np
import pytest

from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.data import preferences as preferences_module
from rlhf_critic.data import training_data
from rlhf_critic.data.benchmark_overlap import BenchmarkNgrams, read_benchmarks, words_of
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.data.source_parts import split_source
from rlhf_critic.errors import DataError

QUESTION = "How many of the fourteen old ships that left the harbour in spring came back before the winter storms?"
GOOD = {"prompt": "please", "chosen": "of course", "rejected": "no"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def overlaps_slowly(benchmark, row, size):
    """The definition, by sets of tuples of words."""

    def words(text):
        return tuple("".join(one for one in text.lower() if one.isalnum() or one.isspace()).split())

    def ngrams(text):
        return {text[start : start + size] for start in range(len(text) - size + 1)}

    texts = {words(text) for prompt, responses in benchmark for text in (prompt, *(f"{prompt} {r}" for r in responses))}
    prompt, responses = row
    own = {words(text) for text in (prompt, *responses, *(f"{prompt} {response}" for response in responses))}
    long = {ngram for text in texts for ngram in ngrams(text)}
    short = {text for text in texts if 0 < len(text) < size}
    return any(ngrams(text) & long or (len(text) < size and text in short) for text in own)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 13])
def test_overlaps_are_those_of_the_definition(size):
    rng = np.random.default_rng(size)

    def text(longest):
        drawn = rng.choice(["a", "B", "it's", "its", "-", "2_2", "22", "c.", "é"], rng.integers(longest + 1))
        return str(rng.choice([" ", "\n", "  "])).join(drawn.tolist())

    def conversation(longest):
        return text(longest), [text(longest) for _ in range(rng.integers(3))]

    found = []
    for _ in range(150):
        benchmark = [conversation(2 * size) for _ in range(rng.integers(1, 4))]
        ngrams = BenchmarkNgrams(size)
        for part in (benchmark[:1], benchmark[1:]):
            ngrams.add(part)
        # A few words of the benchmark among others, so that rows share n-grams of every length.
        donor, (prompt, responses) = words_of(" ".join(benchmark[0][1]) or benchmark[0][0]), conversation(2 * size)
        copied = " ".join(donor[: int(rng.integers(size + 2))])
        for row in ((prompt, responses), (prompt, [*responses, copied]), (copied, responses)):
            found.append(ngrams.overlaps(*row))
            assert found[-1] == overlaps_slowly(benchmark, row, size), (benchmark, row)
    assert 0.05 < np.mean(found) < 0.95


def test_case_punctuation_and_white_space_do_not_count():
    ngrams = BenchmarkNgrams(13)
    ngrams.add([(QUESTION, [])])
    ngrams = pickle.loads(pickle.dumps(ngrams))  # as it goes to the processes that encode
    changed = QUESTION.upper().replace(" ", ", \n")
    assert ngrams.overlaps(f"Tell me: {changed}", [])
    assert ngrams.overlaps("Go on", [changed])
    twelve = " ".join(QUESTION.split()[:12])
    assert not ngrams.overlaps(f"{twelve} boats", [f"{twelve} boats"])
    assert ngrams.overlaps(" ".join(QUESTION.split()[:6]), ["no", " ".join(QUESTION.split()[6:13])]), "across a turn"


def test_a_short_text_of_a_benchmark_matches_as_a_whole_only():
    ngrams = BenchmarkNgrams(13)
    ngrams.add([("Name a prime.", ["Yes"])])
    assert ngrams.overlaps("name a prime", ["7"])
    assert ngrams.overlaps("name a", ["9", "prime yes"])
    assert not ngrams.overlaps("please name a prime", ["7"])
    assert not ngrams.overlaps("Is it one?", ["Yes", "No"]), "an answer alone is not a text of a benchmark"
    assert not ngrams.overlaps("", ["..."])


SYSTEM = {
    "role": "system",
    "content": "You are a helpful assistant that answers in one line and never lies at all.",
}
LAYOUTS = {
    "text": {"text": QUESTION},
    "prompt": {"prompt": QUESTION},
    "preference": {"prompt": "a", "chosen": QUESTION, "rejected": "b"},
    "turns": {"prompt": [SYSTEM, {"role": "user", "content": QUESTION}], "chosen": "b", "rejected": "c"},
    "ranking": {"prompt": "a", "ranked": ["b", QUESTION, "c"]},
    "rating": {"prompt": QUESTION, "response": "b", "score": 1},
    "steps": {
        "prompt": "a",
        "steps": [{"text": QUESTION[:50], "label": 1}, {"text": QUESTION[50:].strip(), "label": 0}],
    },
    "best of n": {"prompt": "a", "chosen": ["b", QUESTION], "rejected": ["c", "d"]},
    "responses": {"prompt": "a", "responses": ["b", QUESTION], "best": 0},
    "processbench": {"problem": QUESTION, "steps": ["a", "b"], "label": -1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_benchmarks_of_every_layout_are_read(layout, tmp_path):
    ngrams = read_benchmarks([write(tmp_path / "benchmark.jsonl", [LAYOUTS[layout]])], 8)
    assert ngrams.overlaps("Well", [QUESTION.replace("How", "And how")])
    assert not ngrams.overlaps(SYSTEM["content"], ["b"])


def test_rows_that_overlap_are_left_out_and_counted(tokenizer_dir, tmp_path, monkeypatch):
    encoder, cache = Encoder(load_tokenizer(tokenizer_dir()), max_length=64), str(tmp_path / "cache")
    copied = [{**GOOD, "prompt": QUESTION}, {**GOOD, "rejected": f"I ask: {QUESTION}"}]
    chat = {"prompt": [SYSTEM, {"role": "user", "content": "why"}], "chosen": "b", "rejected": "c"}
    rows = [{**GOOD, "chosen": f"glad {n}"} for n in range(20)] + [chat]
    source = write(tmp_path / "rows.jsonl", [*rows[:9], *copied, *rows[9:]])
    benchmark = write(
        tmp_path / "benchmark.jsonl", [{"text": QUESTION}, {"prompt": [SYSTEM], "chosen": "x", "rejected": "y"}]
    )
    monkeypatch.setattr(preferences_module, "split_source", lambda source: split_source(source, 5))
    monkeypatch.setattr(preferences_module, "usable_cores", lambda: 1)
    whole = load_preferences(source, encoder, cache)
    clean = load_preferences(source, encoder, cache, decontaminate=[benchmark])
    (report,) = clean.reports.values()
    assert (report.rows, report.preferences, report.contaminated) == (23, 21, 2)
    assert "2 left out because they overlap with a benchmark" in str(report)
    expected = [whole[row] for row in range(23) if row not in {9, 10}]
    for one, other in zip(clean.take(np.arange(21)), expected, strict=True):
        assert [ids.tolist() for ids in one.responses] == [ids.tolist() for ids in other.responses]
    assert [int(clean.origin(row).rpartition(":")[2]) for row in (8, 9)] == [9, 12]
    assert whole.reports[source].contaminated == 0
    assert clean.fingerprint != whole.fingerprint
    longer = load_preferences(source, encoder, cache, decontaminate=[benchmark], ngram=30)
    assert longer.reports[source].contaminated == 1, "with fewer words the question matches as a whole"
    write(tmp_path / "benchmark.jsonl", [{"text": "another"}])
    assert load_preferences(source, encoder, cache, decontaminate=[benchmark]).reports[source].contaminated == 0
    monkeypatch.setattr(preferences_module, "read_benchmarks", None)
    again = load_preferences(source, encoder, cache, decontaminate=[benchmark])
    assert len(again) == 23, "what is cached needs no n-grams"


def test_a_run_decontaminates_its_training_data_alone(tokenizer_dir, tmp_path):
    rows = [{**GOOD, "prompt": QUESTION}, *({**GOOD, "chosen": f"glad {n}"} for n in range(3))]
    source, other = (write(tmp_path / name, rows[first:]) for name, first in (("a.jsonl", 0), ("b.jsonl", 1)))
    data = {"train": [source, other], "validation": source, "decontaminate": source, "decontaminate_ngram": 40}
    data["cache_dir"] = str(tmp_path / "cache")
    config = {"model": {"path": tokenizer_dir()}, "data": data, "encoding": {"max_length": 64}}
    with pytest.raises(DataError, match=r"a\.jsonl: no row is left of 4: .* 4 overlap with data\.decontaminate"):
        training_data.load_data(TrainJobConfig.model_validate(config))
    data["decontaminate"] = write(tmp_path / "benchmark.jsonl", [{"text": QUESTION}])
    loaded = training_data.load_data(TrainJobConfig.model_validate(config))
    assert [report.contaminated for report in loaded.train.reports.values()] == [1, 0]
    assert loaded.validation is not None
    assert len(loaded.validation) == 4


BAD = [
    ([{"question": "why"}], r"benchmark\.jsonl:1: a row of a benchmark needs 'text', 'prompt' or"),
    ([{"text": "a"}, {"text": 3}], r"benchmark\.jsonl:2: field 'text': "),
    ([{"text": "..."}], r"benchmark\.jsonl: has no words"),
]


@pytest.mark.parametrize(("rows", "message"), BAD, ids=["no text", "a number", "no words"])
def test_errors_name_the_option_and_the_line(tokenizer_dir, tmp_path, rows, message):
    encoder = Encoder(load_tokenizer(tokenizer_dir()), max_length=64)
    source = write(tmp_path / "rows.jsonl", [GOOD])
    benchmark = write(tmp_path / "benchmark.jsonl", rows)
    with pytest.raises(DataError, match=rf"^data\.decontaminate: .*{message}"):
        load_preferences(source, encoder, str(tmp_path / "cache"), decontaminate=[benchmark])
    with pytest.raises(DataError, match=r"^data\.decontaminate: .*absent\.jsonl: cannot be read"):
        load_preferences(source, encoder, str(tmp_path / "cache"), decontaminate=[str(tmp_path / "absent.jsonl")])
