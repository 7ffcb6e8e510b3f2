"""Parts of a source have its rows, each once and with its number, whatever the format."""

import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_critic.data import source_parts
from rlhf_critic.data.source_parts import PartReader, RangeReader, split_source
from rlhf_critic.data.sources import read_rows
from rlhf_critic.errors import DataError

ROWS = [{"prompt": f"p{n}", "chosen": "ü" * n, "rejected": "b"} for n in range(1, 24)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" * (1 + (n % 5 == 0)) for n, row in enumerate(ROWS))


def write(kind: str, folder) -> str:
    path = folder / f"rows{kind}"
    if kind == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + LINES.rstrip("\n").encode())  # blank lines, no end of the last line
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    elif kind == ".json":
        path.write_text(json.dumps(ROWS))
    elif kind == ".csv":
        path.write_text("prompt,chosen,rejected\n" + "".join(f'{r["prompt"]},"{r["chosen"]}\n",b\n' for r in ROWS))
    elif kind == ".parquet":
        parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", "-saved"])
def test_parts_have_all_rows_in_order_with_their_numbers(tmp_path, kind):
    source = write(kind, tmp_path)
    whole = list(read_rows(source))
    assert len(whole) == len(ROWS)
    for part_rows in (1, 4, 7, 1000):
        parts = split_source(source, part_rows)
        assert [part.number for part in parts] == list(range(len(parts)))
        assert len(parts) == 1 or part_rows < 1000
        reader = PartReader(source)
        assert [row for part in parts for row in reader.read(part)] == whole
        # Another process may have taken the parts between, and an earlier part may be given again.
        for part in (parts[-1], parts[0]):
            expected = [row for number, row in whole if part.first <= number < part.first + part.rows]
            if kind not in {".csv", ".jsonl.gz"}:  # where the number of a line is not the number of a row
                assert [row for _, row in reader.read(part)] == expected


def test_a_part_of_long_lines_is_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(source_parts, "PART_BYTES", 100)
    source = write(".jsonl", tmp_path)
    parts = split_source(source)
    assert all(part.end - part.start < 100 + 90 for part in parts)
    assert len(parts) > 5
    assert [row for part in parts for row in PartReader(source).read(part)] == list(read_rows(source))


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": 1}\n{"a"\n', ":2: not JSON"), ('{"a": 1}\n[1]\n', ":2: must be an object"), ("", "has no rows")],
)
def test_bad_rows_and_empty_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        [row for part in split_source(str(path), 1) for row in PartReader(str(path)).read(part)]


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    for name in ("missing.jsonl", "missing.parquet", "missing.csv", "damaged.parquet"):
        with pytest.raises(DataError, match=name):
            split_source(str(tmp_path / name))


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_ranges_of_rows_may_span_parts_and_come_in_any_order(tmp_path, kind):
    source = write(kind, tmp_path)
    whole = list(read_rows(source))
    parts = split_source(source, 4)
    reader = PartReader(source)
    ends = np.cumsum([len(list(reader.read(part))) for part in parts]).tolist()
    ranges = RangeReader(source, parts, ends)
    for start, count in [(0, 5), (5, 5), (20, 5), (3, 1), (0, 23), (22, 9)]:
        assert ranges.take(start, count) == whole[start : start + count]


def test_a_parquet_file_of_one_large_row_group_is_divided_all_the_same(tmp_path):
    path = tmp_path / "one.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    parts = split_source(str(path), 5)
    assert [part.rows for part in parts] == [5, 5, 5, 5, 3]
    reader = PartReader(str(path))
    assert [row for part in parts for row in reader.read(part)] == list(read_rows(str(path)))
