"""Memory-mapped table of encoded preferences for training and evaluation, and operations on such tables.

A row is a preference, or a pointwise one: a single response with targets at some of its tokens. Knows nothing about
files, texts, ranks or models.

Shape legend: N preferences, R responses of all preferences, P comparisons (pairs of responses to one prompt).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from rlhf_critic.data.repeated_rows import HashArray, find_repeated, find_reversed
from rlhf_critic.errors import DataError

IdArray = NDArray[np.int32]

# Kinds of rows, in the order of their numbers in a table.
ROW_KINDS = ("preference", "score", "label", "steps")
PREFERENCE = 0

# Columns of a table. A row is a preference, or a response with targets.
FEATURES = datasets.Features(
    {
        "responses": datasets.List(datasets.List(datasets.Value("int32"))),
        "lengths": datasets.List(datasets.Value("int32")),
        "margin": datasets.Value("float32"),
        "subset": datasets.Value("string"),
        "line": datasets.Value("int64"),
        "prompt": datasets.Value("int64"),
        "kind": datasets.Value("int8"),
        "targets": datasets.List(datasets.Value("float32")),
        "target_tokens": datasets.List(datasets.Value("int32")),
        "content": datasets.Value("int64"),  # hash of ids and targets, and that of the reversed preference
        "reverse": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class EncodingReport:
    """Counts of the rows of one source during encoding.

    Attributes:
        rows: Number of rows read.
        preferences: Number of rows in the table, preferences or pointwise ones.
        truncated: Number of preferences with a response that was truncated from the left.
        skipped_overlong: Number of rows skipped because a response with its prompt exceeds the maximum length.
        identical: Number of rows skipped because two of their responses have the same ids.
        duplicates: Number of rows of the table that repeat an earlier one.
        contradictions: Number of preferences that reverse an earlier one.
        contaminated: Number of rows left out because they overlap with a benchmark.
        deduplicated: Number of rows of the table that are not trained on, because they repeat an earlier one of this
            source or of a source before it. 0 unless `deduplicate` counted them.
        tokens: Tokens of all responses with their prompts.
        longest: Tokens of the longest response with its prompt.
        shapes: Number of rows of each shape.
        kept_whole: Number of preferences with a response that the chat template drops or changes, and that was kept
            whole in spite of it.
        white_space: Number of preferences with a response whose white space the chat template changes.
        special_tokens: Number of preferences with a special token inside a text.
        begin_with_prompt: Number of rows with a text that begins with its prompt, read as a part of the answer.
        pointwise: Number of rows of the table that are pointwise.
        empty_turns: Number of rows with a turn that has neither text nor a call of a tool.
        roles: Number of turns of each role, in prompts and responses of preferences that consist of turns.
    """

    rows: int
    preferences: int
    truncated: int = 0
    skipped_overlong: int = 0
    identical: int = 0
    duplicates: int = 0
    contradictions: int = 0
    tokens: int = 0
    longest: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    kept_whole: int = 0
    white_space: int = 0
    special_tokens: int = 0
    begin_with_prompt: int = 0
    pointwise: int = 0
    empty_turns: int = 0
    roles: dict[str, int] = field(default_factory=dict)
    contaminated: int = 0
    deduplicated: int = 0

    def __str__(self) -> str:
        rare = (
            (self.kept_whole, "with a response that the chat template drops or changes (kept whole)"),
            (self.white_space, "with a response whose white space the chat template changes"),
            (self.special_tokens, "with a special token inside a text"),
            (self.begin_with_prompt, "with a response that begins with its prompt"),
            (self.empty_turns, "with an empty turn"),
            (self.contaminated, "left out because they overlap with a benchmark"),
            (self.deduplicated, "left out as repeats of rows before them, in all sources"),
        )
        what = f"{self.preferences - self.pointwise} preferences"
        if self.pointwise:
            pointwise = f"{self.pointwise} rows with targets"
            what = pointwise if self.pointwise == self.preferences else f"{what} and {pointwise}"
        return (
            f"{what}, {self.tokens} tokens (longest side {self.longest}); "
            f"{self.truncated} truncated, {self.skipped_overlong} skipped as too long, "
            f"{self.identical} skipped with identical sides, {self.duplicates} duplicates, "
            f"{self.contradictions} contradictions" + "".join(f", {count} {what}" for count, what in rare if count)
        )


@dataclass(frozen=True, eq=False)
class EncodedPreference:
    """One row of a table.

    Attributes:
        responses: Token ids of each response with its prompt, the best first, int32. A pointwise row has one.
        kind: One of `ROW_KINDS`.
        targets_A: Targets of a pointwise row, fp32; empty for a preference.
        tokens_A: Index of the token of each target, int32.
    """

    responses: tuple[IdArray, ...]
    kind: str = ROW_KINDS[PREFERENCE]
    targets_A: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    tokens_A: IdArray = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True, eq=False)
class Comparisons:
    """All pairs of responses that preferences order. A plain preference has one pair.

    Attributes:
        rows_P: Preference of each pair, int64.
        better_P: Position of the better response among all responses of all preferences, int64.
        worse_P: Position of the worse response, likewise.
        lengths_P2: Lengths of the better and the worse response in tokens, int64.
        subsets_P: Subset of the preference.
    """

    rows_P: NDArray[np.int64]
    better_P: NDArray[np.int64]
    worse_P: NDArray[np.int64]
    lengths_P2: NDArray[np.int64]
    subsets_P: NDArray[np.str_]


class EncodedPreferences:
    """A memory-mapped table of encoded preferences. Ranks of a node share its pages.

    Attributes:
        fingerprint: Hash of source contents, encoder and selected rows. Equal hashes mean equal ids in equal order.
        reports: Encoding report of each source.
        sizes_N: Number of responses of each preference, int64.
        tokens_N: Tokens of all responses of each preference with the prompt, int64.
        prompt_keys_N: Hash of each prompt, int64. Equal prompts have equal hashes in all tables; an empty prompt equals
            no other.
        prompts_N: Number of each prompt in this table, from 0.
        margins_N: Margin between the best and the worst response, float32; NaN if unknown.
        subsets_N: Tag for reports by subset; empty if absent.
        sources_N: Index of the source of each preference, in the order of ``reports``.
        kinds_N: Kind of each row: its number in `ROW_KINDS`, int8.
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
        _, firsts, inverse_N = np.unique(self.prompt_keys_N, return_index=True, return_inverse=True)
        self.prompts_N = firsts.argsort().argsort()[inverse_N].astype(np.int64)  # in the order of first appearance
        self.margins_N = column("margin")
        self.subsets_N = column("subset").astype(np.str_)
        self._lines_N = column("line")
        self.kinds_N = column("kind")
        ends_of_sources = np.cumsum([report.preferences for report in self.reports.values()])
        self.sources_N = np.searchsorted(ends_of_sources, self._rows_N, side="right")

    def __len__(self) -> int:
        return len(self._rows_N)

    def __getitem__(self, row: int) -> EncodedPreference:
        return self.take([row])[0]

    def __str__(self) -> str:
        return "\n".join(f"{source}: {report}" for source, report in self.reports.items())

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> list[EncodedPreference]:
        """Returns the preferences of some rows, in the order of the rows."""
        rows = np.asarray(rows, dtype=np.int64)
        taken = self._table[self._rows_N[rows]]
        lists = taken["responses"].combine_chunks().flatten()
        sequences = np.split(lists.flatten().to_numpy(), np.asarray(lists.value_lengths()).cumsum()[:-1])
        sizes = self.sizes_N[rows]
        responses = [tuple(sequences[end - size : end]) for end, size in zip(sizes.cumsum(), sizes, strict=True)]
        if not self.kinds_N[rows].any():
            return [EncodedPreference(of_row) for of_row in responses]
        targets, tokens = (_split_lists(taken[name]) for name in ("targets", "target_tokens"))
        kinds = [ROW_KINDS[kind] for kind in self.kinds_N[rows]]
        return [EncodedPreference(*of_row) for of_row in zip(responses, kinds, targets, tokens, strict=True)]

    def responses(self) -> list[IdArray]:
        """Returns all ``R`` responses with their prompts, preference by preference, the best first."""
        return [ids for preference in self.take(np.arange(len(self))) for ids in preference.responses]

    def hashes(self) -> tuple[HashArray, HashArray]:
        """Returns the hash of each row, and that of the reversed row; see `rlhf_critic.data.repeated_rows`."""
        content, reverse = (self._table.data[name].to_numpy()[self._rows_N] for name in ("content", "reverse"))
        return content, reverse

    def origin(self, row: int) -> str:
        """Returns the origin of a preference, as ``file:line``."""
        return f"{list(self.reports)[self.sources_N[row]]}:{self._lines_N[row]}"

    def select(self, rows_M: NDArray[np.int64]) -> EncodedPreferences:
        """Returns the table of some rows, in the order of the rows. A row may be repeated."""
        fingerprint = digest(self.fingerprint, rows_M.tobytes())
        return EncodedPreferences(self._table, self.reports, fingerprint, self._rows_N[rows_M])

    def pairs_alone(self) -> EncodedPreferences:
        """Returns the table without its pointwise rows, which is this table if it has none."""
        is_pair_N = self.kinds_N == PREFERENCE
        return self if is_pair_N.all() else self.select(np.flatnonzero(is_pair_N))

    def comparisons(self) -> Comparisons:
        """Returns every ordered pair of responses, preference by preference."""
        pairs = [np.zeros((3, 0), dtype=np.int64)]
        for size in np.unique(self.sizes_N[self.kinds_N == PREFERENCE]):
            of_size = np.flatnonzero(self.sizes_N == size)
            first, second = np.triu_indices(size, 1)
            starts = (self._ends_N[of_size] - size)[:, None]
            columns = (np.repeat(of_size, len(first)), (starts + first).ravel(), (starts + second).ravel())
            pairs.append(np.stack(columns))
        pairs_3P = np.concatenate(pairs, axis=1)
        rows_P, better_P, worse_P = pairs_3P[:, pairs_3P[0].argsort(kind="stable")]
        lengths_P2 = np.stack([self._lengths_R[better_P], self._lengths_R[worse_P]], axis=1).astype(np.int64)
        return Comparisons(rows_P, better_P, worse_P, lengths_P2, self.subsets_N[rows_P])


