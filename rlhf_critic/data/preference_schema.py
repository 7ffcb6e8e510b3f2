r"""What a row of preference data means: a prompt and its responses, the best first.

Recognises by their fields the four shapes of TRL (strings or turns, with or without a prompt of its own), Anthropic's
``\n\nHuman:`` transcripts and ranked lists. Knows nothing of files, tokens or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictStr

from rlhf_critic.data.conversation import NonEmptyText, Prompt, Turn, Turns, to_prompt
from rlhf_critic.data.rows import validate_row
from rlhf_critic.errors import DataError

TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
ROLE_OF_SPEAKER = {"Human": "user", "Assistant": "assistant"}


Response: TypeAlias = NonEmptyText | Annotated[Turns, Field(min_length=1)]


class Preference(BaseModel):
    """One human judgement: responses to a prompt, from the best to the worst, and by how much if known.

    Attributes:
        prompt: A text, or the turns that all responses share.
        responses: Texts, or the turns that end with the assistant's; at least two.
        margin: How much better the first is than the last, where it is known.
        subset: A tag to report by; empty where there is none.
        shape: How the row was written, in words.
        fields: The name of each response's field, for errors.
    """

    model_config = ConfigDict(frozen=True)
    prompt: StrictStr | Turns
    responses: tuple[Response, ...] = Field(min_length=2)
    margin: float | None = None
    subset: str = ""
    shape: str
    fields: tuple[str, ...]

    def conversations(self) -> list[tuple[Prompt, str]]:
        """What `Encoder.encode_batch` takes: for each response what comes before it, and its last text."""
        return [self._conversation(response) for response in self.responses]

    def _conversation(self, response: Response) -> tuple[Prompt, str]:
        if isinstance(response, str) and isinstance(self.prompt, str):
            return self.prompt, response
        before = (Turn(role="user", content=self.prompt),) if isinstance(self.prompt, str) else self.prompt
        if isinstance(response, str):
            return to_prompt(before), response
        return to_prompt((*before, *response[:-1])), response[-1].content


class PreferenceRow(BaseModel):
    """The fields that are read; others are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns | None = None
    chosen: Response | None = None
    rejected: Response | None = None
    ranked: Annotated[tuple[Response, ...], Field(min_length=2)] | None = None
    margin: FiniteFloat | None = None
    chosen_score: FiniteFloat | None = None
    rejected_score: FiniteFloat | None = None
    subset: StrictStr | None = None


FIELDS = tuple(PreferenceRow.model_fields)


def parse_row(place: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> Preference:
    """The preference that a row states.

    Args:
        place: Where the row is, as ``file:line``, for errors.
        row: Field names to values.
        fields: For fields that have another name in this data, our name to theirs.

    Raises:
        DataError: Names the place and the field that is missing or wrong.
    """
    parsed = validate_row(PreferenceRow, row, place, fields)

    def refuse(field: str, what: str) -> DataError:
        return DataError(f"{place}: field {fields.get(field, field)!r}: {what}")

    if parsed.ranked is None:
        for field in ("chosen", "rejected"):
            if getattr(parsed, field) is None:
                raise refuse(field, "missing: a row has 'chosen' and 'rejected', or 'ranked'; see --data.fields")
    elif parsed.chosen is not None or parsed.rejected is not None:
        raise refuse("ranked", "beside 'chosen' or 'rejected': a row states one or the other")
    responses = parsed.ranked or (parsed.chosen, parsed.rejected)
    names = [f"ranked.{position}" for position in range(len(responses))] if parsed.ranked else ["chosen", "rejected"]
    prompt, responses, shape = _separate_prompt(parsed.prompt, responses)
    for name, response in zip(names, responses, strict=True):
        if not isinstance(response, str) and response[-1].role != "assistant":
            raise refuse(name, f"must end with a turn of the assistant, this ends with one of {response[-1].role!r}")
        if not isinstance(response, str) and not response[-1].content:
            raise refuse(name, "the last turn is empty; a response needs text")
    margin = parsed.margin
    if margin is None and parsed.chosen_score is not None and parsed.rejected_score is not None:
        margin = parsed.chosen_score - parsed.rejected_score
        if margin < 0:
            raise refuse("chosen_score", f"{parsed.chosen_score} is below rejected_score {parsed.rejected_score}")
    return Preference.model_construct(
        prompt=prompt,
        responses=responses,
        margin=margin,
        subset=parsed.subset or "",
        shape=shape if parsed.ranked is None else f"{shape}, ranked",
        fields=tuple(fields.get(name, name) for name in names),
    )


def _separate_prompt(
    prompt: str | Turns | None, responses: Sequence[Any]
) -> tuple[str | Turns, tuple[str | Turns, ...], str]:
    """Finds the prompt where the responses contain it, and says which shape that is."""
    texts = all(isinstance(response, str) for response in responses)
    if prompt is not None:
        opening = (Turn(role="user", content=prompt),) if isinstance(prompt, str) else prompt
        if (
            not texts
            and opening
            and all(
                not isinstance(response, str) and len(response) > len(opening) and response[: len(opening)] == opening
                for response in responses
            )
        ):
            # Many data sets state the prompt by itself and again in the turns of each response.
            responses = [response[len(opening) :] for response in responses]
        kind = "standard" if texts and isinstance(prompt, str) else "conversational"
        return prompt, tuple(responses), f"{kind}, explicit prompt"
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
    # The last turn of each is what is judged, even where all say the same.
    shared = min(len(turns) for turns in responses) - 1
    while any(turns[:shared] != responses[0][:shared] for turns in responses):
        shared -= 1
    return responses[0][:shared], tuple(tuple(turns[shared:]) for turns in responses), shape


def _turns_of(transcript: str) -> Turns:
    pieces = TRANSCRIPT_TURN.split(transcript)[1:]
    return tuple(
        Turn(role=ROLE_OF_SPEAKER[speaker], content=text.strip())
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    )


def _shared_words(texts: Sequence[str]) -> int:
    """Characters of the beginning that texts share, cut back to the end of a word; none is left empty."""
    shortest = min(len(text) for text in texts)
    shared = next((n for n in range(shortest) if len({text[n] for text in texts}) > 1), shortest)
    if shared == shortest and any(len(text) > shared for text in texts):
        shared -= 1
    elif shared == shortest:
        return 0  # identical texts: nothing tells where a prompt would end
    beginning = texts[0][:shared]
    return max((beginning.rfind(space) for space in " \n\t"), default=-1) + 1 if shared else 0
