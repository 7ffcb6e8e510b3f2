"""Sources of data rows: files, saved datasets and hub ids.

A source is one of:

- a file path or URI: ``.jsonl``, ``.json`` (a list of objects), ``.parquet`` or ``.csv``, each also with ``.gz``;
- a directory that ``datasets.Dataset.save_to_disk`` wrote;
- a hub id, ``OWNER/NAME``.

The last two accept a split after a colon (``OWNER/NAME:test``); the default is ``train``. Knows nothing about the
meaning of a row.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import datasets
import fsspec
import pyarrow as pa
from pyarrow import parquet

from rlhf_critic.errors import DataError

Row: TypeAlias = dict[str, Any]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
READ_BYTES = 1 << 20
# Missing or broken files; truncated or damaged archives; a protocol that is unknown or whose package is missing.
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, ImportError)


def read_rows(source: str) -> Iterator[tuple[int, Row]]:
    """Reads rows one at a time, each with its line number (from 1), or its row number in formats without lines.

    Raises:
        DataError: The source is missing, empty, damaged, of an unknown kind or different from what its name says; or a
            line is not UTF-8, not JSON or not an object.
    """
    found = False
    rows = enumerate(load_dataset(source), start=1) if is_dataset(source) else _read_file(source)
    for number, row in validate_objects(source, rows):
        found = True
        yield number, row
    if not found:
        raise DataError(f"{source}: has no rows; give a source with at least one row")


def validate_objects(source: str, rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Row]]:
    """Yields rows that are objects.

    Raises:
        DataError: A row is not an object.
    """
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{source}:{number}: must be an object with named fields, not {type(row).__name__}")
        yield number, row


def fingerprint_of(source: str) -> str:
    """Hashes the contents of a source without decoding them.

    Raises:
        DataError: The source is missing or cannot be read.
    """
    files = [source]
    if is_dataset(source):
        loaded = load_dataset(source)
        if not Path(_without_split(source)[0]).is_dir():
            return str(loaded._fingerprint)  # hash of the hub files
        # The fingerprint of a saved dataset covers how it was made, not its rows, and covers functions only by name.
        files = [file["filename"] for file in loaded.cache_files]
    digest = hashlib.sha256(kind_of(files[0] if files else "").encode())
    try:
        for path in files:
            with fsspec.open(path, "rb") as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
    except UNREADABLE as error:
        raise unreadable(source, error) from error
    return digest.hexdigest()


def _read_file(source: str) -> Iterator[tuple[int, Row]]:
    read = _READERS.get(kind_of(source))
    if read is None:
        raise DataError(
            f"{source}: unknown kind of source; give a file ({', '.join(_READERS)}, each also .gz), a directory that "
            "datasets saved, or a hub id like OWNER/NAME"
        )
    try:
        with fsspec.open(source, "rb", compression="infer") as file:
            yield from read(source, cast(BinaryIO, file))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8: {error}; save it as UTF-8") from error
    except (*UNREADABLE, pa.ArrowException, csv.Error) as error:
        raise unreadable(source, error) from error


def parse_json_lines(source: str, lines: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, Row]]:
    """Parses lines of JSON, each with its number. The first of them has the number ``first``.

    Raises:
        DataError: A line is not UTF-8 or not JSON.
    """
    for number, line in enumerate(lines, start=first):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield number, _parse_json(f"{source}:{number}", line)


def _read_json(source: str, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    rows = _parse_json(source, file.read())
    if not isinstance(rows, list):
        raise DataError(f"{source}: a .json file must be a list of objects; use .jsonl for one object per line")
    yield from enumerate(rows, start=1)


def _parse_json(place: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))  # a byte order mark, of a file or of joined files, is no text
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: {error}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error}; fix or remove this line") from error


def _read_parquet(_: str, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    batches = parquet.ParquetFile(file).iter_batches()
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _read_csv(source: str, file: BinaryIO) -> Iterator[tuple[int, Row]]:
    lines = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    for row in lines:
        if None in row or None in row.values():
            raise DataError(f"{source}:{lines.line_num}: has more or fewer fields than the header; fix this line")
        # An empty cell means that the field is absent.
        yield lines.line_num, {name: cell for name, cell in row.items() if cell != ""}


_READERS: dict[str, Callable[[str, BinaryIO], Iterator[tuple[int, Row]]]] = {
    ".jsonl": parse_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def load_dataset(source: str) -> datasets.Dataset:
    """Loads a directory that datasets saved, or a hub id.

    Raises:
        DataError: It cannot be loaded, or has no such split.
    """
    name, split = _without_split(source)
    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, split=split or "train")
        loaded = datasets.load_from_disk(name, keep_in_memory=False)  # else a setting of datasets could hide its files
    except (*UNREADABLE, RuntimeError, datasets.exceptions.DatasetsError) as error:
        advice = (
            "not a directory that save_to_disk wrote"
            if Path(name).is_dir()
            else "no such file, and it could not be loaded as a hub id; check the spelling and whether the hub can be "
            "reached (HF_HUB_OFFLINE prevents it), or download it and give the file"
        )
        raise DataError(f"{source}: {advice} ({type(error).__name__}: {error})") from error
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in loaded:
            raise DataError(f"{source}: has no split {wanted!r}; give one of {', '.join(loaded)} as {name}:SPLIT")
        return loaded[wanted]
    if split is not None:
        raise DataError(f"{source}: this dataset has no splits; give {name}")
    return loaded


def is_dataset(source: str) -> bool:
    """Returns whether a source is a directory that datasets saved, or a hub id, and no file."""
    name, _ = _without_split(source)
    if Path(name).is_dir():
        return True
    return not Path(source).exists() and kind_of(source) not in _READERS and HUB_ID.fullmatch(name) is not None


def _without_split(source: str) -> tuple[str, str | None]:
    name, colon, split = source.rpartition(":")
    is_split = bool(colon) and re.fullmatch(r"\w+", split) is not None and not Path(source).exists()
    return (name, split) if is_split else (source, None)


def kind_of(source: str) -> str:
    """Returns the format of a file by its name, such as ``.jsonl``, also if it is compressed."""
    return Path(source.removesuffix(".gz")).suffix


def unreadable(source: str, error: BaseException) -> DataError:
    """Returns the error for a source that cannot be read."""
    return DataError(f"{source}: cannot be read ({type(error).__name__}: {error}); check the path and the file")
