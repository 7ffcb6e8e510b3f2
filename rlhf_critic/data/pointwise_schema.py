"""Schema of pointwise rows: one response with targets, instead of responses in an order.

A target is a rating (``score``), an outcome (``label``) or whether each step is correct (``steps``). Knows nothing
about files, tokens or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictStr

from rlhf_critic.data.conversation import NonEmptyText, Prompt, Reply, Tools, Turn, Turns, to_prompt
from rlhf_critic.data.preference_schema import FIELDS as PREFERENCE_FIELDS
from rlhf_critic.data.preference_schema import Response
from rlhf_critic.data.rows import validate_row
from rlhf_critic.data.steps import join_steps
from rlhf_critic.errors import DataError

Kind: TypeAlias = Literal["score", "label", "steps"]
KINDS: tuple[Kind, ...] = ("score", "label", "steps")
# True, false, or a probability between them.
Label: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class Step(BaseModel):
    """One step of a response. A step without a label is read, but not trained on."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    text: NonEmptyText
    label: Label | None = None


class PointwiseRow(BaseModel):
    """Fields that are read. Other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns | None = None
    response: Response | None = None
    messages: Annotated[Turns, Field(min_length=1)] | None = None
    responses: Annotated[tuple[Response, ...], Field(min_length=1)] | None = None
    steps: Annotated[tuple[Step, ...], Field(min_length=1)] | None = None
    score: FiniteFloat | None = None
    label: Label | None = None
    scores: tuple[FiniteFloat, ...] | None = None
    labels: tuple[Label, ...] | None = None
    subset: StrictStr | None = None
    tools: Tools = ()


FIELDS = tuple(PointwiseRow.model_fields)
ALL_FIELDS = (*PREFERENCE_FIELDS, *(name for name in FIELDS if name not in PREFERENCE_FIELDS))


@dataclass(frozen=True)
class Pointwise:
    """A response with targets.

    Attributes:
        prompt: Text, or the turns before the response.
        response: Last turn of the assistant.
        steps: Texts of the steps of the response; empty for other kinds.
        kind: Kind of the targets.
        targets: Rating; or label, 0 to 1; or the label of each step, NaN if unknown.
        subset: Tag for reports by subset; empty if absent.
        shape: Name of the row's shape.
        field: Field of the response, for errors.
        tools: JSON schemas of the tools that the assistant may call.
    """

    prompt: str | Turns
    response: Reply
    steps: tuple[str, ...]
    kind: Kind
    targets: tuple[float, ...]
    subset: str
    shape: str
    field: str
    tools: Tools = ()

    def conversation(self) -> tuple[Prompt, Reply]:
        """Returns the preceding turns and the last turn, for `Encoder.encode_batch`."""
        return to_prompt(self.prompt, self.tools), self.response


def is_pointwise(row: Mapping[str, Any], fields: Mapping[str, str]) -> bool:
    """Returns whether a row has a target, and not two responses to compare."""

    def has(*names: str) -> bool:
        return any(row.get(fields.get(name, name)) is not None for name in names)

    return has("score", "scores", "label", "labels", "steps") and not has("chosen", "rejected", "ranked")


def parse_pointwise(place: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> list[Pointwise]:
    """Parses a row into its rated responses: one, or one for each of its ``responses``.

    Args:
        place: Position of the row, as ``file:line``, for errors.
        row: Field names to values.
        fields: Our field names to the names in this data, where they differ.

    Raises:
        DataError: A field is missing, invalid or redundant. Names place and field.
    """
    parsed = validate_row(PointwiseRow, row, place, fields)

    def invalid(field: str, message: str) -> DataError:
        return DataError(f"{place}: field {fields.get(field, field)!r}: {message}")

    kinds: list[Kind] = [kind for kind in KINDS if getattr(parsed, kind) is not None]
    for kind, several in (("score", parsed.scores), ("label", parsed.labels)):
        if several is not None:
            kinds.append(kind)  # type: ignore[arg-type]
    if len(kinds) != 1:
        raise invalid(kinds[1] if kinds else "score", "needs exactly one of 'score', 'label' and 'steps' a row")
    (kind,) = kinds
    several = parsed.scores if kind == "score" else parsed.labels
    ways = [name for name in ("response", "messages", "responses", "steps") if getattr(parsed, name) is not None]
    wanted = ["steps"] if kind == "steps" else ["responses"] if several is not None else ["response", "messages"]
    if len(ways) != 1 or ways[0] not in wanted:
        found = " and ".join(fields.get(way, way) for way in ways) or "none"
        raise invalid(ways[0] if ways else wanted[0], f"a row with {kind} needs {' or '.join(wanted)}; it has {found}")
    common = (kind, parsed.subset or "")
    if parsed.steps is not None:
        targets = tuple(math.nan if step.label is None else step.label for step in parsed.steps)
        if all(map(math.isnan, targets)):
            raise invalid("steps", "no step has a label; give at least one, or remove this row")
        texts = tuple(step.text for step in parsed.steps)
        prompt = parsed.prompt or ""
        return [Pointwise(prompt, join_steps(texts), texts, *_with(targets, *common), "steps", parsed.tools)]
    responses = parsed.responses or tuple(one for one in (parsed.response, parsed.messages) if one is not None)
    targets = several if several is not None else (getattr(parsed, kind),)
    if len(targets) != len(responses):
        raise invalid(f"{kind}s", f"{len(targets)} for {len(responses)} responses; give one for each")
    made = []
    for index, (response, target) in enumerate(zip(responses, targets, strict=True)):
        field = f"responses.{index}" if parsed.responses else ways[0]
        prompt, reply = _split(parsed.prompt, response, lambda message, field=field: invalid(field, message))
        made.append(Pointwise(prompt, reply, (), *_with((target,), *common), fields.get(field, field), parsed.tools))
    return made


def _with(targets: tuple[float, ...], kind: Kind, subset: str) -> tuple[Kind, tuple[float, ...], str, str]:
    return kind, tuple(map(float, targets)), subset, f"pointwise, {kind}"


def _split(prompt: str | Turns | None, response: str | Turns, invalid: Any) -> tuple[str | Turns, Reply]:
    if isinstance(response, str):
        return prompt or "", response
    if response[-1].role != "assistant":
        raise invalid(f"must end with a turn of the assistant, not of {response[-1].role!r}")
    if not response[-1].text and not response[-1].tool_calls:
        raise invalid("the last turn is empty; give the response a text or remove this row")
    opening = (Turn(role="user", content=prompt),) if isinstance(prompt, str) else prompt or ()
    return (*opening, *response[:-1]), response[-1].to_reply()
