"""Conversations: turns of a chat and the prompts made of them. Knows nothing about templates, tokens or files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = "str | Sequence[Message]"
NonEmptyText: TypeAlias = Annotated[StrictStr, Field(min_length=1)]


class Turn(BaseModel):
    """One message of a conversation. Fields that are None count as absent."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: NonEmptyText
    content: StrictStr

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, turn: Any) -> Any:
        return present_fields([turn])[0] if isinstance(turn, dict) else turn


Turns: TypeAlias = tuple[Turn, ...]


def present_fields(turns: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Returns turns without fields that are None, because a table gives every turn the fields of all turns."""
    return [{name: value for name, value in turn.items() if value is not None} for turn in turns]


def to_prompt(prompt: str | Sequence[Turn]) -> Prompt:
    """Returns a validated prompt in the form that `rlhf_critic.data.encoding.Encoder` takes."""
    return prompt if isinstance(prompt, str) else [turn.model_dump() for turn in prompt]
