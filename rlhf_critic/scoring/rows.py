"""Conversion of data rows to items for scoring. Knows nothing about files, models or tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from rlhf_critic.data.conversation import NonEmptyText, Reply, Tools, Turn, Turns, to_prompt
from rlhf_critic.data.rows import validate_row
from rlhf_critic.errors import DataError
from rlhf_critic.scoring.items import Conversation, Item, Text


class ScorableRow(BaseModel):
    """Fields of a row that scoring reads. Other fields are passed through."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns | None = None
    response: StrictStr | None = None
    responses: Annotated[tuple[StrictStr, ...], Field(min_length=1)] | None = None
    messages: Annotated[Turns, Field(min_length=1)] | None = None
    text: NonEmptyText | None = None
    token_ids: Annotated[tuple[StrictInt, ...], Field(min_length=1)] | None = None
    tools: Tools | None = None


FORMATS = (("prompt", "response"), ("prompt", "responses"), ("messages",), ("text",), ("token_ids",))


def parse_scorable(place: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> list[Item]:
    """Returns the items of a row: one item, or one for each of its ``responses``.

    Args:
        place: Location of the row as ``file:line``, for errors.
        row: Values by field name.
        fields: Names of fields in this data, by our names, if they differ.

    Raises:
        DataError: A field is missing, invalid or redundant. The message names the place and the field.
    """
    parsed = validate_row(ScorableRow, row, place, fields)
    named = [name for name in ScorableRow.model_fields if name != "tools"]
    given = tuple(name for name in named if getattr(parsed, name) is not None)
    tools = parsed.tools or ()
    if given not in FORMATS:
        ways = ", or ".join(" and ".join(way) for way in FORMATS)
        theirs = " and ".join(fields.get(name, name) for name in given) or "none of them"
        raise DataError(
            f"{place}: expected {ways}; this row has {theirs}. Fix or remove this row, or rename fields with --fields"
        )
    if parsed.text is not None:
        return [Text(parsed.text)]
    if parsed.token_ids is not None:
        return [list(parsed.token_ids)]
    if parsed.messages is not None:
        *before, last = parsed.messages
        if last.role != "assistant":
            raise DataError(
                f"{place}: field {fields.get('messages', 'messages')!r}: the last turn must be the assistant's; fix or "
                "remove this row"
            )
        return [_conversation(place, fields.get("messages", "messages"), before, last.to_reply(), tools)]
    prompt = parsed.prompt or ()
    if parsed.response is not None:
        return [_conversation(place, fields.get("response", "response"), prompt, parsed.response, tools)]
    name = fields.get("responses", "responses")
    return [
        _conversation(place, f"{name}.{position}", prompt, response, tools)
        for position, response in enumerate(parsed.responses or ())
    ]


def _conversation(place: str, field: str, prompt: str | Sequence[Turn], response: Reply, tools: Tools) -> Conversation:
    texts = [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]
    if isinstance(response, str) and not response and not any(texts):
        raise DataError(
            f"{place}: field {field!r}: the prompt and the response are empty, so there is nothing to score; fix or "
            "remove this row"
        )
    return Conversation(to_prompt(prompt, tools), response)