def _split_lists(column: Any) -> list[NDArray[Any]]:
    lists = column.combine_chunks()
    return np.split(lists.flatten().to_numpy(), np.asarray(lists.value_lengths()).cumsum()[:-1])


def concatenate(tables: Sequence[EncodedPreferences]) -> EncodedPreferences:
    """Joins tables that were loaded from different sources."""
    if len(tables) == 1:
        return tables[0]
    reports = {source: report for table in tables for source, report in table.reports.items()}
    joined = datasets.concatenate_datasets([table._table for table in tables])
    firsts = np.cumsum([0, *(len(table._table) for table in tables)])
    rows_N = np.concatenate([table._rows_N + first for table, first in zip(tables, firsts, strict=False)])
    return EncodedPreferences(joined, reports, digest(*(table.fingerprint for table in tables)), rows_N)


def deduplicate(preferences: EncodedPreferences) -> EncodedPreferences:
    """Returns the table without rows that repeat an earlier one, whatever its source. The reports count them.

    For rows that are the same see `rlhf_critic.data.repeated_rows`.
    """
    repeated_N = find_repeated(preferences.hashes()[0])
    counts = np.bincount(preferences.sources_N[repeated_N], minlength=len(preferences.reports))
    kept = preferences.select(np.flatnonzero(~repeated_N)) if repeated_N.any() else preferences
    reports = {
        source: replace(report, deduplicated=int(count))
        for (source, report), count in zip(preferences.reports.items(), counts, strict=True)
    }
    return EncodedPreferences(kept._table, reports, kept.fingerprint, kept._rows_N)


