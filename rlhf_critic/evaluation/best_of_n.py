"""Best-of-n evaluation: reading, encoding and scoring rows with correct and incorrect responses.

A row has ``prompt`` and the lists ``chosen`` (correct responses) and ``rejected`` (incorrect ones), as in RewardBench 2
(Malik et al., 2025). Or it has ``prompt``, ``responses`` and ``best``, the index (from 0) of the correct response.
``id`` and ``subset`` are optional. Knows nothing about models.

Shape legend: N rows, Q pairs of a reference and a tied prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from rlhf_critic.data.conversation import NonEmptyText, Tools, Turns, to_prompt
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.data.repeated_prompts import TextRow, count_repeats
from rlhf_critic.data.rows import validate_row
from rlhf_critic.data.sources import read_rows
from rlhf_critic.errors import DataError, EncodingError, NonFiniteRewardError
from rlhf_critic.evaluation.bootstrap import BootstrapEstimate, FloatArray, bootstrap_mean, bootstrap_statistic
from rlhf_critic.evaluation.preferences import rows_of_subsets

PAIRED_ID = re.compile(r"(ref|tied):(.+)")  # ids of RewardBench 2's Ties subset


class BestOfNRow(BaseModel):
    """Fields of a row that are read. Other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns
    chosen: tuple[NonEmptyText, ...] = Field((), min_length=1)
    rejected: tuple[NonEmptyText, ...] = Field((), min_length=1)
    responses: tuple[NonEmptyText, ...] = Field((), min_length=2)
    best: StrictInt | None = None
    id: StrictStr | StrictInt | None = None
    subset: StrictStr | None = None
    tools: Tools = ()


@dataclass(frozen=True)
class BestOfN:
    """A prompt with its correct and incorrect responses.

    Attributes:
        origin: Location of the row, as ``file:line``.
        sequences: Token ids of each response with the prompt, the correct ones first.
        right: Number of correct responses. At least one is correct and at least one is not.
        truncated: Whether a sequence was truncated from the left to the length limit.
        subset: Tag to report by, or empty.
        id: Id that pairs rows of RewardBench 2's Ties subset, or empty.
    """

    origin: str
    sequences: tuple[tuple[int, ...], ...]
    right: int
    truncated: bool
    subset: str
    id: str


@dataclass(frozen=True)
class SubsetBestOfN:
    """Figures of one subset; see `BestOfNEvaluation`."""

    name: str
    rows: int
    accuracy: BootstrapEstimate
    chance: float


@dataclass(frozen=True)
class TiesScore:
    """RewardBench 2's score of its Ties subset, and its parts.

    A prompt with several equally correct responses (``tied``) is paired with a similar prompt that has one (``ref``).
    The gap of a prompt is the lowest reward of its correct responses minus the highest of its incorrect ones. The
    spread is the highest minus the lowest reward of its correct responses. The formula is that of
    ``process_single_model`` in ``rewardbench/utils.py`` (github.com/allenai/reward-bench)::

        score = 0.3 tied_accuracy + 0.3 ref_accuracy + 0.2 preferred + 0.2 preferred_hard + 0.01 margin

    Attributes:
        pairs: Number of prompts with both rows.
        score: The sum above, about 0 to 1. The last term may take it slightly outside.
        tied_accuracy: Share of tied rows with a positive gap.
        ref_accuracy: Share of reference rows with a positive gap.
        preferred: Share of pairs whose tied gap is larger than the tied spread.
        preferred_hard: Share of pairs whose tied and reference gaps are both larger than the tied spread.
        margin: Mean of ``tanh(smaller gap / spread - 1)`` over the pairs whose spread is not 0; 0 without any.
    """

    pairs: int
    score: BootstrapEstimate
    tied_accuracy: float
    ref_accuracy: float
    preferred: float
    preferred_hard: float
    margin: float


