"""Worker of an offline scoring job: reads parts of the data, scores them and writes each part atomically.

A part is a range of rows. The reading before the job recorded where each range lies in the source, so that workers
read only their own rows where the format allows it. Knows nothing about Ray Data, which distributes the parts
(`jobs.score`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from actors.serving.scorer import Scorer
from rlhf_critic.config.serve import ScorerConfig
from rlhf_critic.data.source_parts import RangeReader, SourcePart
from rlhf_critic.data.sources import Row
from rlhf_critic.errors import DataError, ScorerRejected, describe_error
from rlhf_critic.files import atomic_file
from rlhf_critic.scoring.items import Scores
from rlhf_critic.scoring.rows import parse_scorable


@dataclass(frozen=True)
class ScoringJob:
    """Description of a scoring job, the same for every part.

    Attributes:
        data: Path, URI or hub id of the source.
        fields: Names of fields in the data, by our names.
        out: Directory of the parts.
        format: File format of the parts.
        schema: Schema of the data's fields that parts contain, for Parquet.
        rows_per_part: Number of rows in a part.
        best_of_n: Whether to write only the best of a row's responses.
        sources: Parts of the source, in order.
        ends: Number of rows up to the end of each part of the source.
    """

    data: str
    fields: dict[str, str]
    out: Path
    format: Literal["jsonl", "parquet"]
    schema: pa.Schema | None
    rows_per_part: int
    best_of_n: bool
    sources: tuple[SourcePart, ...]
    ends: tuple[int, ...]

    def path(self, number: int) -> Path:
        """Returns the path of a part. The file exists once it is complete."""
        return self.out / f"part-{number:06d}.{self.format}"


class ChunkScorer:
    """Worker that scores parts of a job with one scorer."""

    def __init__(self, job: ScoringJob, config: ScorerConfig, use_gpu: bool) -> None:
        self._job = job
        self._scorer = Scorer(config, use_gpu=use_gpu)
        self._reader = RangeReader(job.data, job.sources, job.ends)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        """Scores the part whose number is in ``part``. Returns its row count or its error."""
        (number,) = batch["part"].tolist()
        try:
            return {"rows": [self._score(number)], "error": [None]}
        except Exception as error:  # returned, because Ray Data would log a traceback and wrap the error twice
            return {"rows": [0], "error": [describe_error(error)]}

    def _score(self, number: int) -> int:
        rows = self._reader.take(number * self._job.rows_per_part, self._job.rows_per_part)
        of_rows = [parse_scorable(f"{self._job.data}:{line}", row, self._job.fields) for line, row in rows]
        ends = np.cumsum([len(items) for items in of_rows])
        try:
            scores = self._scorer.score(list(chain.from_iterable(of_rows)))
        except ScorerRejected as error:
            if error.item is None:
                raise
            line, _ = rows[int(np.searchsorted(ends, error.item, side="right"))]
            raise DataError(f"{self._job.data}:{line}: {error}") from error
        scored = [
            self._scored_row(row, scores, int(end) - len(items), int(end))
            for (_, row), items, end in zip(rows, of_rows, ends, strict=True)
        ]
        write_part(self._job.path(number), scored, self._job.schema)
        return len(rows)

    def _scored_row(self, row: Row, scores: Scores, start: int, end: int) -> Row:
        """Returns a row with its scores: a number for one response, a list for a list of ``responses``."""
        list_field = self._job.fields.get("responses", "responses")
        scored = dict(row)
        index: int | slice = start
        if row.get(list_field) is not None:
            index = slice(start, end)
            if self._job.best_of_n:
                best = int(scores.rewards_S[index].argmax())
                scored[self._job.fields.get("response", "response")] = scored.pop(list_field)[best]
                index = start + best
        added = {"truncated": scores.truncated_S, "reward": scores.rewards_S}
        if scores.stds_S is not None:
            added["std"] = scores.stds_S
        added |= {f"reward_{name}": value_S for name, value_S in scores.components.items()}
        scored |= {name: value_S[index].tolist() for name, value_S in added.items()}
        return scored | {"model_version": scores.model_version}


def schema_of(rows: list[Row]) -> pa.Schema:
    """Returns a schema with the fields of all rows; pyarrow alone would read only the first row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])


def write_part(path: Path, rows: list[Row], schema: pa.Schema | None) -> None:
    """Writes rows to a file atomically."""
    with atomic_file(path) as temporary:
        if path.suffix == ".parquet":
            # Every part has every field with its type in the whole data, because readers join the parts.
            known = schema or pa.schema([])
            added = [field for field in schema_of(rows) if field.name not in known.names]
            parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema([*known, *added])), temporary)
        else:
            temporary.write_text("".join(f"{json_line(row)}\n" for row in rows), encoding="utf-8")


def json_line(row: Row) -> str:
    """Converts a row to one line of JSON.

    Raises:
        ValueError: The row holds a value that JSON cannot hold, such as a date, bytes or NaN.
        UnicodeEncodeError: The row holds half of a surrogate pair, which UTF-8 cannot encode.
    """
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
    line.encode("utf-8")
    return line


@dataclass
class RewardSums:
    """Running sums of the rewards of finished parts.

    Attributes:
        rows: Number of rows.
        responses: Number of rewards.
        truncated: Number of truncated responses.
        mean: Mean reward.
        squares: Sum of squared distances from the mean.
    """

    rows: int = 0
    responses: int = 0
    truncated: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, path: Path) -> None:
        """Reads a finished part and adds its rewards, by Chan, Golub and LeVeque's update (1979)."""
        if path.suffix == ".parquet":
            rows = parquet.read_table(path, columns=["reward", "truncated"]).to_pylist()
        else:
            with path.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
        rewards = np.array([reward for row in rows for reward in _as_list(row["reward"])], dtype=np.float64)
        self.rows += len(rows)
        self.truncated += sum(sum(_as_list(row["truncated"])) for row in rows)
        before, self.responses = self.responses, self.responses + len(rewards)
        if len(rewards):
            shift = float(rewards.mean()) - self.mean
            self.mean += shift * len(rewards) / self.responses
            self.squares += float(rewards.var()) * len(rewards) + shift**2 * before * len(rewards) / self.responses

    @property
    def std(self) -> float:
        """Standard deviation of the rewards."""
        return math.sqrt(self.squares / self.responses) if self.responses else 0.0


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
