"""HTTP requests, answers and errors of the scorers, as pydantic models.

The server validates with them and builds its OpenAPI document from them. The client parses answers with them. Knows
nothing about sockets or the computation of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from rlhf_critic.data.conversation import Turn, to_prompt
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring.items import Conversation, Item, Scores, Text

Name: TypeAlias = Annotated[StrictStr, Field(min_length=1)]
TokenId: TypeAlias = Annotated[StrictInt, Field(ge=0, lt=2**31)]
T = TypeVar("T")
# Validation of a list stops at its first error and at its maximum length. A million of either would take seconds and
# half a gigabyte.
MAX_ENTRIES, MAX_TOKENS = 2**16, 2**20
ListOf: TypeAlias = Annotated[list[T], Field(fail_fast=True, max_length=MAX_ENTRIES)]
Nonempty: TypeAlias = Annotated[list[T], Field(fail_fast=True, min_length=1, max_length=MAX_ENTRIES)]
Ids: TypeAlias = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS)]
SomeIds: TypeAlias = Annotated[Ids, Field(min_length=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ConversationModel(_Message):
    """A prompt and the response to score. The response may be empty."""

    prompt: StrictStr | ListOf[Turn]
    response: StrictStr

    def to_item(self) -> Item:
        """Converts to the item of `rlhf_critic.scoring.items`."""
        return Conversation(to_prompt(self.prompt), self.response)


def conversation_of(messages: Sequence[Turn]) -> Conversation:
    """Splits a chat into a prompt and the response to score.

    Raises:
        ScorerRejected: The last turn is not the assistant's.
    """
    *before, last = messages
    if last.role != "assistant":
        raise ScorerRejected(
            "no_response", f"messages: the last turn must have the role 'assistant', not {last.role[:40]!r}"
        )
    return Conversation(to_prompt(before), last.content)


class ChatModel(_Message):
    """A conversation. Its last turn, by the assistant, is scored."""

    messages: Nonempty[Turn]

    def to_item(self) -> Item:
        """Converts to the item of `rlhf_critic.scoring.items`."""
        return conversation_of(self.messages)


class TextModel(_Message):
    """A finished text, already rendered with the chat template. ``response``, if given, is its end.

    With ``finish``, the critic's own ending replaces pad and EOS tokens at its end.
    """

    text: Name
    response: StrictStr | None = None
    finish: bool = Field(False, strict=True)

    def to_item(self) -> Item:
        """Converts to the item of `rlhf_critic.scoring.items`."""
        return Text(self.text, self.response, self.finish)


class TokensModel(_Message):
    """Token ids of the critic's own tokenizer."""

    token_ids: SomeIds

    def to_item(self) -> Item:
        """Converts to the item of `rlhf_critic.scoring.items`."""
        return np.asarray(self.token_ids, dtype=np.int64)


ItemModel: TypeAlias = ConversationModel | ChatModel | TextModel | TokensModel


def _item_to_json(item: Item) -> dict[str, Any]:
    # The fields of a conversation and of a text have the names of their models.
    return item._asdict() if isinstance(item, Conversation | Text) else {"token_ids": np.asarray(item).tolist()}


class ScoreRequest(_Message):
    """Body of ``POST /score``."""

    items: Nonempty[ItemModel]
    values: bool = Field(False, strict=True, description="Also return the value at every token.")
    version: Name | None = Field(None, description="Answer only if this version is served.")

    @classmethod
    def of(cls, items: list[Item], values: bool, version: str | None) -> dict[str, Any]:
        """Returns the request for some items as values for JSON. The server validates it."""
        return {"items": [_item_to_json(item) for item in items], "values": values, "version": version}


