"""Parts of a source: ranges of rows that several processes read at the same time, each row once.

A file of JSON lines is divided by bytes, a Parquet file by row groups, and a dataset by rows. Other formats, and
Parquet files with large row groups, are read from their start, so a reader of such parts skips the rows before its own.
Knows nothing about the meaning of a row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import fsspec
import pyarrow as pa
from pyarrow import parquet

from rlhf_critic.data.sources import (
    UNREADABLE,
    Row,
    is_dataset,
    load_dataset,
    parse_json_lines,
    read_rows,
    unreadable,
    validate_objects,
)
from rlhf_critic.errors import DataError

PART_ROWS = 4096
PART_BYTES = 1 << 25  # of a file of JSON lines, so that a part of long rows fits in memory
MOST_GROUP_ROWS = 4  # times the rows of a part
IN_ORDER = "in order"  # sources that can only be read from their start


@dataclass(frozen=True)
class SourcePart:
    """A range of rows of a source.

    Attributes:
        source: The source.
        kind: How the part is read.
        number: Number of the part, from 0.
        first: Number of its first row (or line), from 1.
        rows: Number of its rows; lines may be blank.
        start: First byte, row group or row, by kind.
        end: End of the bytes, row groups or rows (exclusive).
    """

    source: str
    kind: str
    number: int
    first: int
    rows: int
    start: int
    end: int


def split_source(source: str, part_rows: int = PART_ROWS) -> list[SourcePart]:
    """Divides a source into parts of about ``part_rows`` rows, in order.

    Reads JSON lines once to find the ends of lines, and a format without an index once to count its rows.

    Raises:
        DataError: See `rlhf_critic.data.sources.read_rows`.
    """
    try:
        kind, ranges = _ranges_of(source, part_rows)
    except (*UNREADABLE, pa.ArrowException) as error:
        raise unreadable(source, error) from error
    parts, first = [], 1
    for number, (rows, start, end) in enumerate(ranges):
        parts.append(SourcePart(source, kind, number, first, rows, start, end))
        first += rows
    if not parts:
        raise DataError(f"{source}: has no rows; give a source with at least one row")
    return parts


def _ranges_of(source: str, part_rows: int) -> tuple[str, list[tuple[int, int, int]]]:
    """Returns the kind of a source's parts, and the rows, start and end of each."""
    if is_dataset(source):
        count = len(load_dataset(source))
        return "dataset", _equal_ranges(count, part_rows)
    if source.endswith(".parquet"):
        sizes = _row_groups(source)
        # Reading a part from a row group decodes the group, so large groups are read in order instead.
        if max(sizes, default=0) > MOST_GROUP_ROWS * part_rows:
            return IN_ORDER, _equal_ranges(sum(sizes), part_rows)
        return ".parquet", _join_groups(sizes, part_rows)
    if source.endswith(".jsonl"):
        return ".jsonl", _lines(source, part_rows)
    return IN_ORDER, _equal_ranges(sum(1 for _ in read_rows(source)), part_rows)


def _equal_ranges(count: int, part_rows: int) -> list[tuple[int, int, int]]:
    ends = [*range(part_rows, count, part_rows), count] if count else []
    return [(end - start, start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _row_groups(source: str) -> list[int]:
    with fsspec.open(source, "rb") as file:
        groups = parquet.ParquetFile(file).metadata
        return [groups.row_group(group).num_rows for group in range(groups.num_row_groups)]


def _join_groups(sizes: Sequence[int], part_rows: int) -> list[tuple[int, int, int]]:
    ranges, start, rows = [], 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= part_rows or (rows and group == len(sizes) - 1):
            ranges.append((rows, start, group + 1))
            start, rows = group + 1, 0
    return ranges


def _lines(source: str, part_rows: int) -> list[tuple[int, int, int]]:
    ranges: list[tuple[int, int, int]] = []
    start, end, lines = 0, 0, 0
    with fsspec.open(source, "rb") as file:
        for line in file:
            end, lines = end + len(line), lines + 1
            if lines >= part_rows or end - start >= PART_BYTES:
                ranges.append((lines, start, end))
                start, lines = end, 0
    return [*ranges, (lines, start, end)] if lines else ranges


class PartReader:
    """Reads parts of one source, best in ascending order."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._rows: Iterator[tuple[int, Row]] | None = None
        self._position = 0

    def read(self, part: SourcePart) -> Iterator[tuple[int, Row]]:
        """Reads the rows of a part, each with its row or line number.

        Raises:
            DataError: See `rlhf_critic.data.sources.read_rows`.
        """
        if part.kind == IN_ORDER:
            yield from self._read_in_order(part)
            return
        try:
            yield from validate_objects(part.source, _READERS[part.kind](part))
        except (*UNREADABLE, pa.ArrowException) as error:
            raise unreadable(part.source, error) from error

    def _read_in_order(self, part: SourcePart) -> Iterator[tuple[int, Row]]:
        if self._rows is None or part.start < self._position:
            self._rows, self._position = read_rows(self._source), 0
        skipped = part.start - self._position
        self._position = part.end
        # The next part begins after this one, whether or not all of this one is used.
        return iter(list(islice(self._rows, skipped, skipped + part.rows)))


class RangeReader:
    """Reads ranges of rows of a source that was divided into parts."""

    def __init__(self, source: str, parts: Sequence[SourcePart], ends: Sequence[int]) -> None:
        """Takes the parts of the source and the number of rows up to the end of each, without blank lines."""
        self._reader = PartReader(source)
        self._parts = parts
        self._ends = ends
        self._newest: tuple[int, list[tuple[int, Row]]] = (-1, [])  # a part and its rows

    def take(self, start: int, count: int) -> list[tuple[int, Row]]:
        """Returns rows from ``start``, counted from 0, each with its row or line number. A range may span parts.

        Raises:
            DataError: See `rlhf_critic.data.sources.read_rows`.
        """
        rows: list[tuple[int, Row]] = []
        for number in range(bisect_right(self._ends, start), len(self._parts)):
            first = self._ends[number - 1] if number else 0
            if first >= start + count:
                break
            if self._newest[0] != number:
                self._newest = number, list(self._reader.read(self._parts[number]))
            rows += self._newest[1][max(start - first, 0) : start + count - first]
        return rows


def _read_lines(part: SourcePart) -> Iterator[tuple[int, Row]]:
    with fsspec.open(part.source, "rb") as file:
        file.seek(part.start)
        block = file.read(part.end - part.start)
    yield from parse_json_lines(part.source, block.split(b"\n"), part.first)


def _read_row_groups(part: SourcePart) -> Iterator[tuple[int, Row]]:
    with fsspec.open(part.source, "rb") as file:
        batches = parquet.ParquetFile(file).iter_batches(row_groups=list(range(part.start, part.end)))
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=part.first)


def _read_dataset(part: SourcePart) -> Iterator[tuple[int, Row]]:
    rows = load_dataset(part.source).select(range(part.start, part.end))
    yield from enumerate(rows, start=part.first)


_READERS = {".jsonl": _read_lines, ".parquet": _read_row_groups, "dataset": _read_dataset}
