"""Rows of data that are to be scored, as items: what a row's fields mean. Knows nothing of files, models or tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from rlhf_critic.data.conversation import NonEmptyText, Turns, to_prompt
from rlhf_critic.data.rows import validate_row
from rlhf_critic.errors import DataError
from rlhf_critic.scoring.items import Conversation, Item, Text


class ScorableRow(BaseModel):
    """The fields that are read; others are passed through."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns | None = None
    response: StrictStr | None = None
    responses: Annotated[tuple[StrictStr, ...], Field(min_length=1)] | None = None
    messages: Annotated[Turns, Field(min_length=1)] | None = None
    text: NonEmptyText | None = None
    token_ids: Annotated[tuple[StrictInt, ...], Field(min_length=1)] | None = None


FIELDS = tuple(ScorableRow.model_fields)
WAYS = (("prompt", "response"), ("prompt", "responses"), ("messages",), ("text",), ("token_ids",))


def parse_scorable(place: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> list[Item]:
    """The items of a row: one, or one for each of its ``responses``.

    Args:
        place: Where the row is, as ``file:line``, for errors.
        row: Field names to values.
        fields: For fields that have another name in this data, our name to theirs.

    Raises:
        DataError: Names the place and the field that is missing, wrong, or says the same in another way.
    """
    parsed = validate_row(ScorableRow, row, place, fields)
    given = tuple(name for name in FIELDS if getattr(parsed, name) is not None)
    if given not in WAYS:
        ways = ", or ".join(" and ".join(way) for way in WAYS)
        theirs = " and ".join(fields.get(name, name) for name in given) or "none of them"
        raise DataError(f"{place}: a row has {ways}; this one has {theirs} (see --fields)")
    if parsed.text is not None:
        return [Text(parsed.text)]
    if parsed.token_ids is not None:
        return [list(parsed.token_ids)]
    if parsed.messages is not None:
        *before, last = parsed.messages
        if last.role != "assistant":
            raise DataError(
                f"{place}: field {fields.get('messages', 'messages')!r}: the last turn must be the assistant's"
            )
        return [Conversation([turn.model_dump() for turn in before], last.content)]
    prompt = to_prompt(parsed.prompt or ())
    responses = (parsed.response,) if parsed.response is not None else parsed.responses or ()
    return [Conversation(prompt, response) for response in responses]
