"""What one worker of an offline scoring job does: reads a part of the data, scores it, writes it whole or not at all.

A part is a range of rows. Each worker reads the source from its beginning once and skips what is not its own, so any
source that can be read can be scored. Knows nothing of Ray Data, which hands the parts out (`jobs.score`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from actors.serving.scorer import Scorer
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.data.sources import Row, read_rows
from rlhf_critic.errors import CriticError, DataError, ScorerRejected
from rlhf_critic.files import atomic_file
from rlhf_critic.scoring.items import Item, Scores
from rlhf_critic.scoring.rows import parse_scorable

PART_PATTERN = "part-{number:06d}.{format}"


@dataclass(frozen=True)
class ScoringJob:
    """What is to be done; the same for every part.

    Attributes:
        data: The source.
        fields: Our field names to theirs.
        out: The directory of the parts.
        format: Of the parts.
        schema: Of the data's fields that the parts have too, where the format has one.
        rows_per_part: Rows of a part.
        best_of_n: Whether only the best of a row's responses is written.
    """

    data: str
    fields: dict[str, str]
    out: str
    format: Literal["jsonl", "parquet"]
    schema: pa.Schema | None
    rows_per_part: int
    best_of_n: bool

    def path(self, number: int) -> Path:
        """Where a part is, once it is whole."""
        return Path(self.out) / PART_PATTERN.format(number=number, format=self.format)


class ChunkScorer:
    """One worker.

    Args:
        work: What is to be done.
        config: What its scorer serves.
        use_gpu: Whether it has a GPU.
    """

    def __init__(self, work: ScoringJob, config: ScorerConfig, use_gpu: bool) -> None:
        self._work = work
        self._scorer = Scorer(config, use_gpu=use_gpu)
        self._rows: Iterator[tuple[int, Row]] = iter(())
        self._position: int | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        """Does the parts whose numbers are in ``part``; answers with their numbers, row counts and errors."""
        done: dict[str, list[Any]] = {"part": [], "rows": [], "error": []}
        for number in batch["part"].tolist():
            rows, error = 0, None
            try:
                rows = self._score(int(number))
            except CriticError as refused:  # as a value: Ray Data would log a traceback and wrap it twice
                error = refused
            done["part"].append(number)
            done["rows"].append(rows)
            done["error"].append(error)
        return done

    def _score(self, number: int) -> int:
        rows = self._take(number * self._work.rows_per_part, self._work.rows_per_part)
        items: list[Item] = []
        counts: list[int] = []
        for line, row in rows:
            of_row = parse_scorable(f"{self._work.data}:{line}", row, self._work.fields)
            items += of_row
            counts.append(len(of_row))
        ends = np.cumsum(counts)
        try:
            scores = self._scorer.score(items)
        except ScorerRejected as error:
            if error.item is None:
                raise
            line, _ = rows[int(np.searchsorted(ends, error.item, side="right"))]
            raise DataError(f"{self._work.data}:{line}: {error}") from error
        scored = [
            self._scored_row(row, scores, int(end - count), int(end))
            for (_, row), count, end in zip(rows, counts, ends, strict=True)
        ]
        write_part(self._work.path(number), scored, self._work.schema)
        return len(rows)

    def _take(self, start: int, count: int) -> list[tuple[int, Row]]:
        if self._position is None or start < self._position:
            self._rows, self._position = read_rows(self._work.data), 0
        taken = []
        for numbered in self._rows:
            self._position += 1
            if self._position > start:
                taken.append(numbered)
            if len(taken) == count:
                break
        return taken

    def _scored_row(self, row: Row, scores: Scores, start: int, end: int) -> Row:
        """A row with what was found: a number where it has one response, a list where it has ``responses``."""
        named = self._work.fields.get("responses", "responses")
        scored = dict(row)
        index: int | slice = start
        if row.get(named) is not None:
            index = slice(start, end)
            if self._work.best_of_n:
                best = int(scores.rewards_S[index].argmax())
                scored[self._work.fields.get("response", "response")] = scored.pop(named)[best]
                index = start + best
        found = {"truncated": scores.truncated_S, "reward": scores.rewards_S}
        found |= {f"reward_{name}": value_S for name, value_S in scores.components.items()}
        for name, value_S in found.items():
            scored[name] = value_S[index].tolist()
        scored["model_version"] = scores.model_version
        return scored


def added_fields(components: list[str]) -> tuple[str, ...]:
    """The fields that a scored row has beside its own."""
    return ("reward", "truncated", "model_version", *(f"reward_{name}" for name in components))


def schema_of(rows: list[Row]) -> pa.Schema:
    """The fields that any of the rows has; pyarrow itself would look at the first row only."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])


def write_part(path: Path, rows: list[Row], schema: pa.Schema | None) -> None:
    """Writes rows so that the file is there whole or not at all."""
    with atomic_file(path) as temporary:
        if path.suffix == ".parquet":
            # Every part gets every field, with the type it has in all of the data, or readers could not join the parts.
            known = schema or pa.schema([])
            added = [field for field in schema_of(rows) if field.name not in known.names]
            parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema([*known, *added])), temporary)
        else:
            temporary.write_text("".join(f"{json_line(row)}\n" for row in rows), encoding="utf-8")


def json_line(row: Row) -> str:
    """A row as JSON.

    Raises:
        ValueError: It holds what JSON cannot, such as a date, bytes or NaN.
        UnicodeEncodeError: It holds half of a surrogate pair, which no file of UTF-8 can.
    """
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
    line.encode("utf-8")
    return line


def read_rewards(path: Path) -> tuple[int, list[float], int]:
    """Of a finished part: its rows, their rewards, and how many responses lost their beginning."""
    if path.suffix == ".parquet":
        rows = parquet.read_table(path, columns=["reward", "truncated"]).to_pylist()
    else:
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    rewards = [reward for row in rows for reward in _as_list(row["reward"])]
    return len(rows), rewards, sum(sum(_as_list(row["truncated"])) for row in rows)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
