"""Encoding of training data, preferences and pointwise rows: each source is encoded once, counted and cached.

The cache key covers the contents of the source, the fingerprint of the encoder and the options that select rows. For
sources and rows see `rlhf_critic.data.sources` and `rlhf_critic.data.preference_schema`. Knows nothing about ranks,
batches or models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
from tqdm import tqdm

from rlhf_critic.data.conversation import Prompt, Reply
from rlhf_critic.data.encoding import Encoded, Encoder
from rlhf_critic.data.layouts import to_standard
from rlhf_critic.data.pointwise_schema import ALL_FIELDS, Pointwise, is_pointwise, parse_pointwise
from rlhf_critic.data.preference_dataset import (
    FEATURES,
    PREFERENCE,
    ROW_KINDS,
    EncodedPreferences,
    EncodingReport,
    digest,
)
from rlhf_critic.data.preference_schema import STANDARD_EXPLICIT, WHOLE_TEXTS, Preference, parse_row
from rlhf_critic.data.repeated_prompts import TextRow, count_repeats
from rlhf_critic.data.sources import fingerprint_of, read_rows
from rlhf_critic.errors import ConfigError, DataError, EncodingError
from rlhf_critic.files import atomic_directory

CACHE_FORMAT = 6  # increase it when the cached columns change their meaning, or rows are read in another way
DATA_FORMAT = 4  # increase it when a run that began before must not continue
ENCODE_CHUNK = 512

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
Row: TypeAlias = Preference | Pointwise


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
    unknown = sorted(fields.keys() - set(ALL_FIELDS))
    if unknown:
        raise ConfigError(f"data.fields: unknown field {', '.join(unknown)}; rows have {', '.join(ALL_FIELDS)}")
    contents = fingerprint_of(source)
    data = (contents, encoder.fingerprint, overlong, json.dumps(sorted(fields.items())))
    key = digest(str(CACHE_FORMAT), *data)
    entry = Path(cache_dir) / "preferences" / key
    if not entry.is_dir():
        # Another process may write the same entry first.
        with atomic_directory(entry, keep_existing=True) as building:
            _encode_source(source, contents, encoder, fields, overlong, building)
    report = EncodingReport(**json.loads((entry / "report.json").read_text()))
    table = datasets.load_from_disk(str(entry), keep_in_memory=False)
    return EncodedPreferences(table, {source: report}, digest(str(DATA_FORMAT), *data))


def _encode_source(
    source: str, contents: str, encoder: Encoder, fields: Mapping[str, str], overlong: Overlong, directory: Path
) -> None:
    parsed = [(line, one) for line, row in read_rows(source) for one in parse(f"{source}:{line}", row, fields)]
    parsed, begin_with_prompt = _separate_whole_texts(source, parsed)
    counts = Counter(dict.fromkeys(COUNTS, 0))
    records: list[dict[str, Any]] = []
    seen: Counter[tuple[bytes, ...]] = Counter()
    for start in tqdm(range(0, len(parsed), ENCODE_CHUNK), desc=f"encoding {source}", unit="chunk", disable=None):
        chunk = parsed[start : start + ENCODE_CHUNK]
        for (line, preference), of_row in zip(chunk, _encode_chunk(source, encoder, chunk), strict=True):
            encoded, tokens = of_row.encoded, of_row.target_tokens
            is_pair = isinstance(preference, Preference)
            margin = preference.margin if isinstance(preference, Preference) else None
            responses = [one.ids for one in encoded]
            is_overlong = any(one.truncated for one in encoded)
            ids_of_row = tuple(np.asarray(ids, dtype=np.int32).tobytes() for ids in responses)
            rendered = [one.rendered for one in encoded if one.rendered]
            counts["kept_whole"] += any(one.change == "kept whole" for one in rendered)
            counts["white_space"] += any(one.change == "white space" for one in rendered)
            counts["special_tokens"] += any(one.has_special_tokens for one in rendered)
            # Where the ending alone exceeds the maximum length, no step is left.
            if is_overlong and (overlong == "skip" or not (is_pair or tokens)):
                counts["skipped_overlong"] += 1
                continue
            if len(set(ids_of_row)) < len(ids_of_row):
                counts["identical"] += 1
                continue
            counts["truncated"] += is_overlong
            counts["duplicates"] += seen[ids_of_row] > 0
            counts["contradictions"] += is_pair and seen[ids_of_row[::-1]] > 0
            seen[ids_of_row] += 1
            records.append(
                {
                    "responses": responses,
                    "lengths": [len(ids) for ids in responses],
                    "margin": float("nan") if margin is None else margin,
                    "subset": preference.subset,
                    "line": line,
                    "prompt": _prompt_key(preference, f"{contents}:{line}"),
                    "kind": ROW_KINDS.index(preference.kind) if isinstance(preference, Pointwise) else PREFERENCE,
                    "targets": of_row.targets,
                    "target_tokens": tokens,
                }
            )
    if not records:
        raise DataError(
            f"{source}: no row is left of {len(parsed)}: {counts['skipped_overlong']} are longer than "
            f"encoding.max_length {encoder.max_length} and {counts['identical']} have identical responses; raise the "
            "limit, or truncate long rows (--data.overlong truncate)"
        )
    lengths = [length for record in records for length in record["lengths"]]
    report = EncodingReport(
        rows=len(parsed),
        preferences=len(records),
        **counts,
        tokens=sum(lengths),
        longest=max(lengths),
        shapes=dict(Counter(preference.shape for _, preference in parsed)),
        begin_with_prompt=begin_with_prompt,
        pointwise=sum(record["kind"] != PREFERENCE for record in records),
    )
    showed_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # which would be a second bar for the same work
    try:
        datasets.Dataset.from_list(records, features=FEATURES).save_to_disk(str(directory))
    finally:
        if showed_bars:
            datasets.enable_progress_bars()
    (directory / "report.json").write_text(json.dumps(asdict(report)))


def parse(place: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> list[Row]:
    """Parses a row of any shape or known layout: a preference, or one or several responses with targets.

    Raises:
        DataError: Names the place and the field at fault.
    """
    row = to_standard(place, row, fields)
    return [*parse_pointwise(place, row, fields)] if is_pointwise(row, fields) else [parse_row(place, row, fields)]


def _separate_whole_texts(source: str, parsed: list[tuple[int, Row]]) -> tuple[list[tuple[int, Row]], int]:
    """Separates texts from the prompt that they repeat, if those of most rows do.

    Returns the number of rows whose texts begin with their prompt as a part of the answer.
    """
    texts = {
        line: TextRow(f"{source}:{line}", str(row.prompt), tuple(map(str, row.responses)), row.fields)
        for line, row in parsed
        if isinstance(row, Preference) and row.shape.startswith(STANDARD_EXPLICIT)
    }
    count, are_whole = count_repeats(list(texts.values()))
    if not are_whole:
        return parsed, count

    def separated(line: int, row: Row) -> Row:
        if line not in texts or not isinstance(row, Preference):
            return row
        prompt, responses = texts[line].separated()
        shape = row.shape.replace(STANDARD_EXPLICIT, WHOLE_TEXTS)
        return replace(row, prompt=prompt, responses=responses, shape=shape)

    return [(line, separated(line, row)) for line, row in parsed], 0


@dataclass(frozen=True)
class _EncodedRow:
    """The encoded responses of a row, and its targets with the index of the token of each."""

    encoded: list[Encoded]
    targets: list[float]
    target_tokens: list[int]


def _encode_chunk(source: str, encoder: Encoder, chunk: list[tuple[int, Row]]) -> Iterator[_EncodedRow]:
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


def _conversations(row: Row) -> list[tuple[Prompt, Reply]]:
    return row.conversations() if isinstance(row, Preference) else [row.conversation()]


def _prompt_key(preference: Row, place: str) -> int:
    """Returns a number that is equal for equal prompts. An empty prompt is hashed by its place and equals no other."""
    prompt = preference.prompt
    text = prompt if isinstance(prompt, str) else json.dumps([turn.to_message() for turn in prompt])
    text = (text if prompt else f":{place}") + (json.dumps(preference.tools) if preference.tools else "")
    hashed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(hashed[:8], "little", signed=True)
