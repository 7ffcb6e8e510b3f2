"""Preference data as token ids: a source is encoded once, counted, and cached.

The cache knows a source by its contents, the encoder's fingerprint and what decides which rows are kept. What a source
is and what its rows mean is in `sources` and `records`; knows nothing of ranks, batches or models.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from tqdm import tqdm

from rlhf_critic.data.encoding import Encoded, Encoder
from rlhf_critic.data.preference_dataset import FEATURES, EncodedPreferences, EncodingReport, digest
from rlhf_critic.data.preference_schema import FIELDS, Preference, parse_row
from rlhf_critic.data.sources import fingerprint_of, read_rows
from rlhf_critic.errors import ConfigError, DataError, EncodingError
from rlhf_critic.files import atomic_directory

CACHE_FORMAT = 4  # raise it when the cached columns change their meaning
ENCODE_CHUNK = 512
INT64_BYTES = 8

Overlong = Literal["truncate", "skip"]


def load_preferences(
    source: str,
    encoder: Encoder,
    cache_dir: str,
    *,
    fields: Mapping[str, str] | None = None,
    overlong: Overlong = "truncate",
) -> EncodedPreferences:
    """Encodes a source of preferences, or maps the cached encoding of the same contents by the same encoder.

    Safe to call from several processes at once: a cache entry appears whole or not at all.

    Args:
        source: See `rlhf_critic.data.sources`.
        encoder: Decides the ids.
        cache_dir: A local directory; entries are safe to delete.
        fields: See `rlhf_critic.data.preference_schema.parse_row`.
        overlong: What becomes of a preference with a response that is, with its prompt, longer than the encoder's
            limit: it loses its beginning, the response being kept, or is left out.

    Raises:
        ConfigError: ``fields`` has a name that is not ours.
        DataError: See `rlhf_critic.data.sources.read_rows` and `rlhf_critic.data.preference_schema.parse_row`; also where a text cannot be
            encoded or nothing is left.
    """
    fields = fields or {}
    unknown = sorted(fields.keys() - set(FIELDS))
    if unknown:
        raise ConfigError(f"data.fields: {', '.join(unknown)}: preferences have the fields {', '.join(FIELDS)}")
    contents = fingerprint_of(source)
    key = digest(str(CACHE_FORMAT), contents, encoder.fingerprint, overlong, json.dumps(sorted(fields.items())))
    entry = Path(cache_dir) / "preferences" / key
    if not entry.is_dir():
        # Another process may be faster, with the same result.
        with atomic_directory(entry, keep_existing=True) as building:
            _encode_source(source, contents, encoder, fields, overlong, building)
    report = EncodingReport(**json.loads((entry / "report.json").read_text()))
    return EncodedPreferences(datasets.load_from_disk(str(entry), keep_in_memory=False), {source: report}, key)


def _encode_source(
    source: str, contents: str, encoder: Encoder, fields: Mapping[str, str], overlong: Overlong, directory: Path
) -> None:
    parsed = [(line, parse_row(f"{source}:{line}", row, fields)) for line, row in read_rows(source)]
    counts: Counter[str] = Counter()
    records: list[dict[str, Any]] = []
    seen: Counter[tuple[bytes, ...]] = Counter()
    for start in tqdm(range(0, len(parsed), ENCODE_CHUNK), desc=f"encoding {source}", unit="chunk", disable=None):
        chunk = parsed[start : start + ENCODE_CHUNK]
        for (line, preference), encoded in zip(chunk, _encode_chunk(source, encoder, chunk), strict=True):
            responses = [one.ids for one in encoded]
            is_overlong = any(one.truncated for one in encoded)
            said = tuple(np.asarray(ids, dtype=np.int32).tobytes() for ids in responses)
            if is_overlong and overlong == "skip":
                counts["skipped_overlong"] += 1
                continue
            if len(set(said)) < len(said):
                counts["identical"] += 1
                continue
            counts["truncated"] += is_overlong
            counts["duplicates"] += seen[said] > 0
            counts["contradictions"] += seen[said[::-1]] > 0
            seen[said] += 1
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
            f"{source}: nothing is left of {len(parsed)} rows: {counts['skipped_overlong']} were longer than "
            f"encoding.max_length {encoder.max_length} and {counts['identical']} had identical responses; raise the "
            "limit, or let long ones lose their beginning (--data.overlong truncate)"
        )
    lengths = [length for record in records for length in record["lengths"]]
    report = EncodingReport(
        rows=len(parsed),
        preferences=len(records),
        **{
            name: counts[name]
            for name in ("truncated", "skipped_overlong", "identical", "duplicates", "contradictions")
        },
        tokens=sum(lengths),
        longest=max(lengths),
        shapes=dict(Counter(preference.shape for _, preference in parsed)),
    )
    with _quiet_datasets():
        datasets.Dataset.from_list(records, features=FEATURES).save_to_disk(str(directory))
    (directory / "report.json").write_text(json.dumps(asdict(report)))


def _encode_chunk(source: str, encoder: Encoder, chunk: list[tuple[int, Preference]]) -> Iterator[list[Encoded]]:
    """The responses of each preference, encoded; the tokenizer works on many texts in parallel."""
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
    """A number that is the same where prompts are; texts without a prompt, of which each has its place, share none."""
    prompt = preference.prompt
    text = prompt if isinstance(prompt, str) else json.dumps([turn.model_dump() for turn in prompt])
    hashed = hashlib.sha256((text if prompt else f":{place}").encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(hashed[:INT64_BYTES], "little", signed=True)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the progress bar of datasets, which would be a second one for the same work."""
    showed_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if showed_bars:
            datasets.enable_progress_bars()
