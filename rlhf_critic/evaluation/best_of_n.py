"""Best-of-n data: does the highest reward go to a right response? Rows, their encoding and the score.

A row is ``prompt`` with the lists ``chosen`` (right responses) and ``rejected`` (wrong ones), as in RewardBench 2
(Malik et al., 2025), or ``prompt``, ``responses`` and ``best``, the index (from 0) of the right one; optionally ``id``
and ``subset``. Knows nothing of models.

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

from rlhf_critic.data.conversation import NonEmptyText, Turns, to_prompt
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.data.rows import validate_row
from rlhf_critic.data.sources import read_rows
from rlhf_critic.errors import DataError, EncodingError, NonFiniteRewardError
from rlhf_critic.evaluation.bootstrap import BootstrapEstimate, FloatArray, bootstrap_mean, bootstrap_statistic
from rlhf_critic.evaluation.preferences import rows_of_subsets

PAIRED_ID = re.compile(r"(ref|tied):(.+)")  # RewardBench 2's ids of its Ties subset


class BestOfNRow(BaseModel):
    """The fields that are read; others are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns
    chosen: tuple[NonEmptyText, ...] = Field((), min_length=1)
    rejected: tuple[NonEmptyText, ...] = Field((), min_length=1)
    responses: tuple[NonEmptyText, ...] = Field((), min_length=2)
    best: StrictInt | None = None
    id: StrictStr | StrictInt | None = None
    subset: StrictStr | None = None


@dataclass(frozen=True)
class BestOfN:
    """A prompt, its right responses and its wrong ones.

    Attributes:
        origin: Where it comes from, as ``file:line``.
        sequences: Token ids of the responses with the prompt, the right ones first.
        right: How many are right; at least one, and at least one is not.
        truncated: Whether one of them lost its beginning to the length limit.
        subset: A tag to report by; empty where there is none.
        id: RewardBench 2's, which pairs rows of its Ties subset; empty where there is none.
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

    Each prompt that has several equally right responses (``tied``) goes with a similar one that has one
    (``ref``). The gap of a prompt is the reward of its worst right response less that of its best wrong one, its spread
    the reward of its best right response less that of its worst right one. As in ``process_single_model`` of
    ``rewardbench/utils.py`` (github.com/allenai/reward-bench)::

        score = 0.3 tied_accuracy + 0.3 ref_accuracy + 0.2 preferred + 0.2 preferred_hard + 0.01 margin

    Attributes:
        pairs: How many prompts have both rows.
        score: The sum above; about 0 to 1 (the last term may take it just outside).
        tied_accuracy: Share of tied rows with a positive gap.
        ref_accuracy: The same of reference rows.
        preferred: Share of pairs whose tied gap is larger than the tied spread.
        preferred_hard: Share of pairs of which both gaps are.
        margin: Mean of ``tanh(smaller gap / spread - 1)``; 0 where both are 0.
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
    """How often the highest reward goes to a right response.

    Attributes:
        rows: How many were judged.
        accuracy: Share of rows whose highest reward belongs to a right response; responses that tie for it share the
            credit.
        chance: What rewards drawn at random would reach: the mean share of right responses.
        responses: Mean number of responses of a row.
        all_right_above_wrong: Of the rows with several right responses, the share in which each has a higher reward
            than every wrong one; None without such rows.
        ties: RewardBench 2's score of its Ties subset; None where no ids pair rows.
        subsets: Figures of each subset, the largest first; none where no row has a tag.
        reward_mean: Mean of all rewards.
        reward_std: Their standard deviation.
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
        """As nested plain values, for JSON."""
        return asdict(self)


def is_best_of_n(row: Mapping[str, Any]) -> bool:
    """Whether a row is meant as best-of-n, and not as a preference (whose lists hold turns, not texts)."""
    chosen = row.get("chosen")
    texts = isinstance(chosen, list | tuple) and all(isinstance(response, str) for response in chosen)
    return texts or (chosen is None and row.get("responses") is not None)


def load_best_of_n(source: str, encoder: Encoder) -> list[BestOfN]:
    """Reads and encodes best-of-n rows.

    Args:
        source: See `rlhf_critic.data.sources`.
        encoder: Decides the ids.

    Raises:
        DataError: See `rlhf_critic.data.sources.read_rows`; or a row lacks a field or cannot be encoded.
    """
    return [_encode(f"{source}:{number}", row, encoder) for number, row in read_rows(source)]


