"""Rows of any layout: public ones of ratings and steps are converted to rows of this project, and then parsed.

Written from the data cards of HelpSteer (nvidia), UltraFeedback (openbmb), PRM800K (openai), Math-Shepherd (peiyi9979),
ProcessBench (Qwen), and TRL's stepwise and unpaired formats. Knows nothing about files, tokens or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from rlhf_critic.data.pointwise_schema import Pointwise, is_pointwise, parse_pointwise
from rlhf_critic.data.preference_schema import Preference, parse_row
from rlhf_critic.errors import DataError

Row = Mapping[str, Any]
ParsedRow: TypeAlias = Preference | Pointwise
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
MATH_SHEPHERD_MARK = "ки"  # stands at the end of each step in the input, where the label has + or -


def parse(place: str, row: Row, fields: Mapping[str, str]) -> list[ParsedRow]:
    """Parses a row of any shape or known layout: a preference, or one or several responses with targets.

    Raises:
        DataError: Names the place and the field at fault.
    """
    row = to_standard(place, row, fields)
    return [*parse_pointwise(place, row, fields)] if is_pointwise(row, fields) else [parse_row(place, row, fields)]


def to_standard(place: str, row: Row, fields: Mapping[str, str]) -> Row:
    """Returns a row of a known layout as a row of this project, and any other row unchanged.

    ``fields`` names fields that are read under another name; those need no conversion.

    Raises:
        DataError: A row of a known layout lacks a part. Names the place.
    """
    for recognised, convert in _LAYOUTS:
        if recognised(row):
            try:
                return convert(row, fields)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise DataError(
                    f"{place}: looks like a row of {convert.__name__.strip('_').replace('_', ' ')}, but cannot be read "
                    f"as one ({type(error).__name__}: {error}); fix or remove this row"
                ) from error
    return row


def _helpsteer(row: Row, fields: Mapping[str, str]) -> Row:
    return row if "score" in fields else {**row, "score": row["helpfulness"]}


def _ultrafeedback(row: Row, fields: Mapping[str, str]) -> Row:
    rated = [one for one in row["completions"] if _rating(one) is not None]
    if not rated:
        raise ValueError("no completion has a rating")
    return {
        "prompt": row["instruction"],
        "responses": [one["response"] for one in rated],
        "scores": [_rating(one) for one in rated],
        "subset": row.get("source"),
    }


def _rating(completion: Row) -> float | None:
    # The card warns that overall_score is wrong in some rows. fine-grained_score is the mean of four ratings.
    rating = completion.get("fine-grained_score", completion.get("overall_score"))
    return None if rating is None else float(rating)


def _prm800k(row: Row, fields: Mapping[str, str]) -> Row:
    steps = []
    for step in row["label"]["steps"]:
        chosen = step.get("chosen_completion")
        if chosen is not None:
            completion = step["completions"][chosen]
        elif step.get("human_completion"):
            completion = {"rating": 1, **step["human_completion"]}  # written by the labeller
        elif step.get("completions"):
            completion = step["completions"][0]  # the last step of a solution with an error
        else:
            break
        rating = completion.get("rating")
        # As in "Let's verify step by step" (Lightman et al., 2023), a neutral step counts as correct.
        steps.append({"text": completion["text"], "label": None if rating is None else float(rating >= 0)})
    return {"prompt": row["question"]["problem"], "steps": steps}


def _math_shepherd(row: Row, fields: Mapping[str, str]) -> Row:
    question, mark, _ = row["input"].partition("Step 1:")
    if not mark:
        raise ValueError("the input has no 'Step 1:'")
    texts = [text.strip() for text in row["input"][len(question) :].split(MATH_SHEPHERD_MARK)]
    texts = [text for text in texts if text]
    rest, labels = row["label"][len(question) :], []
    for text in texts:
        at = rest.index(text) + len(text)
        sign = rest[at:].lstrip()[:1]
        if sign not in {"+", "-"}:
            raise ValueError(f"a step ends with {sign!r} in the label, not with + or -")
        labels.append(float(sign == "+"))
        rest = rest[at:]
    steps = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {"prompt": question.strip(), "steps": steps, "subset": row.get("task")}


def _processbench(row: Row, fields: Mapping[str, str]) -> Row:
    """The label is the index of the first wrong step, or -1. What follows it is unknown."""
    wrong = row["label"]

    def label(index: int) -> float | None:
        return 1.0 if wrong < 0 or index < wrong else 0.0 if index == wrong else None

    steps = [{"text": text, "label": label(index)} for index, text in enumerate(row["steps"])]
    return {"prompt": row["problem"], "steps": steps, "subset": row.get("subset")}


def _trl_stepwise(row: Row, fields: Mapping[str, str]) -> Row:
    steps = [
        {"text": text, "label": float(label)} for text, label in zip(row["completions"], row["labels"], strict=True)
    ]
    return {**row, "completions": None, "labels": None, "steps": steps}


def _trl_unpaired(row: Row, fields: Mapping[str, str]) -> Row:
    return {**row, "response": row["completion"]}


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_LAYOUTS: tuple[tuple[Callable[[Row], bool], Callable[[Row, Mapping[str, str]], Row]], ...] = (
    (_has("prompt", "response", *HELPSTEER), _helpsteer),
    (lambda row: _has("instruction", "completions")(row) and not _are_texts(row["completions"]), _ultrafeedback),
    (
        lambda row: all(isinstance(row.get(name), dict) for name in ("question", "label")) and "steps" in row["label"],
        _prm800k,
    ),
    (lambda row: all(isinstance(row.get(name), str) for name in ("input", "label", "task")), _math_shepherd),
    (lambda row: _has("problem", "steps", "label")(row) and _are_texts(row["steps"]), _processbench),
    (lambda row: _has("completions", "labels")(row) and _are_texts(row["completions"]), _trl_stepwise),
    (lambda row: _has("completion", "label")(row) and row.get("response") is None, _trl_unpaired),
)
