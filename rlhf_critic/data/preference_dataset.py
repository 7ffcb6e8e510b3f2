"""The memory-mapped table of encoded preferences that training and evaluation read, and what is made of such tables.

Knows nothing of files, texts, ranks or models.

Shape legend: N preferences, R responses of all of them, P comparisons (pairs of responses to one prompt).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlhf_critic.errors import DataError

IdArray = NDArray[np.int32]

# The columns of a table; a row is a preference.
FEATURES = datasets.Features(
    {
        "responses": datasets.List(datasets.List(datasets.Value("int32"))),
        "lengths": datasets.List(datasets.Value("int32")),
        "margin": datasets.Value("float32"),
        "subset": datasets.Value("string"),
        "line": datasets.Value("int64"),
        "prompt": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class EncodingReport:
    """What happened to the rows of one source on their way to token ids.

    Attributes:
        rows: How many were read.
        preferences: How many of them are in the table: neither too long nor identical.
        truncated: How many of those had a response whose text lost its beginning to the length limit.
        skipped_overlong: How many were left out because a response with its prompt is longer than the limit.
        identical: How many were left out because two of their responses have the same ids: they teach nothing.
        duplicates: How many in the table say what an earlier one says.
        contradictions: How many in the table say the opposite of another one.
        tokens: Tokens of all responses with their prompts together.
        longest: Tokens of the longest.
        shapes: How many rows were written in which way.
    """

    rows: int
    preferences: int
    truncated: int
    skipped_overlong: int
    identical: int
    duplicates: int
    contradictions: int
    tokens: int
    longest: int
    shapes: dict[str, int]

    def __str__(self) -> str:
        return (
            f"{self.preferences} preferences, {self.tokens} tokens (longest side {self.longest}); "
            f"{self.truncated} truncated, {self.skipped_overlong} skipped as too long, "
            f"{self.identical} skipped with identical sides, {self.duplicates} duplicates, "
            f"{self.contradictions} contradictions"
        )


@dataclass(frozen=True, eq=False)
class EncodedPreference:
    """Token ids of one preference: each response with its prompt, the best first, int32."""

    responses: tuple[IdArray, ...]

    @property
    def chosen_ids(self) -> IdArray:
        """The best."""
        return self.responses[0]

    @property
    def rejected_ids(self) -> IdArray:
        """The worst."""
        return self.responses[-1]


@dataclass(frozen=True, eq=False)
class Comparisons:
    """All pairs of responses that preferences order; a plain preference is one.

    Attributes:
        rows_P: The preference of each pair, int64.
        better_P: The position of the better response among all responses of all preferences, int64.
        worse_P: That of the worse.
        lengths_P2: Tokens of the better and the worse, int64.
        subsets_P: The preference's subset.
    """

    rows_P: NDArray[np.int64]
    better_P: NDArray[np.int64]
    worse_P: NDArray[np.int64]
    lengths_P2: NDArray[np.int64]
    subsets_P: NDArray[np.str_]


class EncodedPreferences:
    """A memory-mapped table of encoded preferences; ranks of a node share its pages.

    Attributes:
        fingerprint: Of the sources' contents, the encoder and the choice of rows: the same ids in the same order.
        reports: For each source what was counted while encoding it.
        sizes_N: How many responses each preference orders, int64.
        tokens_N: Tokens of all its responses with the prompt, int64.
        prompt_keys_N: A number for each preference's prompt, int64: the same where the prompts are, in any table. An
            empty prompt is like no other.
        prompts_N: The same counted from 0 in this table.
        margins_N: By how much the best is better than the worst, float32; NaN where that is not known.
        subsets_N: The tag to report by; empty where there is none.
        sources_N: Which of the sources, in the order of ``reports``, each preference comes from.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        reports: Mapping[str, EncodingReport],
        fingerprint: str,
        rows_N: NDArray[np.int64] | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.reports = dict(reports)
        self._table = table.with_format("arrow")
        self._rows_N = np.arange(len(table)) if rows_N is None else rows_N

        def column(name: str) -> NDArray[Any]:
            return table.data[name].to_numpy()[self._rows_N]

        lists = table.data["lengths"].combine_chunks()
        sizes = np.asarray(lists.value_lengths(), dtype=np.int64)
        self.sizes_N = sizes[self._rows_N]
        self._ends_N = self.sizes_N.cumsum()
        first_in_table_N = (sizes.cumsum() - sizes)[self._rows_N]
        shift_N = first_in_table_N - (self._ends_N - self.sizes_N)
        self._lengths_R = lists.flatten().to_numpy()[np.repeat(shift_N, self.sizes_N) + np.arange(self.sizes_N.sum())]
        self.tokens_N = np.add.reduceat(self._lengths_R, self._ends_N - self.sizes_N, dtype=np.int64)
        self.prompt_keys_N = column("prompt")
        self.prompts_N = _number(self.prompt_keys_N)
        self.margins_N = column("margin")
        self.subsets_N = column("subset").astype(np.str_)
        self._lines_N = column("line")
        ends_of_sources = np.cumsum([report.preferences for report in self.reports.values()])
        self.sources_N = np.searchsorted(ends_of_sources, self._rows_N, side="right")

    def __len__(self) -> int:
        return len(self._rows_N)

    def __getitem__(self, row: int) -> EncodedPreference:
        return self.take([row])[0]

    def __str__(self) -> str:
        return "\n".join(f"{source}: {report}" for source, report in self.reports.items())

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> list[EncodedPreference]:
        """The preferences of some rows, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        sequences = _split(self._table[self._rows_N[rows]]["responses"].combine_chunks().flatten())
        sizes = self.sizes_N[rows]
        return [
            EncodedPreference(tuple(sequences[end - size : end]))
            for end, size in zip(sizes.cumsum(), sizes, strict=True)
        ]

    def responses(self) -> list[IdArray]:
        """All responses with their prompts, preference by preference, the best of each first; ``R`` of them."""
        return [ids for preference in self.take(np.arange(len(self))) for ids in preference.responses]

    def origin(self, row: int) -> str:
        """Where a preference comes from, as ``file:line``."""
        return f"{list(self.reports)[self.sources_N[row]]}:{self._lines_N[row]}"

    def select(self, rows_M: NDArray[np.int64]) -> EncodedPreferences:
        """The table of some rows, in their order; a row may be there more than once."""
        fingerprint = digest(self.fingerprint, rows_M.tobytes())
        return EncodedPreferences(self._table, self.reports, fingerprint, self._rows_N[rows_M])

    def comparisons(self) -> Comparisons:
        """Every pair of responses that a preference orders, preference by preference."""
        rows, better, worse = [], [], []
        for size in np.unique(self.sizes_N):
            of_size = np.flatnonzero(self.sizes_N == size)
            first, second = np.triu_indices(size, 1)
            starts = (self._ends_N[of_size] - size)[:, None]
            rows.append(np.repeat(of_size, len(first)))
            better.append((starts + first).ravel())
            worse.append((starts + second).ravel())
        rows_P = np.concatenate(rows)
        order_P = rows_P.argsort(kind="stable")
        rows_P, better_P, worse_P = rows_P[order_P], np.concatenate(better)[order_P], np.concatenate(worse)[order_P]
        lengths_P2 = np.stack([self._lengths_R[better_P], self._lengths_R[worse_P]], axis=1).astype(np.int64)
        return Comparisons(rows_P, better_P, worse_P, lengths_P2, self.subsets_N[rows_P])


def concatenate(tables: Sequence[EncodedPreferences]) -> EncodedPreferences:
    """One table of several, of which each was loaded from another source."""
    if len(tables) == 1:
        return tables[0]
    reports = {source: report for table in tables for source, report in table.reports.items()}
    joined = datasets.concatenate_datasets([table._table for table in tables])
    firsts = np.cumsum([0, *(len(table._table) for table in tables)])
    rows_N = np.concatenate([table._rows_N + first for table, first in zip(tables, firsts, strict=False)])
    return EncodedPreferences(joined, reports, digest(*(table.fingerprint for table in tables)), rows_N)


def weigh_sources(preferences: EncodedPreferences, weights: Sequence[float], seed: int) -> EncodedPreferences:
    """The table that shows the preferences of each source more or less often.

    Args:
        preferences: Of one or more sources.
        weights: For each source how often its preferences are in the result: 1 leaves each there once, 2 repeats it,
            and 0.5 keeps half of them, drawn once for all epochs.
        seed: Of what is drawn.

    Raises:
        ValueError: There are not as many weights as sources.
    """
    if len(weights) != len(preferences.reports):
        raise ValueError(f"{len(weights)} weights for {len(preferences.reports)} sources")
    rows = []
    for source, weight in enumerate(weights):
        of_source = np.flatnonzero(preferences.sources_N == source)
        whole, part = int(weight), weight - int(weight)
        drawn = np.random.default_rng([seed, source]).permutation(of_source)[: round(part * len(of_source))]
        rows += [of_source] * whole + [np.sort(drawn)]
    return preferences.select(np.concatenate(rows))


def split_by_prompt(
    preferences: EncodedPreferences, fraction: float, seed: int
) -> tuple[EncodedPreferences, EncodedPreferences]:
    """Two tables that share no prompt: most of it to train on, and about a fraction of it to validate on.

    Args:
        preferences: What to split.
        fraction: Of the prompts, between 0 and 1, that go to validation with all that is said of them.
        seed: Of the choice.

    Raises:
        DataError: One of the two would be empty.
    """
    number_of_prompts = int(preferences.prompts_N.max()) + 1
    chosen = np.random.default_rng(seed).permutation(number_of_prompts)[: round(fraction * number_of_prompts)]
    held_out_N = np.isin(preferences.prompts_N, chosen)
    if held_out_N.all() or not held_out_N.any():
        raise DataError(
            f"{', '.join(preferences.reports)}: a fraction of {fraction} of {number_of_prompts} prompts leaves nothing "
            "to train or nothing to validate on; give more data or another --data.validation-fraction"
        )
    return preferences.select(np.flatnonzero(~held_out_N)), preferences.select(np.flatnonzero(held_out_N))


def count_leaked(train: EncodedPreferences, validation: EncodedPreferences) -> int:
    """How many validation preferences have a prompt that is trained on."""
    return int(np.isin(validation.prompt_keys_N, train.prompt_keys_N).sum())


def digest(*parts: str | bytes) -> str:
    """A digest of the digests of parts."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    return hashed.hexdigest()[:32]


def _number(keys_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers equal keys alike, from 0 in the order of their first appearance."""
    _, firsts, inverse_N = np.unique(keys_N, return_index=True, return_inverse=True)
    return firsts.argsort().argsort()[inverse_N].astype(np.int64)


def _split(lists: pa.ListArray) -> list[IdArray]:
    ends = np.asarray(lists.value_lengths()).cumsum()
    return np.split(lists.flatten().to_numpy(), ends[:-1])
