"""Encoding of training data, preferences and pointwise rows: each source is encoded once, counted and cached.

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
import math
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from rlhf_critic.data.benchmark_overlap import (
    NGRAM_WORDS,
    BenchmarkNgrams,
    fingerprint_of_benchmarks,
    read_benchmarks,
    texts_of,
)
from rlhf_critic.data.conversation import Prompt, Reply, Turn
from rlhf_critic.data.encoding import Encoded, Encoder
from rlhf_critic.data.layouts import ParsedRow, parse
from rlhf_critic.data.pointwise_schema import ALL_FIELDS, Pointwise
from rlhf_critic.data.preference_dataset import (
    FEATURES,
    PREFERENCE,
    ROW_KINDS,
    EncodedPreferences,
    EncodingReport,
    digest,
)
from rlhf_critic.data.preference_schema import STANDARD_EXPLICIT, WHOLE_TEXTS, Preference
from rlhf_critic.data.processes import map_in_processes, usable_cores
from rlhf_critic.data.repeated_prompts import RepeatCount, TextRow
from rlhf_critic.data.repeated_rows import find_repeated, find_reversed, hash_pointwise, hash_preference
from rlhf_critic.data.source_parts import PartReader, SourcePart, split_source
from rlhf_critic.data.sources import fingerprint_of
from rlhf_critic.errors import ConfigError, CriticError, DataError, EncodingError
from rlhf_critic.files import atomic_directory

CACHE_FORMAT = 9  # increase it when the cached columns change their meaning, or rows are read in another way
DATA_FORMAT = 4  # increase it when a run that began before must not continue
ENCODE_CHUNK = 512
MAX_BAD_ROWS = 10  # that one error names
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
    "empty_turns",
    "contaminated",
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
    decontaminate: Sequence[str] = (),
    ngram: int = NGRAM_WORDS,
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
        decontaminate: Sources of benchmarks. Rows that overlap with them are left out and counted; see
            `rlhf_critic.data.benchmark_overlap`.
        ngram: Number of words that a row and a benchmark must share.

    Raises:
        ConfigError: ``fields`` has an unknown name.
        DataError: See `rlhf_critic.data.sources.read_rows` and `rlhf_critic.data.preference_schema.parse_row`; names up
            to 10 invalid rows. Also if a text cannot be encoded, or no row is left.
    """
    fields = fields or {}
    unknown = sorted(fields.keys() - set(ALL_FIELDS))
    if unknown:
        raise ConfigError(f"data.fields: unknown field {', '.join(unknown)}; rows have {', '.join(ALL_FIELDS)}")
    contents = fingerprint_of(source)
    benchmarks = (fingerprint_of_benchmarks(decontaminate, ngram),) if decontaminate else ()
    data = (contents, encoder.fingerprint, overlong, json.dumps(sorted(fields.items())), *benchmarks)
    key = digest(str(CACHE_FORMAT), *data)
    entry = Path(cache_dir) / "preferences" / key
    if not entry.is_dir():
        with _lock(Path(cache_dir)):
            if not entry.is_dir():  # another process may have encoded it meanwhile
                parts = entry.with_name(f"{key}.parts")
                ngrams = read_benchmarks(decontaminate, ngram) if decontaminate else None
                job = _Job(source, contents, encoder, fields, overlong, parts, PartReader(source), ngrams)
                _encode_source(job, entry)
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
        benchmarks: N-grams that no row may have; None without benchmarks.
        are_whole: Whether the texts of the source repeat their prompt.
    """

    source: str
    contents: str
    encoder: Encoder
    fields: Mapping[str, str]
    overlong: Overlong
    parts: Path
    reader: PartReader
    benchmarks: BenchmarkNgrams | None = None
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
        repeats = _validate_rows(job, parts)
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


def _validate_rows(job: _Job, parts: Sequence[SourcePart]) -> RepeatCount:
    """Reads all rows, and counts those whose responses may repeat their prompt.

    Raises:
        DataError: Names the first invalid rows. Reading ends after `MAX_BAD_ROWS` of them.
    """
    repeats = RepeatCount()
    errors: list[str] = []
    with closing(_each_part("reading", _validate_part, job, parts, parts_each=32)) as results:
        for of_part, errors_of_part in results:
            repeats.join(of_part)
            errors += errors_of_part
            if len(errors) >= MAX_BAD_ROWS:
                errors[MAX_BAD_ROWS:] = [f"(reading stopped after {MAX_BAD_ROWS} invalid rows)"]
                break
    if errors:
        raise DataError("\n".join(errors))
    return repeats


def _validate_part(job: _Job, part: SourcePart) -> tuple[RepeatCount, list[str]]:
    count = RepeatCount()
    errors: list[str] = []
    rows = job.reader.read(part)
    while len(errors) < MAX_BAD_ROWS:
        try:
            line, row = next(rows)
            for parsed in parse(f"{job.source}:{line}", row, job.fields):
                texts = _text_row(job, line, parsed)
                if texts is not None:
                    count.add(texts)
        except StopIteration:
            break
        except DataError as error:  # after one of the reader, there is no next row
            errors.append(str(error))
    return count, errors


def _each_part(
    verb: str, function: Callable[[_Job, SourcePart], T], job: _Job, parts: Sequence[SourcePart], parts_each: int
) -> Generator[T, None, None]:
    """Applies a function to all parts in several processes, and shows rows per second and the time left.

    A process takes seconds to start, so each must have at least ``parts_each`` parts to work on.
    """
    processes = min(usable_cores(), len(parts) // parts_each)
    with tqdm(total=sum(part.rows for part in parts), desc=f"{verb} {job.source}", unit="row", disable=None) as bar:
        for part, result in zip(parts, map_in_processes(function, job, parts, processes), strict=True):
            bar.update(part.rows)
            yield result


def _parse_part(job: _Job, part: SourcePart) -> Iterator[tuple[int, ParsedRow]]:
    for line, row in job.reader.read(part):
        for parsed in parse(f"{job.source}:{line}", row, job.fields):
            yield line, parsed


def _text_row(job: _Job, line: int, row: ParsedRow) -> TextRow | None:
    """Returns the texts of a row whose responses may repeat its prompt."""
    if not isinstance(row, Preference) or not row.shape.startswith(STANDARD_EXPLICIT):
        return None
    return TextRow(f"{job.source}:{line}", str(row.prompt), tuple(map(str, row.responses)), row.fields)


def _without_repeats(job: _Job, line: int, row: ParsedRow) -> ParsedRow:
    """Separates the texts of a row from the prompt that they repeat."""
    texts = _text_row(job, line, row) if job.are_whole else None
    if texts is None or not isinstance(row, Preference):
        return row
    prompt, responses = texts.separated()
    return replace(row, prompt=prompt, responses=responses, shape=row.shape.replace(STANDARD_EXPLICIT, WHOLE_TEXTS))


def _encode_part(job: _Job, part: SourcePart) -> None:
    """Encodes the rows of a part and writes them with their counts."""
    counts = Counter(dict.fromkeys(COUNTS, 0))
    shapes: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    rows = ((line, _without_repeats(job, line, row)) for line, row in _parse_part(job, part))
    with atomic_directory(job.directory(part), keep_existing=True) as building:
        with _table_writer(building / TABLE_NAME) as writer:
            while chunk := list(islice(rows, ENCODE_CHUNK)):
                shapes.update(row.shape for _, row in chunk)
                turns_of_rows = [_turns_of(row) for _, row in chunk]
                roles.update(turn.role for turns in turns_of_rows for turn in turns)
                counts["empty_turns"] += sum(any(map(_is_empty, turns)) for turns in turns_of_rows)
                records = _encode_records(job, _without_contaminated(job, chunk, counts), counts)
                writer.write_table(pa.Table.from_pylist(records, schema=FEATURES.arrow_schema))
        (building / "counts.json").write_text(json.dumps({"counts": counts, "shapes": shapes, "roles": roles}))


def _without_contaminated(
    job: _Job, chunk: list[tuple[int, ParsedRow]], counts: Counter[str]
) -> list[tuple[int, ParsedRow]]:
    """Leaves out the rows that overlap with a benchmark, and counts them."""
    if job.benchmarks is None:
        return chunk
    kept = [(line, row) for line, row in chunk if not job.benchmarks.overlaps(*texts_of(row))]
    counts["contaminated"] += len(chunk) - len(kept)
    return kept


def _turns_of(row: ParsedRow) -> list[Turn]:
    """Returns the turns of a row; texts are none."""
    responses = row.responses if isinstance(row, Preference) else ()
    return [turn for one in (row.prompt, *responses) if not isinstance(one, str) for turn in one]


def _is_empty(turn: Turn) -> bool:
    return not turn.text.strip() and not turn.tool_calls


def _encode_records(job: _Job, chunk: list[tuple[int, ParsedRow]], counts: Counter[str]) -> list[dict[str, Any]]:
    """Encodes some rows, and adds to the counts."""
    records: list[dict[str, Any]] = []
    for (line, preference), of_row in zip(chunk, _encode_chunk(job.source, job.encoder, chunk), strict=True):
        encoded, tokens, is_pair = of_row.encoded, of_row.target_tokens, isinstance(preference, Preference)
        margin = preference.margin if isinstance(preference, Preference) else None
        responses = [np.asarray(one.ids, dtype=np.int32) for one in encoded]
        is_overlong = any(one.truncated for one in encoded)
        ids_of_row = tuple(ids.tobytes() for ids in responses)
        rendered = [one.rendered for one in encoded if one.rendered]
        counts["kept_whole"] += any(one.change == "kept whole" for one in rendered)
        counts["white_space"] += any(one.change == "white space" for one in rendered)
        counts["special_tokens"] += any(one.has_special_tokens for one in rendered)
        # Where the ending alone exceeds the maximum length, no step is left.
        if is_overlong and (job.overlong == "skip" or not (is_pair or tokens)):
            counts["skipped_overlong"] += 1
            continue
        if len(set(ids_of_row)) < len(ids_of_row):
            counts["identical"] += 1
            continue
        counts["truncated"] += is_overlong
        counts["tokens"] += sum(map(len, responses))
        counts["longest"] = max(counts["longest"], *map(len, responses))
        counts["pointwise"] += not is_pair
        if isinstance(preference, Pointwise):
            content, reverse = hash_pointwise(ids_of_row[0], preference.kind, of_row.targets, tokens)
        else:
            content, reverse = hash_preference(ids_of_row)
        records.append(
            {
                "responses": responses,
                "lengths": [len(ids) for ids in responses],
                "margin": float("nan") if margin is None else margin,
                "subset": preference.subset,
                "line": line,
                "prompt": _prompt_key(preference, f"{job.contents}:{line}"),
                "kind": ROW_KINDS.index(preference.kind) if isinstance(preference, Pointwise) else PREFERENCE,
                "targets": of_row.targets,
                "target_tokens": tokens,
                "content": content,
                "reverse": reverse,
            }
        )
    return records


def _table_writer(path: Path) -> pa.RecordBatchStreamWriter:
    return pa.ipc.new_stream(str(path), FEATURES.arrow_schema)


def _join_parts(job: _Job, parts: Sequence[SourcePart], begin_with_prompt: int, directory: Path) -> None:
    """Joins the encoded parts of a source to one table with a report."""
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    shapes: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    longest, hashes = 0, [np.zeros((0, 2), dtype=np.int64)]
    with _table_writer(directory / TABLE_NAME) as writer:
        for part in parts:
            encoded = job.directory(part)
            of_part = json.loads((encoded / "counts.json").read_text())
            longest = max(longest, of_part["counts"].pop("longest", 0))
            counts.update(of_part["counts"])
            shapes.update(of_part["shapes"])
            roles.update(of_part["roles"])
            with pa.memory_map(str(encoded / TABLE_NAME)) as file:
                for batch in pa.ipc.open_stream(file):
                    writer.write_batch(batch)
                    hashes.append(np.stack([batch["content"].to_numpy(), batch["reverse"].to_numpy()], axis=1))
    hashes_N2 = np.concatenate(hashes)
    if not len(hashes_N2):
        overlapping = f", {counts['contaminated']} overlap with data.decontaminate" if job.benchmarks else ""
        raise DataError(
            f"{job.source}: no row is left of {sum(shapes.values())}: {counts['skipped_overlong']} are longer than "
            f"encoding.max_length {job.encoder.max_length}{overlapping} and {counts['identical']} have identical "
            "responses; raise the limit, truncate long rows (--data.overlong truncate), or give other data"
        )
    counts["duplicates"] = int(find_repeated(hashes_N2[:, 0]).sum())
    counts["contradictions"] = int(find_reversed(hashes_N2[:, 0], hashes_N2[:, 1]).sum())
    report = EncodingReport(
        rows=sum(shapes.values()),
        preferences=len(hashes_N2),
        **counts,
        longest=longest,
        shapes=dict(shapes),
        roles=dict(roles),
        begin_with_prompt=begin_with_prompt,
    )
    (directory / "report.json").write_text(json.dumps(asdict(report)))


@dataclass(frozen=True)
class _EncodedRow:
    """The encoded responses of a row, and its targets with the index of the token of each."""

    encoded: list[Encoded]
    targets: list[float]
    target_tokens: list[int]


def _encode_chunk(source: str, encoder: Encoder, chunk: list[tuple[int, ParsedRow]]) -> Iterator[_EncodedRow]:
    """Encodes the responses of each preference in one call, because the tokenizer works in parallel."""
    conversations = [[] if isinstance(row, Pointwise) and row.steps else _conversations(row) for _, row in chunk]
    try:
        encoded = iter(encoder.encode_batch([one for of_row in conversations for one in of_row]))
    except EncodingError:
        for (line, row), of_row in zip(chunk, conversations, strict=True):
            names = row.fields if isinstance(row, Preference) else (row.field,)
            for field, (prompt, response) in zip(names, of_row, strict=False):
                try:
                    encoder.encode(prompt, response)
                except EncodingError as error:
                    raise DataError(f"{source}:{line}: field {field!r}: {error}") from error
        raise
    for (line, row), of_row in zip(chunk, conversations, strict=True):
        if isinstance(row, Preference):
            yield _EncodedRow([next(encoded) for _ in of_row], [], [])
        elif not row.steps:
            one = next(encoded)
            yield _EncodedRow([one], list(row.targets), [len(one.ids) - 1])
        else:
            try:
                one = encoder.encode_steps(row.conversation()[0], row.steps)
            except EncodingError as error:
                raise DataError(f"{source}:{line}: field {row.field!r}: {error}") from error
            ends = one.step_tokens
            pairs = zip(row.targets[len(row.steps) - len(ends) :], ends, strict=True)
            labelled = [(target, end) for target, end in pairs if not math.isnan(target)]
            yield _EncodedRow([one], [target for target, _ in labelled], [end for _, end in labelled])


def _conversations(row: ParsedRow) -> list[tuple[Prompt, Reply]]:
    return row.conversations() if isinstance(row, Preference) else [row.conversation()]


def _prompt_key(preference: ParsedRow, place: str) -> int:
    """Returns a number that is equal for equal prompts. An empty prompt is hashed by its place and equals no other."""
    prompt = preference.prompt
    text = prompt if isinstance(prompt, str) else json.dumps([turn.to_message() for turn in prompt])
    text = (text if prompt else f":{place}") + (json.dumps(preference.tools) if preference.tools else "")
    hashed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(hashed[:8], "little", signed=True)
