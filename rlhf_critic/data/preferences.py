"""Encoding of preference data: each source is encoded once, counted and cached.

A source is divided into parts, which several processes encode at the same time. Each holds 512 rows at once, so memory
does not grow with the data. A restart reuses the parts that are complete.

The cache key covers the contents of the source, the fingerprint of the encoder and the options that select rows. For
sources and rows see `rlhf_critic.data.sources` and `rlhf_critic.data.preference_schema`. Knows nothing about ranks,
batches or models.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from rlhf_critic.data.encoding import Encoded, Encoder
from rlhf_critic.data.preference_dataset import FEATURES, EncodedPreferences, EncodingReport, digest
from rlhf_critic.data.preference_schema import FIELDS, STANDARD_EXPLICIT, WHOLE_TEXTS, Preference, parse_row
from rlhf_critic.data.processes import map_in_processes, usable_cores
from rlhf_critic.data.repeated_prompts import RepeatCount, TextRow
from rlhf_critic.data.source_parts import PartReader, SourcePart, split_source
from rlhf_critic.data.sources import fingerprint_of
from rlhf_critic.errors import ConfigError, CriticError, DataError, EncodingError
from rlhf_critic.files import atomic_directory

CACHE_FORMAT = 6  # increase it when the cached columns change their meaning, or rows are read in another way
DATA_FORMAT = 4  # increase it when a run that began before must not continue
ENCODE_CHUNK = 512
TABLE_NAME = "table.arrow"

COUNTS = (
    "truncated",
    "skipped_overlong",
    "identical",
    "duplicates",
    "contradictions",
    "kept_whole",
    "white_space",
    "special_tokens",
)

Overlong = Literal["truncate", "skip"]
T = TypeVar("T")


def load_preferences(
    source: str,
    encoder: Encoder,
    cache_dir: str,
    *,
    fields: Mapping[str, str] | None = None,
    overlong: Overlong = "truncate",
) -> EncodedPreferences:
    """Encodes a source of preferences, or maps the cached encoding of the same contents and encoder.

    Several processes may call it at once, because a cache entry is written atomically.

    Args:
        source: Path or id; see `rlhf_critic.data.sources`.
        encoder: Encoder of the critic.
        cache_dir: Local directory. Entries may be deleted.
        fields: Our field names to the names in this data; see `rlhf_critic.data.preference_schema.parse_row`.
        overlong: Treatment of a preference with a response that, with its prompt, exceeds the maximum length of the
            encoder: ``truncate`` from the left, or ``skip``.

    Raises:
        ConfigError: ``fields`` has an unknown name.
        DataError: See `rlhf_critic.data.sources.read_rows` and `rlhf_critic.data.preference_schema.parse_row`. Also if
            a text cannot be encoded, or no row is left.
    """
    fields = fields or {}
    unknown = sorted(fields.keys() - set(FIELDS))
    if unknown:
        raise ConfigError(f"data.fields: unknown field {', '.join(unknown)}; preferences have {', '.join(FIELDS)}")
    contents = fingerprint_of(source)
    data = (contents, encoder.fingerprint, overlong, json.dumps(sorted(fields.items())))
    key = digest(str(CACHE_FORMAT), *data)
    entry = Path(cache_dir) / "preferences" / key
    if not entry.is_dir():
        with _lock(Path(cache_dir)):
            if not entry.is_dir():  # another process may have encoded it meanwhile
                parts = entry.with_name(f"{key}.parts")
                _encode_source(_Job(source, contents, encoder, fields, overlong, parts, PartReader(source)), entry)
    report = EncodingReport(**json.loads((entry / "report.json").read_text()))
    table = datasets.Dataset.from_file(str(entry / TABLE_NAME))
    return EncodedPreferences(table, {source: report}, digest(str(DATA_FORMAT), *data))


@contextmanager
def _lock(cache_dir: Path) -> Iterator[None]:
    """Lets one process at a time encode into a cache, because each uses all cores."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / "encoding.lock").open("w") as file:
        with suppress(OSError):  # a file system without locks: then each process encodes, and writes atomically
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class _Job:
    """The encoding of one source, in each process that works on it.

    Attributes:
        source: The source.
        contents: Fingerprint of its contents.
        encoder: The encoder.
        fields: See `load_preferences`.
        overlong: See `load_preferences`.
        parts: Directory of the encoded parts. It outlives a killed process, so that a restart reuses its parts.
        reader: Reader of the source.
        are_whole: Whether the texts of the source repeat their prompt.
    """

    source: str
    contents: str
    encoder: Encoder
    fields: Mapping[str, str]
    overlong: Overlong
    parts: Path
    reader: PartReader
    are_whole: bool = False

    def directory(self, part: SourcePart) -> Path:
        """Returns the directory of an encoded part, which exists once it is complete."""
        whole = "-whole" if self.are_whole else ""
        return self.parts / f"{part.number}-{part.first}-{part.rows}{whole}"