def count_repeated(tables: Sequence[EncodedPreferences]) -> list[tuple[int, int]]:
    """Counts for each table the rows that repeat, and those that reverse, an earlier one of it or a table before it."""
    hashes = [table.hashes() for table in tables]
    content_N, reverse_N = (np.concatenate(of_tables) for of_tables in zip(*hashes, strict=True))
    ends = np.cumsum([len(table) for table in tables])[:-1]
    found = (np.split(rows_N, ends) for rows_N in (find_repeated(content_N), find_reversed(content_N, reverse_N)))
    return [(int(repeated.sum()), int(reverses.sum())) for repeated, reverses in zip(*found, strict=True)]


def weigh_sources(preferences: EncodedPreferences, weights: Sequence[float], seed: int) -> EncodedPreferences:
    """Returns a table in which the preferences of each source are repeated or subsampled by weight.

    Args:
        preferences: Table of one or more sources.
        weights: Weight of each source. 1 keeps each preference once, 2 repeats it, and 0.5 keeps a random half,
            the same for all epochs.
        seed: Seed of the random selection.

    Raises:
        ValueError: The numbers of weights and sources differ.
    """
    if len(weights) != len(preferences.reports):
        raise ValueError(f"{len(weights)} weights for {len(preferences.reports)} sources")
    rows = []
    for source, weight in enumerate(weights):
        of_source = np.flatnonzero(preferences.sources_N == source)
        whole, part = int(weight), weight - int(weight)
        sampled = np.random.default_rng([seed, source]).permutation(of_source)[: round(part * len(of_source))]
        rows += [of_source] * whole + [np.sort(sampled)]
    return preferences.select(np.concatenate(rows))