@dataclass(frozen=True)
class BestOfNEvaluation:
    """Figures of a best-of-n evaluation.

    Attributes:
        rows: Number of rows.
        accuracy: Share of rows whose highest reward belongs to a correct response. Tied responses share the credit.
        chance: Accuracy of random rewards: the mean share of correct responses.
        responses: Mean number of responses per row.
        all_right_above_wrong: Share of the rows with several correct responses in which all of these have higher
            rewards than every incorrect one; None without such rows.
        ties: RewardBench 2's score of its Ties subset; None if no ids pair rows.
        subsets: Figures of each subset, the largest first; empty if no row has a tag.
        reward_mean: Mean of all rewards.
        reward_std: Standard deviation of all rewards.
    """

    rows: int
    accuracy: BootstrapEstimate
    chance: float
    responses: float
    all_right_above_wrong: BootstrapEstimate | None
    ties: TiesScore | None
    subsets: tuple[SubsetBestOfN, ...]
    reward_mean: float
    reward_std: float

    def to_dict(self) -> dict[str, object]:
        """Converts to nested plain values, for JSON."""
        return asdict(self)


def is_best_of_n(row: Mapping[str, Any]) -> bool:
    """Returns whether a row has the best-of-n format. In preferences, lists hold turns instead of texts."""
    chosen = row.get("chosen")
    texts = isinstance(chosen, list | tuple) and all(isinstance(response, str) for response in chosen)
    return texts or (chosen is None and row.get("responses") is not None)


def load_best_of_n(source: str, encoder: Encoder) -> list[BestOfN]:
    """Reads and encodes best-of-n rows.

    Raises:
        DataError: See `rlhf_critic.data.sources.read_rows`. Or a row lacks a field or cannot be encoded.
    """
    return parse_best_of_n([(f"{source}:{number}", fields) for number, fields in read_rows(source)], encoder)


def parse_best_of_n(rows: Sequence[tuple[str, Mapping[str, Any]]], encoder: Encoder) -> list[BestOfN]:
    """Encodes the fields of best-of-n rows, each with its origin.

    Raises:
        DataError: A row lacks a field or cannot be encoded.
    """
    parsed = [_parse(origin, fields) for origin, fields in rows]
    texts = [row.texts for row in parsed if isinstance(row.prompt, str)]
    _, are_whole = count_repeats(texts)
    return [_encode(row, encoder, are_whole) for row in parsed]


@dataclass(frozen=True)
class _Parsed:
    """A validated row. The texts are its responses, the correct ones first."""

    prompt: str | Turns
    texts: TextRow
    right: int
    subset: str
    id: str
    tools: Tools


def _parse(origin: str, fields: Mapping[str, Any]) -> _Parsed:
    row = validate_row(BestOfNRow, fields, origin, {})
    if row.best is not None and row.responses:
        if not 0 <= row.best < len(row.responses):
            raise DataError(
                f"{origin}: field 'best': {row.best} is not an index of the {len(row.responses)} responses, counted "
                "from 0; fix or remove this row"
            )
        order = [row.best, *(index for index in range(len(row.responses)) if index != row.best)]
        right, named = 1, [(f"responses.{index}", row.responses[index]) for index in order]
    elif row.chosen and row.rejected:
        right = len(row.chosen)
        named = [(f"{side}.{i}", text) for side in ("chosen", "rejected") for i, text in enumerate(getattr(row, side))]
    else:
        raise DataError(
            f"{origin}: needs the lists 'chosen' and 'rejected', or the list 'responses' and 'best'; fix or remove "
            "this row"
        )
    paired = PAIRED_ID.fullmatch(str(row.id))
    if paired and paired[1] == "tied" and right == 1:
        raise DataError(
            f"{origin}: field 'id': {row.id!r} needs at least two responses in 'chosen'; fix or remove this row"
        )
    texts = TextRow(
        origin,
        row.prompt if isinstance(row.prompt, str) else "",
        tuple(text for _, text in named),
        tuple(field for field, _ in named),
    )
    return _Parsed(row.prompt, texts, right, row.subset or "", "" if row.id is None else str(row.id), row.tools)


def _encode(row: _Parsed, encoder: Encoder, are_whole: bool) -> BestOfN:
    text, responses = row.prompt, row.texts.responses
    if are_whole and isinstance(text, str):  # the responses repeat the prompt, which is read once
        text, responses = row.texts.separated()
    prompt = to_prompt(text, row.tools)
    encoded = []
    for field, text in zip(row.texts.names, responses, strict=True):
        try:
            encoded.append(encoder.encode(prompt, text))
        except EncodingError as error:
            raise DataError(f"{row.texts.place}: field {field!r}: {error}") from error
    sequences, truncated = tuple(tuple(one.ids) for one in encoded), any(one.truncated for one in encoded)
    return BestOfN(row.texts.place, sequences, row.right, truncated, row.subset, row.id)