def _encode_source(job: _Job, entry: Path) -> None:
    """Encodes the parts of a source in several processes, joins them and removes them."""
    parts = split_source(job.source)
    try:
        # Rows are validated before the first is encoded, because encoding takes most of the time.
        repeats = RepeatCount()
        for counted in _each_part("reading", _count_repeats, job, parts, parts_each=32):
            repeats.join(counted)
        job = replace(job, are_whole=repeats.are_whole_texts(), reader=PartReader(job.source))
        missing = [part for part in parts if not job.directory(part).is_dir()]
        for _ in _each_part("encoding", _encode_part, job, missing, parts_each=8):
            pass
        # Another process may write the same entry first, on a file system without locks.
        with atomic_directory(entry, keep_existing=True) as building:
            _join_parts(job, parts, 0 if job.are_whole else repeats.repeating, building)
    except CriticError:
        shutil.rmtree(job.parts, ignore_errors=True)  # it is the data that must change
        raise
    shutil.rmtree(job.parts, ignore_errors=True)


def _each_part(
    verb: str, function: Callable[[_Job, SourcePart], T], job: _Job, parts: Sequence[SourcePart], parts_each: int
) -> Iterator[T]:
    """Applies a function to all parts in several processes, and shows rows per second and the time left.

    A process takes seconds to start, so each must have at least ``parts_each`` parts to work on.
    """
    processes = min(usable_cores(), len(parts) // parts_each)
    with tqdm(total=sum(part.rows for part in parts), desc=f"{verb} {job.source}", unit="row", disable=None) as bar:
        for part, result in zip(parts, map_in_processes(function, job, parts, processes), strict=True):
            bar.update(part.rows)
            yield result


def _parse_part(job: _Job, part: SourcePart) -> Iterator[tuple[int, Preference]]:
    for line, row in job.reader.read(part):
        yield line, parse_row(f"{job.source}:{line}", row, job.fields)


def _text_row(job: _Job, line: int, row: Preference) -> TextRow | None:
    """Returns the texts of a row whose responses may repeat its prompt."""
    if not row.shape.startswith(STANDARD_EXPLICIT):
        return None
    return TextRow(f"{job.source}:{line}", str(row.prompt), tuple(map(str, row.responses)), row.fields)


def _count_repeats(job: _Job, part: SourcePart) -> RepeatCount:
    count = RepeatCount()
    for line, row in _parse_part(job, part):
        texts = _text_row(job, line, row)
        if texts is not None:
            count.add(texts)
    return count


def _without_repeats(job: _Job, line: int, row: Preference) -> Preference:
    """Separates the texts of a row from the prompt that they repeat."""
    texts = _text_row(job, line, row) if job.are_whole else None
    if texts is None:
        return row
    prompt, responses = texts.separated()
    return replace(row, prompt=prompt, responses=responses, shape=row.shape.replace(STANDARD_EXPLICIT, WHOLE_TEXTS))


def _encode_part(job: _Job, part: SourcePart) -> None:
    """Encodes the rows of a part and writes them, their counts and the hashes of their ids."""
    counts = Counter(dict.fromkeys(COUNTS, 0))
    shapes: Counter[str] = Counter()
    hashes: list[tuple[int, int]] = []
    rows = ((line, _without_repeats(job, line, row)) for line, row in _parse_part(job, part))
    with atomic_directory(job.directory(part), keep_existing=True) as building:
        with _table_writer(building / TABLE_NAME) as writer:
            while chunk := list(islice(rows, ENCODE_CHUNK)):
                shapes.update(preference.shape for _, preference in chunk)
                records = _encode_records(job, chunk, counts, hashes)
                writer.write_table(pa.Table.from_pylist(records, schema=FEATURES.arrow_schema))
        np.save(building / "hashes.npy", np.array(hashes, dtype=np.int64).reshape(-1, 2))
        (building / "counts.json").write_text(json.dumps({"counts": counts, "shapes": shapes}))


def _encode_records(
    job: _Job, chunk: list[tuple[int, Preference]], counts: Counter[str], hashes: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Encodes some rows. Adds to the counts, and to the hashes of the ids in order and in reversed order."""
    records: list[dict[str, Any]] = []
    for (line, preference), encoded in zip(chunk, _encode_chunk(job.source, job.encoder, chunk), strict=True):
        responses = [np.asarray(one.ids, dtype=np.int32) for one in encoded]
        is_overlong = any(one.truncated for one in encoded)
        ids_of_row = tuple(ids.tobytes() for ids in responses)
        rendered = [one.rendered for one in encoded if one.rendered]
        counts["kept_whole"] += any(one.change == "kept whole" for one in rendered)
        counts["white_space"] += any(one.change == "white space" for one in rendered)
        counts["special_tokens"] += any(one.has_special_tokens for one in rendered)
        if is_overlong and job.overlong == "skip":
            counts["skipped_overlong"] += 1
            continue
        if len(set(ids_of_row)) < len(ids_of_row):
            counts["identical"] += 1
            continue
        counts["truncated"] += is_overlong
        counts["tokens"] += sum(map(len, responses))
        counts["longest"] = max(counts["longest"], *map(len, responses))
        hashes.append((_hash_of(ids_of_row), _hash_of(ids_of_row[::-1])))
        records.append(
            {
                "responses": responses,
                "lengths": [len(ids) for ids in responses],
                "margin": float("nan") if preference.margin is None else preference.margin,
                "subset": preference.subset,
                "line": line,
                "prompt": _prompt_key(preference, f"{job.contents}:{line}"),
            }
        )
    return records


def _hash_of(ids_of_row: Sequence[bytes]) -> int:
    """Hashes the ids of all responses of a row in their order, to 64 bits."""
    hashed = hashlib.blake2b(digest_size=8)
    for ids in ids_of_row:
        hashed.update(hashlib.blake2b(ids, digest_size=16).digest())
    return int.from_bytes(hashed.digest(), "little", signed=True)


def _table_writer(path: Path) -> pa.RecordBatchStreamWriter:
    return pa.ipc.new_stream(str(path), FEATURES.arrow_schema)


def _join_parts(job: _Job, parts: Sequence[SourcePart], begin_with_prompt: int, directory: Path) -> None:
    """Joins the encoded parts of a source to one table with a report."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    shapes: Counter[str] = Counter()
    longest, hashes = 0, []
    with _table_writer(directory / TABLE_NAME) as writer:
        for part in parts:
            encoded = job.directory(part)
            of_part = json.loads((encoded / "counts.json").read_text())
            longest = max(longest, of_part["counts"].pop("longest", 0))
            counts.update(of_part["counts"])
            shapes.update(of_part["shapes"])
            hashes.append(np.load(encoded / "hashes.npy"))
            with pa.memory_map(str(encoded / TABLE_NAME)) as file:
                for batch in pa.ipc.open_stream(file):
                    writer.write_batch(batch)
    hashes_N2 = np.concatenate(hashes)
    if not len(hashes_N2):
        raise DataError(
            f"{job.source}: no row is left of {sum(shapes.values())}: {counts['skipped_overlong']} are longer than "
            f"encoding.max_length {job.encoder.max_length} and {counts['identical']} have identical responses; raise "
            "the limit, or truncate long rows (--data.overlong truncate)"
        )
    counts["duplicates"], counts["contradictions"] = _count_repeated_rows(hashes_N2)
    report = EncodingReport(
        rows=sum(shapes.values()),
        preferences=len(hashes_N2),
        **counts,
        longest=longest,
        shapes=dict(shapes),
        begin_with_prompt=begin_with_prompt,
    )
    (directory / "report.json").write_text(json.dumps(asdict(report)))


def _count_repeated_rows(hashes_N2: NDArray[np.int64]) -> tuple[int, int]:
    """Counts the rows that repeat an earlier one, and those that reverse an earlier one."""
    hashes, firsts = np.unique(hashes_N2[:, 0], return_index=True)
    place_N = np.searchsorted(hashes, hashes_N2[:, 1]).clip(max=len(hashes) - 1)
    reverses_N = (hashes[place_N] == hashes_N2[:, 1]) & (firsts[place_N] < np.arange(len(hashes_N2)))
    return len(hashes_N2) - len(hashes), int(reverses_N.sum())


def _encode_chunk(source: str, encoder: Encoder, chunk: list[tuple[int, Preference]]) -> Iterator[list[Encoded]]:
    """Encodes the responses of each preference in one call, because the tokenizer works in parallel."""
    conversations = [preference.conversations() for _, preference in chunk]
    try:
        encoded = iter(encoder.encode_batch([one for of_row in conversations for one in of_row]))
    except EncodingError:
        for (line, preference), of_row in zip(chunk, conversations, strict=True):
            for field, (prompt, response) in zip(preference.fields, of_row, strict=True):
                try:
                    encoder.encode(prompt, response)
                except EncodingError as error:
                    raise DataError(f"{source}:{line}: field {field!r}: {error}") from error
        raise
    for of_row in conversations:
        yield [next(encoded) for _ in of_row]


def _prompt_key(preference: Preference, place: str) -> int:
    """Returns a number that is equal for equal prompts. An empty prompt is hashed by its place and equals no other."""
    prompt = preference.prompt
    text = prompt if isinstance(prompt, str) else json.dumps([turn.to_message() for turn in prompt])
    text = (text if prompt else f":{place}") + (json.dumps(preference.tools) if preference.tools else "")
    hashed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(hashed[:8], "little", signed=True)