def _encode(origin: str, fields: Mapping[str, Any], encoder: Encoder) -> BestOfN:
    row = validate_row(BestOfNRow, fields, origin, {})
    if row.best is not None and row.responses:
        if not 0 <= row.best < len(row.responses):
            raise DataError(
                f"{origin}: field 'best': {row.best} is not the index of one of {len(row.responses)} responses, which "
                "count from 0; mend this row"
            )
        order = [row.best, *(index for index in range(len(row.responses)) if index != row.best)]
        right, named = 1, [(f"responses.{index}", row.responses[index]) for index in order]
    elif row.chosen and row.rejected:
        right = len(row.chosen)
        named = [(f"{side}.{i}", text) for side in ("chosen", "rejected") for i, text in enumerate(getattr(row, side))]
    else:
        raise DataError(f"{origin}: needs the lists 'chosen' and 'rejected', or the list 'responses' and 'best'")
    paired = PAIRED_ID.fullmatch(str(row.id))
    if paired and paired[1] == "tied" and right == 1:
        raise DataError(f"{origin}: field 'id': {row.id!r} needs at least two right responses in 'chosen'")
    prompt = to_prompt(row.prompt)
    encoded = []
    for field, text in named:
        try:
            encoded.append(encoder.encode(prompt, text))
        except EncodingError as error:
            raise DataError(f"{origin}: field {field!r}: {error}") from error
    return BestOfN(
        origin=origin,
        sequences=tuple(tuple(one.ids) for one in encoded),
        right=right,
        truncated=any(one.truncated for one in encoded),
        subset=row.subset or "",
        id="" if row.id is None else str(row.id),
    )


def evaluate_best_of_n(rows: Sequence[BestOfN], rewards: FloatArray, seed: int = 0) -> BestOfNEvaluation:
    """Compares rewards within each row.

    Args:
        rows: At least one.
        rewards: Of all sequences of all rows, in their order.
        seed: Of the bootstrap.

    Raises:
        NonFiniteRewardError: A reward is NaN or infinite.
    """
    by_row = split_rewards(rows, rewards)
    for row, (right, wrong) in zip(rows, by_row, strict=True):
        if not np.isfinite([*right, *wrong]).all():
            raise NonFiniteRewardError(f"{row.origin}: a reward is not finite; this critic cannot be used")
    credit_N = np.array([_credit(right, wrong) for right, wrong in by_row])
    chance_N = np.array([len(right) / (len(right) + len(wrong)) for right, wrong in by_row])
    several = [float(right.min() > wrong.max()) for right, wrong in by_row if len(right) > 1]
    subsets_N = np.array([row.subset for row in rows])
    return BestOfNEvaluation(
        rows=len(rows),
        accuracy=bootstrap_mean(credit_N, seed),
        chance=float(chance_N.mean()),
        responses=len(rewards) / len(rows),
        all_right_above_wrong=bootstrap_mean(np.array(several), seed) if several else None,
        ties=_ties_score(rows, by_row, seed),
        subsets=tuple(
            SubsetBestOfN(name, len(of_subset), bootstrap_mean(credit_N[of_subset], seed), chance_N[of_subset].mean())
            for name, of_subset in rows_of_subsets(subsets_N)
        ),
        reward_mean=float(rewards.mean()),
        reward_std=float(rewards.std()),
    )


def split_rewards(rows: Sequence[BestOfN], rewards: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
    """The rewards of the right and of the wrong responses of each row."""
    ends = np.cumsum([len(row.sequences) for row in rows])
    return [
        (of_row[: row.right], of_row[row.right :])
        for row, of_row in zip(rows, np.split(rewards, ends[:-1]), strict=True)
    ]


def _credit(right: FloatArray, wrong: FloatArray) -> float:
    top = max(right.max(), wrong.max())
    right_at_top = int((right == top).sum())
    return right_at_top / (right_at_top + int((wrong == top).sum()))


def _ties_score(
    rows: Sequence[BestOfN], by_row: Sequence[tuple[FloatArray, FloatArray]], seed: int
) -> TiesScore | None:
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
    # A prompt that lacks one of its rows is NaN there, and counts in the accuracy of the other only.
    ref_Q = np.array([gaps["ref"].get(prompt, np.nan) for prompt in prompts])
    tied_Q = np.array([gaps["tied"].get(prompt, np.nan) for prompt in prompts])
    spread_Q = np.array([spreads.get(prompt, np.nan) for prompt in prompts])

    def parts(chosen: NDArray[np.int64]) -> tuple[float, float, float, float, float]:
        ref, tied, spread = ref_Q[chosen], tied_Q[chosen], spread_Q[chosen]
        paired = ~np.isnan(ref) & ~np.isnan(tied)
        smaller, spread_of_pair = np.minimum(ref, tied)[paired], spread[paired]
        with np.errstate(divide="ignore", invalid="ignore"):
            margin = np.nan_to_num(np.tanh(smaller / spread_of_pair - 1.0), nan=0.0)
        shares = (tied[~np.isnan(tied)] > 0, ref[~np.isnan(ref)] > 0, tied[paired] > spread_of_pair)
        tied_accuracy, ref_accuracy, preferred = (float(share.mean()) if len(share) else 0.0 for share in shares)
        hard = float((smaller > spread_of_pair).mean()) if len(smaller) else 0.0
        return tied_accuracy, ref_accuracy, preferred, hard, float(margin.mean()) if len(margin) else 0.0

    def score(chosen: NDArray[np.int64]) -> float:
        return float(np.dot((0.3, 0.3, 0.2, 0.2, 0.01), parts(chosen)))

    return TiesScore(len(pairs), bootstrap_statistic(score, len(prompts), seed), *parts(np.arange(len(prompts))))
