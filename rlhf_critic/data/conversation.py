"""Conversations: turns of a chat and the prompts made of them. Knows nothing about templates, tokens or files.

Turns are those of OpenAI's chat format: a role and a content, which is a text or a list of parts of type ``text``. A
turn of the assistant may call tools (``tool_calls``). Other fields, such as ``name`` or ``reasoning_content``, go to
the chat template. ShareGPT's turns (``from`` and ``value``) are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, field_validator, model_validator

Message: TypeAlias = dict[str, Any]
NonEmptyText: TypeAlias = Annotated[StrictStr, Field(min_length=1)]
# Names of ShareGPT's speakers, as LLaMA-Factory lists them.
ROLE_OF_SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
STEP_SEPARATOR = "\n"  # between the steps of a response


@dataclass(frozen=True)
class ToolPrompt:
    """A prompt of turns, with the tools that the assistant may call.

    Attributes:
        turns: The turns.
        tools: JSON schema of each tool, as ``apply_chat_template`` of transformers takes it.
    """

    turns: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]


Prompt: TypeAlias = "str | Sequence[Message] | ToolPrompt"
Reply: TypeAlias = "str | Message"  # the assistant's last turn: its text, or the whole turn if it holds more


class Turn(BaseModel):
    """One message of a conversation. Fields that are None count as absent; further fields go to the chat template."""

    model_config = ConfigDict(frozen=True, extra="allow")
    role: NonEmptyText
    content: StrictStr | list[dict[str, str]] | None

    @model_validator(mode="before")
    @classmethod
    def _normalise(cls, turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        turn = _from_sharegpt(present_fields([turn])[0])
        calls = turn.pop("tool_calls", None)
        if calls:  # an empty list calls nothing
            if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
                raise ValueError("tool_calls must be a list of objects")
            turn = {"content": None, **turn, "tool_calls": without_none(calls)}
        return turn

    @field_validator("content", mode="before")
    @classmethod
    def _texts_alone(cls, content: Any) -> Any:
        """Reads a list of parts, whose texts are kept. A single part is the same as its text."""
        if not isinstance(content, list | tuple):
            return content
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"a part of type {kind!r} cannot be read; a critic reads parts of type 'text' alone")
            texts.append({"type": "text", "text": part["text"]})
        if not texts:
            raise ValueError("an empty list of parts holds no text")
        return texts[0]["text"] if len(texts) == 1 else texts

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls of tools in this turn, which may be none."""
        return (self.model_extra or {}).get("tool_calls", [])

    @property
    def text(self) -> str:
        """The text of the content, with parts joined by line breaks; empty if there is none."""
        return text_of(self.content)

    def to_message(self) -> Message:
        """Returns the turn in the form that a chat template takes."""
        return self.model_dump()

    def to_reply(self) -> Reply:
        """Returns the text of the turn, or the whole turn if it has more than a role and a text."""
        is_text = isinstance(self.content, str) and not self.model_extra
        return str(self.content) if is_text else self.to_message()


Turns: TypeAlias = tuple[Turn, ...]


def _parse_tools(tools: Any) -> Any:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"a text must be a list of tools as JSON: {error}") from error
    return without_none(tools)


# A list of JSON schemas, or the list as JSON in a text.
Tools: TypeAlias = Annotated[tuple[dict[str, Any], ...], BeforeValidator(_parse_tools)]


def present_fields(turns: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Returns turns without fields that are None, because a table gives every turn the fields of all turns."""
    return [{name: value for name, value in turn.items() if value is not None} for turn in turns]


def without_none(value: Any) -> Any:
    """Returns nested lists and mappings without fields that are None; see `present_fields`."""
    if isinstance(value, Mapping):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def to_prompt(prompt: str | Sequence[Turn], tools: Sequence[dict[str, Any]] = ()) -> Prompt:
    """Returns a validated prompt in the form that `rlhf_critic.data.encoding.Encoder` takes."""
    if isinstance(prompt, str):
        return ToolPrompt(({"role": "user", "content": prompt},), tuple(tools)) if tools else prompt
    turns = [turn.to_message() for turn in prompt]
    return ToolPrompt(tuple(turns), tuple(tools)) if tools else turns


def turns_of(prompt: Prompt) -> list[Message]:
    """Returns the turns of a prompt; a text is a turn of the user."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(turn) for turn in (prompt.turns if isinstance(prompt, ToolPrompt) else prompt)]


def tools_of(prompt: Prompt) -> list[dict[str, Any]]:
    """Returns the tools of a prompt, which may be none."""
    return list(prompt.tools) if isinstance(prompt, ToolPrompt) else []


def text_of(content: Any) -> str:
    """Returns the text of a content or of a reply; parts are joined by line breaks, as vLLM joins them."""
    if isinstance(content, Mapping):
        content = content.get("content")
    if isinstance(content, list | tuple):
        return "\n".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _from_sharegpt(turn: Message) -> Message:
    """Returns a turn of ShareGPT, which has ``from`` and ``value``, with a role and a content."""
    if not {"from", "value"} <= turn.keys() or {"role", "content"} & turn.keys():
        return turn
    speaker, value = turn.pop("from"), turn.pop("value")
    role = ROLE_OF_SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if speaker != "function_call":
        return {"role": role, "content": value, **turn}
    try:
        call = json.loads(value)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"the value of a 'function_call' must be a call as JSON: {error}") from error
    calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
    return {"role": role, "tool_calls": calls, **turn}
