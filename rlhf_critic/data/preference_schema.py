r"""Schema of preference rows: a prompt and its responses, the best first.

Recognises four shapes of TRL by their fields (strings or turns, with or without a separate prompt), Anthropic's
``\n\nHuman:`` transcripts and ranked lists. Knows nothing about files, tokens or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StrictStr

from rlhf_critic.data.conversation import NonEmptyText, Prompt, Reply, Tools, Turn, Turns, to_prompt
from rlhf_critic.data.repeated_prompts import Rejection, separate_turns
from rlhf_critic.data.rows import validate_row
from rlhf_critic.errors import DataError

TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
ROLE_OF_SPEAKER = {"Human": "user", "Assistant": "assistant"}
STANDARD_EXPLICIT = "standard, explicit prompt"
WHOLE_TEXTS = "standard, explicit prompt that the responses repeat"
# A text or turns; one turn alone, as ShareGPT's files have it, is a list of one.
Response: TypeAlias = Annotated[
    NonEmptyText | Annotated[Turns, Field(min_length=1)],
    BeforeValidator(lambda given: [given] if isinstance(given, dict) else given),
]


@dataclass(frozen=True)
class Preference:
    """A human preference: responses to a prompt from best to worst, with a margin if known.

    Attributes:
        prompt: Text, or the turns that all responses share.
        responses: At least two texts, or lists of turns that end with a turn of the assistant.
        margin: Margin between first and last response; None if unknown.
        subset: Tag for reports by subset; empty if absent.
        shape: Name of the row's shape.
        fields: Field name of each response, for errors.
        tools: JSON schemas of the tools that the assistant may call.
    """

    prompt: str | Turns
    responses: tuple[str | Turns, ...]
    margin: float | None
    subset: str
    shape: str
    fields: tuple[str, ...]
    tools: Tools = ()

    def conversations(self) -> list[tuple[Prompt, Reply]]:
        """Returns the preceding turns and the last turn of each response, for `Encoder.encode_batch`."""
        return [self._conversation(response) for response in self.responses]

    def _conversation(self, response: str | Turns) -> tuple[Prompt, Reply]:
        if isinstance(response, str):
            return to_prompt(self.prompt, self.tools), response
        before = (Turn(role="user", content=self.prompt),) if isinstance(self.prompt, str) else self.prompt
        return to_prompt((*before, *response[:-1]), self.tools), response[-1].to_reply()


class PreferenceRow(BaseModel):
    """Fields that are read. Other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns | None = None
    chosen: Response | None = None
    rejected: Response | None = None
    ranked: Annotated[tuple[Response, ...], Field(min_length=2)] | None = None
    margin: FiniteFloat | None = None
    chosen_score: FiniteFloat | None = None
    rejected_score: FiniteFloat | None = None
    subset: StrictStr | None = None
    tools: Tools = ()


FIELDS = tuple(PreferenceRow.model_fields)