def temperature_weights(sizes: Sequence[int], temperature: float) -> list[float]:
    """Returns weights for `weigh_sources` that draw each source with a share proportional to ``size**(1/temperature)``.

    An epoch has as many rows as the sources together. Shares are rounded to whole rows by largest remainders.
    Temperature 1 keeps the sizes, and an infinite one would draw all sources equally.

    Source: Raffel et al. (2020), section 3.5.2 (temperature-scaled mixing). With the exponent ``alpha =
    1/temperature`` it is the smoothing of multilingual BERT (Devlin, 2018) and mT5 (Xue et al., 2021, section 3.2).

    Args:
        sizes: Number of rows of each source, at least one of them above 0.
        temperature: Above 0.
    """
    sizes_S = np.asarray(sizes, dtype=np.float64)
    with np.errstate(divide="ignore"):  # an empty source has the share 0
        logits_S = np.log(sizes_S) / temperature
    shares_S = np.exp(logits_S - logits_S.max())
    exact_S = shares_S / shares_S.sum() * sizes_S.sum()
    rows_S = np.floor(exact_S)
    missing = round(sizes_S.sum() - rows_S.sum())
    rows_S[np.argsort(rows_S - exact_S, kind="stable")[:missing]] += 1
    return [rows / max(size, 1) for rows, size in zip(rows_S.tolist(), sizes, strict=True)]


def split_by_prompt(
    preferences: EncodedPreferences, fraction: float, seed: int
) -> tuple[EncodedPreferences, EncodedPreferences]:
    """Splits a table into training and validation tables that share no prompt.

    Args:
        preferences: Table to split.
        fraction: Fraction of the prompts, between 0 and 1, that go to validation with all their preferences.
        seed: Seed of the random selection.

    Raises:
        DataError: One table would be empty.
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
    """Counts the validation preferences whose prompt is also in the training table."""
    return int(np.isin(validation.prompt_keys_N, train.prompt_keys_N).sum())


def digest(*parts: str | bytes) -> str:
    """Hashes the hashes of parts."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    return hashed.hexdigest()[:32]
