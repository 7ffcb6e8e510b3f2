"""Every kind of source gives the same rows; errors name an unreadable source."""

import codecs
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_critic.data.sources import fingerprint_of, read_rows
from rlhf_critic.errors import DataError

ROWS = [
    {"prompt": "a\nline", "chosen": "b, c", "rejected": 'd "e"'},
    {"prompt": "naïve", "chosen": "café", "rejected": "no"},
]


def write(kind, directory):
    path = directory / f"rows{kind}"
    if kind.startswith(".jsonl"):
        content = "\n".join(json.dumps(row) for row in ROWS).encode()
    elif kind.startswith(".json"):
        content = json.dumps(ROWS, ensure_ascii=False).encode()
    elif kind.startswith(".csv"):
        cells = [["prompt", "chosen", "rejected", "margin"], *([*row.values(), ""] for row in ROWS)]
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
        content = "\r\n".join(quoted).encode()
    else:
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(ROWS), sink)
        content = sink.getvalue().to_pybytes()
    path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    return str(path)


KINDS = [kind + packed for kind in (".jsonl", ".json", ".parquet", ".csv") for packed in ("", ".gz")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_holds_the_same_rows(kind, tmp_path):
    assert [row for _, row in read_rows(write(kind, tmp_path))] == ROWS


def test_saved_datasets_are_read_with_and_without_splits(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "several"))
    assert [row for _, row in read_rows(str(tmp_path / "one"))] == ROWS
    assert [row for _, row in read_rows(str(tmp_path / "several"))] == ROWS
    assert [row for _, row in read_rows(f"{tmp_path}/several:test")] == ROWS[1:]
    assert fingerprint_of(f"{tmp_path}/several:test") != fingerprint_of(f"{tmp_path}/several")
    with pytest.raises(DataError, match="no split 'dev'; give one of train, test"):
        list(read_rows(f"{tmp_path}/several:dev"))
    with pytest.raises(DataError, match="has no splits"):
        list(read_rows(f"{tmp_path}/one:test"))


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    assert [number for number, _ in read_rows(write(".csv", tmp_path))] == [3, 4]
    (tmp_path / "gaps.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [number for number, _ in read_rows(str(tmp_path / "gaps.jsonl"))] == [2, 4]


def test_the_fingerprint_is_of_the_contents(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("{}")
    second.write_text("{}")
    assert fingerprint_of(str(first)) == fingerprint_of(str(second))
    second.write_text("{} ")
    assert fingerprint_of(str(first)) != fingerprint_of(str(second))


@pytest.mark.parametrize("in_memory_bytes", [0, 10**9])
def test_the_fingerprint_of_a_saved_dataset_is_of_its_contents_however_they_were_made(
    in_memory_bytes, tmp_path, monkeypatch
):
    """The fingerprint of datasets covers a function by name only, not by its result."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", in_memory_bytes)
    rows = [{"text": "a"}, {"text": "b"}]
    for name, text in (("first", "a"), ("second", "a"), ("third", "c")):
        made = datasets.Dataset.from_list([{"text": text}, rows[1]])
        made._fingerprint = "of-the-same-script"
        made.save_to_disk(str(tmp_path / name))
    fingerprints = [fingerprint_of(str(tmp_path / name)) for name in ("first", "second", "third")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


BAD = {
    "missing.jsonl": (None, "cannot be read .*No such file"),
    "missing.parquet": (None, "cannot be read .*No such file"),
    "empty.jsonl": (b"\n", "has no rows"),
    "empty.json": (b"[]", "has no rows"),
    "empty.csv": (b"", "has no rows"),
    "empty.parquet": (b"", "cannot be read"),
    "broken.jsonl": (b'{"a": 1}\n{"a": ', r"broken.jsonl:2: not JSON"),
    "broken.json": (b'[{"a": 1}', "not JSON"),
    "object.json": (b'{"a": 1}', "use .jsonl for one object per line"),
    "list.jsonl": (b"[1]", r"list.jsonl:1: must be an object"),
    "latin.jsonl": (b'{"a": "\xe9"}', r"latin.jsonl:1: not UTF-8"),
    "latin.json": (b'["\xe9"]', "not UTF-8"),
    "latin.csv": (b"a\n\xe9\n", "not UTF-8"),
    "short.csv": (b"a,b\n1\n", r"short.csv:2: has more or fewer fields"),
    "long.csv": (b"a,b\n1,2,3\n", r"long.csv:2: has more or fewer fields"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}')[:-9], "cannot be read"),
    "cut.parquet": (b"PAR1abc", "cannot be read"),
    "notes.txt": (b"a", "unknown kind of source"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(name, tmp_path):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        list(read_rows(str(tmp_path / name)))
    assert str(tmp_path / name) in str(raised.value)


def test_a_hub_that_is_out_of_reach_and_a_directory_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"nobody/nothing:test: no such file.*hub"):
        list(read_rows("nobody/nothing:test"))
    with pytest.raises(DataError, match="save_to_disk"):
        list(read_rows(str(tmp_path)))
    with pytest.raises(DataError, match="nowhere://"):
        list(read_rows("nowhere://bucket/file.jsonl"))


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_byte_order_marks_are_ignored(kind, tmp_path):
    path = tmp_path / f"rows{kind}"
    content = Path(write(kind.removesuffix(".gz"), tmp_path)).read_bytes()
    marked = codecs.BOM_UTF8 + content
    if kind.startswith(".jsonl"):
        marked += b"\n" + codecs.BOM_UTF8 + b"\n" + codecs.BOM_UTF8 + content  # joined files
    path.write_bytes(gzip.compress(marked) if kind.endswith(".gz") else marked)
    rows = [row for _, row in read_rows(str(path))]
    assert rows == ROWS * (2 if kind.startswith(".jsonl") else 1)