def parse_row(place: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> Preference:
    """Parses a row into a preference.

    Args:
        place: Position of the row, as ``file:line``, for errors.
        row: Field names to values.
        fields: Our field names to the names in this data, where they differ.

    Raises:
        DataError: A field is missing or invalid. Names place and field.
    """
    if "prompt" not in fields and row.get("prompt") is None and isinstance(row.get("conversations"), list):
        fields = {**fields, "prompt": "conversations"}  # as LLaMA-Factory names the turns of ShareGPT
    parsed = validate_row(PreferenceRow, row, place, fields)

    def invalid(field: str, message: str) -> DataError:
        return DataError(f"{place}: field {fields.get(field, field)!r}: {message}")

    if parsed.ranked is None:
        for field in ("chosen", "rejected"):
            if getattr(parsed, field) is None:
                raise invalid(field, "missing; a row needs 'chosen' and 'rejected', or 'ranked' (see --data.fields)")
    elif parsed.chosen is not None or parsed.rejected is not None:
        raise invalid("ranked", "given together with 'chosen' or 'rejected'; remove one of them")
    responses = parsed.ranked or (parsed.chosen, parsed.rejected)
    names = [f"ranked.{position}" for position in range(len(responses))] if parsed.ranked else ["chosen", "rejected"]

    def validate(responses: Sequence[Any]) -> None:
        for name, response in zip(names, responses, strict=True):
            if not isinstance(response, str) and response[-1].role != "assistant":
                raise invalid(name, f"must end with a turn of the assistant, not of {response[-1].role!r}")
            if not isinstance(response, str) and not response[-1].text and not response[-1].tool_calls:
                raise invalid(name, "the last turn is empty; give the response a text or remove this row")

    validate(responses)
    prompt, responses, shape = _separate_prompt(parsed.prompt, responses, names, invalid)
    validate(responses)  # transcripts have turns only now
    margin = parsed.margin
    if margin is None and parsed.chosen_score is not None and parsed.rejected_score is not None:
        margin = parsed.chosen_score - parsed.rejected_score
        if margin < 0:
            raise invalid("chosen_score", f"{parsed.chosen_score} is below rejected_score {parsed.rejected_score}")
    shape = shape if parsed.ranked is None else f"{shape}, ranked"
    return Preference(
        prompt,
        responses,
        margin,
        parsed.subset or "",
        shape,
        tuple(fields.get(name, name) for name in names),
        parsed.tools,
    )


def _separate_prompt(
    prompt: str | Turns | None, responses: Sequence[Any], names: Sequence[str], reject: Rejection
) -> tuple[str | Turns, tuple[str | Turns, ...], str]:
    """Separates a prompt from the responses that contain it, and returns the name of the shape."""
    texts = all(isinstance(response, str) for response in responses)
    if isinstance(prompt, str) and not prompt.strip() and not any(map(_begins_with_answer, responses)):
        prompt = None  # whole conversations beside an empty field
    if prompt is not None:
        return _separate_explicit_prompt(prompt, responses, names, reject)
    if texts and all(TRANSCRIPT_TURN.match(response) for response in responses):
        responses, shape = [_turns_of(response) for response in responses], "transcript (Human, Assistant)"
    elif texts:
        shared = _shared_words(responses)
        return responses[0][:shared], tuple(text[shared:] for text in responses), "standard, implicit prompt"
    else:
        responses = [
            (Turn(role="assistant", content=response),) if isinstance(response, str) else response
            for response in responses
        ]
        shape = "conversational, implicit prompt"
    # The last turn is always the response, even if all are equal.
    shared = min(len(turns) for turns in responses) - 1
    while any(turns[:shared] != responses[0][:shared] for turns in responses):
        shared -= 1
    return responses[0][:shared], tuple(tuple(turns[shared:]) for turns in responses), shape


def _separate_explicit_prompt(
    prompt: str | Turns, responses: Sequence[Any], names: Sequence[str], reject: Rejection
) -> tuple[str | Turns, tuple[str | Turns, ...], str]:
    opening = (Turn(role="user", content=prompt),) if isinstance(prompt, str) else prompt
    shape = "conversational, explicit prompt"
    if all(isinstance(response, str) for response in responses):
        speakers = [TRANSCRIPT_TURN.match(response) for response in responses]
        if not all(speakers) or not any(speaker and speaker[1] == "Human" for speaker in speakers):
            is_text = isinstance(prompt, str)
            return prompt, tuple(responses), STANDARD_EXPLICIT if is_text else shape
        # Whole transcripts. The prompt may end with the name of the next speaker.
        if isinstance(prompt, str) and TRANSCRIPT_TURN.match(prompt):
            opening = tuple(turn for turn in _turns_of(prompt) if turn.text)
        responses, shape = (
            [_turns_of(response) for response in responses],
            "transcript (Human, Assistant), explicit prompt",
        )
    elif not opening:
        return prompt, tuple(responses), shape
    turns = [(Turn(role="assistant", content=each),) if isinstance(each, str) else each for each in responses]
    shared, added = separate_turns(opening, turns, names, reject)
    return prompt if shared == opening and shape.startswith("conv") else shared, added, shape


def _begins_with_answer(response: str | Turns) -> bool:
    return isinstance(response, str) or response[0].role == "assistant"


def _turns_of(transcript: str) -> Turns:
    pieces = TRANSCRIPT_TURN.split(transcript)[1:]
    return tuple(
        Turn(role=ROLE_OF_SPEAKER[speaker], content=text.strip())
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    )


def _shared_words(texts: Sequence[str]) -> int:
    """Returns the length of the common prefix in characters, cut at the end of a word. No text is left empty."""
    shortest = min(len(text) for text in texts)
    shared = next((n for n in range(shortest) if len({text[n] for text in texts}) > 1), shortest)
    if shared == shortest and any(len(text) > shared for text in texts):
        shared -= 1
    elif shared == shortest:
        return 0  # identical texts give no end of the prompt
    beginning = texts[0][:shared]
    return max((beginning.rfind(space) for space in " \n\t"), default=-1) + 1 if shared else 0