class ScoreResponse(_Message):
    """Answer of ``POST /score``. Every list has one entry per item."""

    model_config = ConfigDict(extra="forbid", strict=True)  # a number in quotes is no reward
    model_version: str
    rewards: list[float]
    truncated: list[bool] = Field(description="Whether the item was truncated from the left to the length limit.")
    tokens: list[int] = Field(description="Number of tokens that the critic read.")
    components: dict[str, list[float]] = Field(
        description="Unweighted value of each reward component, if there are several."
    )
    values: list[list[float]] | None = Field(None, description="Value at every token, if requested.")

    @classmethod
    def of(cls, scores: Scores) -> ScoreResponse:
        """Converts scores to the answer."""
        return cls(
            model_version=scores.model_version,
            rewards=scores.rewards_S.tolist(),
            truncated=scores.truncated_S.tolist(),
            tokens=scores.tokens_S.tolist(),
            components={name: value_S.tolist() for name, value_S in scores.components.items()},
            values=None if scores.values is None else [values.tolist() for values in scores.values],
        )

    def to_scores(self) -> Scores:
        """Converts the answer to scores. Numbers written from fp32 are restored exactly, others may overflow."""

        def fp32(numbers: list[float]) -> NDArray[np.float32]:
            with np.errstate(over="ignore"):  # infinity, which the client rejects
                return np.array(numbers, dtype=np.float64).astype(np.float32)

        return Scores(
            rewards_S=fp32(self.rewards),
            model_version=self.model_version,
            truncated_S=np.array(self.truncated, dtype=np.bool_),
            tokens_S=np.array(self.tokens, dtype=np.int64),
            components={name: fp32(values) for name, values in self.components.items()},
            values=None if self.values is None else tuple(fp32(values) for values in self.values),
        )


class GetRewardRequest(BaseModel):
    """Body that OpenRLHF's ``remote_rm_url`` clients send. Fields that other versions add are ignored."""

    model_config = ConfigDict(extra="ignore")
    query: StrictStr | ListOf[StrictStr] = Field(description="Finished texts: prompt and response together.")
    prompts: StrictStr | ListOf[StrictStr] | None = Field(None, description="Prompt at the start of each query.")
    labels: Any = Field(None, description="Accepted for compatibility and ignored.")


class GetRewardResponse(_Message):
    """Answer that OpenRLHF's clients read. Lists are in the order of ``query``."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
    model_version: str


class ClassifyRequest(BaseModel):
    """Body of vLLM's classification endpoint: texts, token ids, or one conversation."""

    model_config = ConfigDict(extra="ignore")
    model: StrictStr | None = Field(None, description="If given, answer only if this version is served.")
    input: StrictStr | ListOf[StrictStr] | SomeIds | ListOf[Ids] | None = None
    messages: Nonempty[Turn] | None = None


class ClassifyDatum(_Message):
    """One classified text. ``probs`` holds the reward in place of a classifier's probability."""

    index: int
    label: str
    probs: list[float]
    num_classes: Literal[1] = 1


class Usage(_Message):
    """Numbers of tokens read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ClassifyResponse(_Message):
    """Answer of vLLM's classification endpoint."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifyDatum]
    usage: Usage


class ErrorDetail(_Message):
    """Reason of a failure."""

    kind: str = Field(description="Machine-readable name of the reason.")
    message: str = Field(description="Human-readable reason and next step.")
    item: int | None = Field(None, description="Index of the item at fault, if one item is.")


class ErrorResponse(_Message):
    """Answer of every unsuccessful request."""

    error: ErrorDetail


class HealthResponse(_Message):
    """Answer of ``GET /health`` if a scorer is ready."""

    status: Literal["ready"] = "ready"
    model_version: str


class LimitsModel(_Message):
    """Limits of one call."""

    max_items: int
    max_text_bytes: int
    max_tokens: int
    max_body_bytes: int


class ReplicaModel(_Message):
    """One replica of the pool, by its last report."""

    replica: str
    model_version: str
    is_current: bool = Field(description="Whether it serves the critic that was published last.")


class InfoResponse(_Message):
    """Answer of ``GET /info``."""

    model_version: str
    fingerprint: str
    max_length: int
    normalized: bool
    components: dict[str, float]
    limits: LimitsModel
    replicas: list[ReplicaModel]
