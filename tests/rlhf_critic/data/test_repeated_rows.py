"""Repeated and reversed rows are found as by comparing every row with all rows before it, across sources."""

import json

import numpy as np
import pytest

from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.data import training_data
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_dataset import concatenate, count_repeated, deduplicate
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.data.repeated_rows import find_repeated, find_reversed, hash_pointwise, hash_preference

WORDS = ("of course", "no", "glad", "thank")


def content_of(row):
    """The definition: ids in order with targets."""
    responses = tuple(tuple(ids.tolist()) for ids in row.responses)
    return row.kind, responses, tuple(row.targets_A.tolist()), tuple(row.tokens_A.tolist())


def slowly(contents):
    """Whether each row repeats, and whether it reverses, an earlier one."""
    reverses = [(kind, responses[::-1], *rest) for kind, responses, *rest in contents]
    return (
        [content in contents[:n] for n, content in enumerate(contents)],
        [len(contents[n][1]) > 1 and reverse in contents[:n] for n, reverse in enumerate(reverses)],
    )


def draw(rng):
    """A row of one of a few, so that many repeat or reverse another."""
    prompt, number = f"please {WORDS[rng.integers(2)]}", int(rng.integers(2))
    first, second, third = rng.permutation(WORDS)[:3].tolist()
    return [
        {"prompt": prompt, "chosen": first, "rejected": second, "margin": float(rng.random()), "subset": third},
        {"prompt": prompt, "ranked": [first, second] + [third] * number},
        {"prompt": prompt, "response": first, "score": number},
        {"prompt": prompt, "response": first, "label": bool(number)},
        {"prompt": prompt, "steps": [{"text": first, "label": None}, {"text": second, "label": bool(number)}]},
    ][rng.integers(5)]


@pytest.fixture
def tables(tokenizer_dir, tmp_path):
    rng = np.random.default_rng(0)
    encoder = Encoder(load_tokenizer(tokenizer_dir()), max_length=64)
    loaded = []
    for name, size in (("a", 60), ("b", 40), ("c", 1)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(draw(rng)) + "\n" for _ in range(size)))
        loaded.append(load_preferences(str(path), encoder, str(tmp_path / "cache")))
    return loaded


def test_duplicates_and_contradictions_are_those_of_a_slow_search(tables):
    joined = concatenate(tables)
    contents = [content_of(row) for row in joined.take(np.arange(len(joined)))]
    repeated, reverses = slowly(contents)
    assert (sum(repeated), sum(reverses)) > (20, 5)
    assert find_repeated(joined.hashes()[0]).tolist() == repeated
    assert find_reversed(*joined.hashes()).tolist() == reverses
    ends = np.cumsum([len(table) for table in tables])[:-1]
    of_tables = zip(np.split(repeated, ends), np.split(reverses, ends), strict=True)
    assert count_repeated(tables) == [(one.sum(), other.sum()) for one, other in of_tables]
    for table in tables:
        (report,) = table.reports.values()
        alone = slowly([content_of(row) for row in table.take(np.arange(len(table)))])
        assert (report.duplicates, report.contradictions) == tuple(map(sum, alone))


def test_the_first_of_equal_rows_stays_and_the_others_are_counted(tables):
    joined = concatenate(tables)
    kept = deduplicate(joined)
    contents = [content_of(row) for row in joined.take(np.arange(len(joined)))]
    repeated, _ = slowly(contents)
    assert [kept.origin(row) for row in range(len(kept))] == [
        joined.origin(row) for row in range(len(joined)) if not repeated[row]
    ]
    left_out = [report.deduplicated for report in kept.reports.values()]
    assert left_out == [duplicates for duplicates, _ in count_repeated(tables)]
    assert f"{left_out[0]} left out as repeats" in str(kept)
    assert kept.fingerprint != joined.fingerprint
    again = deduplicate(kept)
    assert len(again) == len(kept)
    assert again.fingerprint == kept.fingerprint, "data without repeats are the same data"


def test_a_run_leaves_out_repeats_only_if_asked(tables, tokenizer_dir, tmp_path):
    def load(**options):
        data = {"train": sources, "cache_dir": str(tmp_path / "cache"), **options}
        model = {"path": tokenizer_dir()}
        config = {"model": model, "data": data, "encoding": {"max_length": 64, "special_tokens_in_text": "token"}}
        return training_data.load_data(TrainJobConfig.model_validate(config)).train

    sources = [next(iter(table.reports)) for table in tables]
    before, after = load(), load(deduplicate=True)
    assert before.fingerprint == concatenate(tables).fingerprint
    assert len(after) == len(before) - sum(duplicates for duplicates, _ in count_repeated(tables))
    weighed = load(deduplicate=True, train_weights=[2, 1, 1])
    sizes = np.bincount(after.sources_N, minlength=3)
    assert np.bincount(weighed.sources_N, minlength=3).tolist() == [2 * sizes[0], *sizes[1:]]


def test_hashes_tell_every_part_of_a_row_apart():
    ids, other = b"\1\0\0\0", b"\2\0\0\0"
    rows = [
        hash_preference((ids, other)),
        hash_preference((other, ids)),
        hash_preference((ids, other, ids)),
        hash_pointwise(ids, "score", [1.0], [0]),
        hash_pointwise(ids, "label", [1.0], [0]),
        hash_pointwise(ids, "score", [0.5], [0]),
        hash_pointwise(ids, "score", [1.0], [1]),
        hash_pointwise(other, "score", [1.0], [0]),
        hash_pointwise(ids, "steps", [], []),
    ]
    assert len({content for content, _ in rows}) == len(rows)
    assert rows[0] == rows[1][::-1]
    assert hash_pointwise(ids, "score", [0.0], [0]) == hash_pointwise(ids, "score", [-0.0], [0])
    assert not find_reversed(*np.array(rows[3:]).T).any()


def test_no_row_and_one_row_repeat_nothing():
    assert find_repeated(np.zeros(0, np.int64)).tolist() == []
    assert find_repeated(np.zeros(1, np.int64)).tolist() == [False]
    assert find_repeated(np.zeros(3, np.int64)).tolist() == [False, True, True]