def evaluate_best_of_n(rows: Sequence[BestOfN], rewards: FloatArray) -> BestOfNEvaluation:
    """Compares the rewards of each row. ``rewards`` has those of all sequences of all rows (at least one), in order.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
    """
    by_row = split_rewards(rows, rewards)
    for row, (right, wrong) in zip(rows, by_row, strict=True):
        if not np.isfinite([*right, *wrong]).all():
            raise NonFiniteRewardError(f"{row.origin}: a reward is NaN or infinite; use another critic")
    credit_N = np.array([_credit(right, wrong) for right, wrong in by_row])
    chance_N = np.array([len(right) / (len(right) + len(wrong)) for right, wrong in by_row])
    several = [float(right.min() > wrong.max()) for right, wrong in by_row if len(right) > 1]
    subsets_N = np.array([row.subset for row in rows])
    return BestOfNEvaluation(
        rows=len(rows),
        accuracy=bootstrap_mean(credit_N),
        chance=float(chance_N.mean()),
        responses=len(rewards) / len(rows),
        all_right_above_wrong=bootstrap_mean(np.array(several)) if several else None,
        ties=_ties_score(rows, by_row),
        subsets=tuple(
            SubsetBestOfN(name, len(of_subset), bootstrap_mean(credit_N[of_subset]), chance_N[of_subset].mean())
            for name, of_subset in rows_of_subsets(subsets_N)
        ),
        reward_mean=float(rewards.mean()),
        reward_std=float(rewards.std()),
    )


def split_rewards(rows: Sequence[BestOfN], rewards: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
    """Splits rewards by row into those of the correct and of the incorrect responses."""
    ends = np.cumsum([len(row.sequences) for row in rows])
    return [
        (of_row[: row.right], of_row[row.right :])
        for row, of_row in zip(rows, np.split(rewards, ends[:-1]), strict=True)
    ]


def _credit(right: FloatArray, wrong: FloatArray) -> float:
    top = max(right.max(), wrong.max())
    right_at_top = int((right == top).sum())
    return right_at_top / (right_at_top + int((wrong == top).sum()))


def _ties_score(rows: Sequence[BestOfN], by_row: Sequence[tuple[FloatArray, FloatArray]]) -> TiesScore | None:
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads: dict[str, float] = {}
    for row, (right, wrong) in zip(rows, by_row, strict=True):
        paired = PAIRED_ID.fullmatch(row.id)
        if paired:
            kind, prompt = paired.groups()
            gaps[kind][prompt] = float(right.min() - wrong.max())
            if kind == "tied":
                spreads[prompt] = float(right.max() - right.min())
    prompts = sorted(gaps["ref"].keys() | gaps["tied"].keys())
    pairs = gaps["ref"].keys() & gaps["tied"].keys()
    if not pairs:
        return None
    # A missing row of a prompt is NaN here; the prompt counts in the accuracy of its other row only.
    ref_Q = np.array([gaps["ref"].get(prompt, np.nan) for prompt in prompts])
    tied_Q = np.array([gaps["tied"].get(prompt, np.nan) for prompt in prompts])
    spread_Q = np.array([spreads.get(prompt, np.nan) for prompt in prompts])

    def parts(chosen: NDArray[np.int64]) -> tuple[float, float, float, float, float]:
        ref, tied, spread = ref_Q[chosen], tied_Q[chosen], spread_Q[chosen]
        paired = ~np.isnan(ref) & ~np.isnan(tied)
        smaller, spread_of_pair = np.minimum(ref, tied)[paired], spread[paired]
        spreads_out = spread_of_pair > 0
        margin = np.tanh(smaller[spreads_out] / spread_of_pair[spreads_out] - 1.0)
        shares = (tied[~np.isnan(tied)] > 0, ref[~np.isnan(ref)] > 0, tied[paired] > spread_of_pair)
        tied_accuracy, ref_accuracy, preferred = (float(share.mean()) if len(share) else 0.0 for share in shares)
        hard = float((smaller > spread_of_pair).mean()) if len(smaller) else 0.0
        return tied_accuracy, ref_accuracy, preferred, hard, float(margin.mean()) if len(margin) else 0.0

    def score(chosen: NDArray[np.int64]) -> float:
        return float(np.dot((0.3, 0.3, 0.2, 0.2, 0.01), parts(chosen)))

    return TiesScore(len(pairs), bootstrap_statistic(score, len(prompts)), *parts(np.arange(len(prompts))))
