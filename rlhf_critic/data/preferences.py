"""Encoding of preference data: each source is encoded once, counted and cached.

The cache key covers the contents of the source, the fingerprint of the encoder and the options that select rows. For
sources and rows see `rlhf_critic.data.sources` and `rlhf_critic.data.preference_schema`. Knows nothing about ranks,
batches or models.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from tqdm import tqdm

from rlhf_critic.data.encoding import Encoded, Encoder
from rlhf_critic.data.preference_dataset import FEATURES, EncodedPreferences, EncodingReport, digest
from rlhf_critic.data.preference_schema import FIELDS, STANDARD_EXPLICIT, WHOLE_TEXTS, Preference, parse_row
from rlhf_critic.data.repeated_prompts import TextRow, count_repeats
from rlhf_critic.data.sources import fingerprint_of, read_rows
from rlhf_critic.errors import ConfigError, DataError, EncodingError
from rlhf_critic.files import atomic_directory

CACHE_FORMAT = 5  # increase it when the cached columns change their meaning, or rows are read in another way
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
        # Another process may write the same entry first.
        with atomic_directory(entry, keep_existing=True) as building:
            _encode_source(source, contents, encoder, fields, overlong, building)
    report = EncodingReport(**json.loads((entry / "report.json").read_text()))
    table = datasets.load_from_disk(str(entry), keep_in_memory=False)
    return EncodedPreferences(table, {source: report}, digest(str(DATA_FORMAT), *data))


def _encode_source(
    source: str, contents: str, encoder: Encoder, fields: Mapping[str, str], overlong: Overlong, directory: Path
) -> None:
    parsed = [(line, parse_row(f"{source}:{line}", row, fields)) for line, row in read_rows(source)]
    parsed, begin_with_prompt = _separate_whole_texts(source, parsed)
    counts = Counter(dict.fromkeys(COUNTS, 0))
    records: list[dict[str, Any]] = []
    seen: Counter[tuple[bytes, ...]] = Counter()
    for start in tqdm(range(0, len(parsed), ENCODE_CHUNK), desc=f"encoding {source}", unit="chunk", disable=None):
        chunk = parsed[start : start + ENCODE_CHUNK]
        for (line, preference), encoded in zip(chunk, _encode_chunk(source, encoder, chunk), strict=True):
            responses = [one.ids for one in encoded]
            is_overlong = any(one.truncated for one in encoded)
            ids_of_row = tuple(np.asarray(ids, dtype=np.int32).tobytes() for ids in responses)
            rendered = [one.rendered for one in encoded if one.rendered]
            counts["kept_whole"] += any(one.change == "kept whole" for one in rendered)
            counts["white_space"] += any(one.change == "white space" for one in rendered)
            counts["special_tokens"] += any(one.has_special_tokens for one in rendered)
            if is_overlong and overlong == "skip":
                counts["skipped_overlong"] += 1
                continue
            if len(set(ids_of_row)) < len(ids_of_row):
                counts["identical"] += 1
                continue
            counts["truncated"] += is_overlong
            counts["duplicates"] += seen[ids_of_row] > 0
            counts["contradictions"] += seen[ids_of_row[::-1]] > 0
            seen[ids_of_row] += 1
            records.append(
                {
                    "responses": responses,
                    "lengths": [len(ids) for ids in responses],
                    "margin": float("nan") if preference.margin is None else preference.margin,
                    "subset": preference.subset,
                    "line": line,
                    "prompt": _prompt_key(preference, f"{contents}:{line}"),
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
    )
    showed_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # which would be a second bar for the same work
    try:
        datasets.Dataset.from_list(records, features=FEATURES).save_to_disk(str(directory))
    finally:
        if showed_bars:
            datasets.enable_progress_bars()
    (directory / "report.json").write_text(json.dumps(asdict(report)))


def _separate_whole_texts(
    source: str, parsed: list[tuple[int, Preference]]
) -> tuple[list[tuple[int, Preference]], int]:
    """Separates texts from the prompt that they repeat, if those of most rows do.

    Returns the number of rows whose texts begin with their prompt as a part of the answer.
    """
    texts = {
        line: TextRow(f"{source}:{line}", str(row.prompt), tuple(map(str, row.responses)), row.fields)
        for line, row in parsed
        if row.shape.startswith(STANDARD_EXPLICIT)
    }
    count, are_whole = count_repeats(list(texts.values()))
    if not are_whole:
        return parsed, count

    def separated(line: int, row: Preference) -> Preference:
        if line not in texts:
            return row
        prompt, responses = texts[line].separated()
        shape = row.shape.replace(STANDARD_EXPLICIT, WHOLE_TEXTS)
        return replace(row, prompt=prompt, responses=responses, shape=shape)

    return [(line, separated(line, row)) for line, row in parsed], 0


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
