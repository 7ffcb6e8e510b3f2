"""What goes over HTTP between callers and scorers: requests, answers and errors, as pydantic models.

The server validates with them and its OpenAPI document is made of them; the client writes and reads them. Knows nothing
of sockets, and nothing of how a score comes about.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring.items import Conversation, Item, Scores, Text

Name: TypeAlias = Annotated[StrictStr, Field(min_length=1)]
TokenId: TypeAlias = Annotated[StrictInt, Field(ge=0, lt=2**31)]
T = TypeVar("T")
# Lists of a request end at their first error: one for each of a million entries takes seconds, and half a gigabyte.
ListOf: TypeAlias = Annotated[list[T], Field(fail_fast=True)]
Nonempty: TypeAlias = Annotated[list[T], Field(fail_fast=True, min_length=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TurnModel(_Message):
    """One message of a conversation."""

    role: Name
    content: StrictStr


class ConversationModel(_Message):
    """A prompt and the response to be judged, which may be empty."""

    prompt: StrictStr | ListOf[TurnModel]
    response: StrictStr

    def to_item(self) -> Item:
        """As `rlhf_critic.scoring.items` has it."""
        prompt = self.prompt if isinstance(self.prompt, str) else [turn.model_dump() for turn in self.prompt]
        return Conversation(prompt, self.response)


def conversation_of(messages: list[TurnModel]) -> Conversation:
    """A chat as a prompt and the response to be judged.

    Raises:
        ScorerRejected: Its last turn is not the assistant's.
    """
    *before, last = messages
    if last.role != "assistant":
        raise ScorerRejected("no_response", f"messages: the last turn is to be judged, and is the {last.role[:40]}'s")
    return Conversation([turn.model_dump() for turn in before], last.content)


class ChatModel(_Message):
    """A conversation whose last turn, the assistant's, is to be judged."""

    messages: Nonempty[TurnModel]

    def to_item(self) -> Item:
        """As `rlhf_critic.scoring.items` has it."""
        return conversation_of(self.messages)


class TextModel(_Message):
    """A finished text, with what the chat template puts around its parts; ``response`` is its end, if given.

    With ``finish`` its end is put right first: pad and EOS tokens go, and the critic's own ending comes.
    """

    text: Name
    response: StrictStr | None = None
    finish: bool = Field(False, strict=True)

    def to_item(self) -> Item:
        """As `rlhf_critic.scoring.items` has it."""
        return Text(self.text, self.response, self.finish)


class TokensModel(_Message):
    """Token ids of the critic's own tokenizer."""

    token_ids: Nonempty[TokenId]

    def to_item(self) -> Item:
        """As `rlhf_critic.scoring.items` has it."""
        return np.asarray(self.token_ids, dtype=np.int64)


ItemModel: TypeAlias = ConversationModel | ChatModel | TextModel | TokensModel


class ScoreRequest(_Message):
    """What ``POST /score`` takes."""

    items: Nonempty[ItemModel]
    values: bool = Field(False, strict=True, description="Answer with the value at every token too.")
    version: Name | None = Field(None, description="Answer only if this is the version that is served.")

    @classmethod
    def of(cls, items: list[Item], values: bool, version: str | None) -> dict[str, Any]:
        """The request for some items, as JSON takes it; the server checks it."""
        return {"items": [_item_to_json(item) for item in items], "values": values, "version": version}


class ScoreResponse(_Message):
    """What it answers; every list has an entry for each item."""

    model_version: str
    rewards: list[float]
    truncated: list[bool] = Field(description="Whether an item lost its beginning to the critic's length limit.")
    tokens: list[int] = Field(description="Tokens that the critic read.")
    components: dict[str, list[float]] = Field(
        description="Each component of the reward before its weight, if several."
    )
    values: list[list[float]] | None = Field(None, description="The value at every token, if asked for.")

    @classmethod
    def of(cls, scores: Scores) -> ScoreResponse:
        """The answer with some scores."""
        return cls(
            model_version=scores.model_version,
            rewards=scores.rewards_S.tolist(),
            truncated=scores.truncated_S.tolist(),
            tokens=scores.tokens_S.tolist(),
            components={name: value_S.tolist() for name, value_S in scores.components.items()},
            values=None if scores.values is None else [values.tolist() for values in scores.values],
        )

    def to_scores(self) -> Scores:
        """What was answered. Numbers written for fp32 are read back exactly."""
        return Scores(
            rewards_S=np.array(self.rewards, dtype=np.float32),
            model_version=self.model_version,
            truncated_S=np.array(self.truncated, dtype=np.bool_),
            tokens_S=np.array(self.tokens, dtype=np.int64),
            components={name: np.array(values, dtype=np.float32) for name, values in self.components.items()},
            values=None if self.values is None else tuple(np.array(values, dtype=np.float32) for values in self.values),
        )


class GetRewardRequest(BaseModel):
    """What OpenRLHF's ``remote_rm_url`` clients send; fields that other versions add are left alone."""

    model_config = ConfigDict(extra="ignore")
    query: StrictStr | ListOf[StrictStr] = Field(description="Finished texts: prompt and response together.")
    prompts: StrictStr | ListOf[StrictStr] | None = Field(None, description="Their beginnings, where known.")
    labels: Any = Field(None, description="Taken, and not used.")


class GetRewardResponse(_Message):
    """What they read: a list each, in the order of ``query``."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
    model_version: str


class ClassifyRequest(BaseModel):
    """What vLLM's classification endpoint takes: texts, token ids, or one conversation."""

    model_config = ConfigDict(extra="ignore")
    model: StrictStr | None = Field(None, description="If given, the version that must be served.")
    input: StrictStr | ListOf[StrictStr] | Nonempty[TokenId] | ListOf[ListOf[TokenId]] | None = None
    messages: Nonempty[TurnModel] | None = None


class ClassifyDatum(_Message):
    """One classified text: the reward stands where a classifier's single probability would."""

    index: int
    label: str
    probs: list[float]
    num_classes: Literal[1] = 1


class Usage(_Message):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyResponse(_Message):
    """What it answers."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifyDatum]
    usage: Usage


class ErrorDetail(_Message):
    """What went wrong."""

    kind: str = Field(description="A word for the reason, for programs.")
    message: str = Field(description="The reason and what to do, for people.")
    item: int | None = Field(None, description="The index of the item at fault, where it is one.")


class ErrorResponse(_Message):
    """Every answer that is not a success."""

    error: ErrorDetail


class HealthResponse(_Message):
    """The scorers are warm."""

    status: Literal["ready"] = "ready"
    model_version: str


class LimitsModel(_Message):
    """What one call may ask."""

    max_items: int
    max_text_bytes: int
    max_tokens: int
    max_body_bytes: int


class InfoResponse(_Message):
    """What is served."""

    model_version: str
    fingerprint: str
    max_length: int
    normalized: bool
    components: dict[str, float]
    limits: LimitsModel


def _item_to_json(item: Item) -> dict[str, Any]:
    if isinstance(item, Conversation):
        return {"prompt": item.prompt, "response": item.response}
    if isinstance(item, Text):
        return {"text": item.text, "response": item.response, "finish": item.finish}
    return {"token_ids": np.asarray(item).tolist()}
