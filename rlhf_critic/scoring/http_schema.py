"""HTTP requests, answers and errors of the scorers, as pydantic models.

The server validates with them and builds its OpenAPI document from them. The client parses answers with them. Knows
nothing about sockets or the computation of scores.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator

from rlhf_critic.data.conversation import ToolPrompt, Tools, Turn, to_prompt, turns_of
from rlhf_critic.errors import ScorerRejected
from rlhf_critic.scoring.items import Adjusted, Conversation, Item, Scores, Text

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
    response: StrictStr | Turn = Field(description="Text of the last turn, or the whole turn, with its tool_calls.")
    tools: Tools = Field((), description="JSON schemas of the tools that the assistant may call.")

    def to_item(self) -> Item:
        """Converts to the item of `rlhf_critic.scoring.items`."""
        response = self.response if isinstance(self.response, str) else self.response.to_reply()
        return Conversation(to_prompt(self.prompt, self.tools), response)


def check_response(role: str) -> None:
    """Checks that the last turn of a chat, which is scored, is the assistant's.

    Raises:
        ScorerRejected: It is another's.
    """
    if role != "assistant":
        raise ScorerRejected(
            "no_response", f"messages: the last turn must have the role 'assistant', not {role[:40]!r}"
        )


def conversation_of(messages: Sequence[Turn], tools: Tools = ()) -> Conversation:
    """Splits a chat into a prompt and the response to score.

    Raises:
        ScorerRejected: The last turn is not the assistant's.
    """
    *before, last = messages
    check_response(last.role)
    return Conversation(to_prompt(before, tools), last.to_reply())


class ChatModel(_Message):
    """A conversation. Its last turn, by the assistant, is scored."""

    messages: Nonempty[Turn]
    tools: Tools = Field((), description="JSON schemas of the tools that the assistant may call.")

    def to_item(self) -> Item:
        """Converts to the item of `rlhf_critic.scoring.items`."""
        return conversation_of(self.messages, self.tools)


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
    if isinstance(item, Conversation) and isinstance(item.prompt, ToolPrompt):
        return {"prompt": turns_of(item.prompt), "response": item.response, "tools": item.prompt.tools}
    # The fields of a conversation and of a text have the names of their models.
    return item._asdict() if isinstance(item, Conversation | Text) else {"token_ids": np.asarray(item).tolist()}


class ScoreRequest(_Message):
    """Body of ``POST /score``."""

    items: Nonempty[ItemModel]
    values: bool = Field(False, strict=True, description="Also return the value at every token.")
    token_texts: bool = Field(False, strict=True, description="Also return the text of every token.")
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
    token_texts: list[list[str]] | None = Field(
        None,
        description="Text of every token, if requested. Of the tokens of one character only the last has a text.",
    )
    stds: list[float] | None = Field(
        None, description="Standard deviation of the critic's reward; null if the critic is not calibrated."
    )

    @classmethod
    def of(cls, scores: Scores) -> ScoreResponse:
        """Converts scores to the answer."""
        more: dict[str, Any] = {
            "token_texts": None if scores.token_texts is None else list(map(list, scores.token_texts)),
            "stds": None if scores.stds_S is None else scores.stds_S.tolist(),
        }
        return cls(
            model_version=scores.model_version,
            rewards=scores.rewards_S.tolist(),
            truncated=scores.truncated_S.tolist(),
            tokens=scores.tokens_S.tolist(),
            components={name: value_S.tolist() for name, value_S in scores.components.items()},
            values=None if scores.values is None else [values.tolist() for values in scores.values],
            # Unset if there are none, because earlier clients reject fields that they do not know.
            **{name: value for name, value in more.items() if value is not None},
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
            token_texts=None if self.token_texts is None else tuple(map(tuple, self.token_texts)),
            stds_S=None if self.stds is None else fp32(self.stds),
        )


class GetRewardRequest(BaseModel):
    """Body that clients of OpenRLHF (``query``) and LLaMA-Factory (``messages``) send. Further fields are ignored."""

    model_config = ConfigDict(extra="ignore")
    query: StrictStr | ListOf[StrictStr] = Field(
        validation_alias=AliasChoices("query", "messages"),
        description="Finished texts: prompt and response together.",
    )
    prompts: StrictStr | ListOf[StrictStr] | None = Field(None, description="Prompt at the start of each query.")
    labels: Any = Field(None, description="Accepted for compatibility and ignored.")


class GetRewardResponse(_Message):
    """Answer that clients of OpenRLHF and LLaMA-Factory read. Lists are in the order of ``query``."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
    truncated: list[bool] = Field([], description="Whether each query was truncated from the left.")
    model_version: str


class ClassifyRequest(BaseModel):
    """Body of vLLM's classification endpoint: texts, token ids, or one conversation."""

    model_config = ConfigDict(extra="ignore")
    model: StrictStr | None = Field(None, description="Any name. The answer repeats it.")
    version: Name | None = Field(None, description="Answer only if this version is served.")
    input: StrictStr | ListOf[StrictStr] | SomeIds | ListOf[Ids] | None = None
    messages: Nonempty[Turn] | None = None
    tools: Tools | None = Field(None, description="JSON schemas of the tools that the assistant may call.")
    use_activation: bool | None = Field(
        None,
        strict=True,
        validation_alias=AliasChoices("use_activation", "activation"),
        description="true answers the sigmoid of the reward. By default the answer is the reward itself.",
    )
    truncate_prompt_tokens: StrictInt | None = Field(
        None, ge=-1, description="Number of last tokens to read; -1 reads as many as the critic can."
    )
    add_special_tokens: bool = Field(
        True, strict=True, description="Begin a text with BOS, if the critic's texts begin so and this one does not."
    )

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _some_tokens(cls, count: int | None) -> int | None:
        if count == 0:
            raise ValueError("0 leaves nothing to score: give -1 or a positive number")
        return None if count == -1 else count

    def to_items(self) -> list[Item]:
        """Converts to items of `rlhf_critic.scoring.items`.

        Raises:
            ScorerRejected: There is not exactly one of input and messages, or the last turn is not the assistant's.
        """
        if (self.input is None) == (self.messages is None):
            raise ScorerRejected("no_items", "give either input or messages")
        items: list[Any]
        if self.messages is not None:
            items = [conversation_of(self.messages, self.tools or ())]
        elif isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            items = [self.input]
        else:
            items = list(self.input or [])
        items = [Text(item) if isinstance(item, str) else item for item in items]
        return [Adjusted(item, self.add_special_tokens, self.truncate_prompt_tokens) for item in items]


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
    model: str = Field(description="The request's model, else the served version.")
    model_version: str = ""
    data: list[ClassifyDatum]
    truncated: list[bool] = Field([], description="Whether each text was truncated from the left.")
    usage: Usage

    @classmethod
    def of(cls, request: ClassifyRequest, scores: Scores) -> ClassifyResponse:
        """Converts scores to the answer."""
        answers_S = scores.rewards_S
        if request.use_activation:
            answers_S = np.exp(-np.logaddexp(0.0, -answers_S.astype(np.float64)))  # the sigmoid, without overflow
        tokens = int(scores.tokens_S.sum())
        return cls(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model or scores.model_version,
            model_version=scores.model_version,
            data=[
                ClassifyDatum(index=index, label="LABEL_0", probs=[answer])
                for index, answer in enumerate(answers_S.tolist())
            ],
            truncated=scores.truncated_S.tolist(),
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )


class ServedModel(_Message):
    """A model as OpenAI's clients list it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "rlhf-critic"
    max_model_len: int


class ModelsResponse(_Message):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class ErrorDetail(_Message):
    """Reason of a failure."""

    kind: str = Field(description="Machine-readable name of the reason.")
    message: str = Field(description="Human-readable reason and next step.")
    item: int | None = Field(None, description="Index of the item at fault, if one item is.")
    type: str = Field("", description="Class of the error, as clients of OpenAI and vLLM name it.")
    param: str | None = Field(None, description="Field of the request at fault, if one is.")
    code: int = Field(0, description="HTTP status of the answer.")


class ErrorResponse(_Message):
    """Answer of every unsuccessful request."""

    error: ErrorDetail


class HealthResponse(_Message):
    """Answer of ``GET /health`` if a scorer is ready."""

    status: Literal["ready"] = "ready"
    model_version: str


class JudgementRequest(_Message):
    """Body of ``POST /judgements``: the better and the worse of two answers to a prompt."""

    prompt: StrictStr | ListOf[Turn]
    chosen: Name
    rejected: Name
    judge: Annotated[StrictStr, Field(max_length=200)] = Field("", description="Name of the person who judged.")


class JudgementResponse(_Message):
    """Answer of ``POST /judgements`` when the preference was saved."""

    model_version: str
    chosen_reward: float
    rejected_reward: float


class LimitsModel(_Message):
    """Limits of one call."""

    max_items: int
    max_text_bytes: int
    max_tokens: int
    max_body_bytes: int


class ReplicaLoad(_Message):
    """Load of one replica since it started."""

    items: int = Field(description="Number of scored items.")
    tokens: int = Field(description="Tokens of scored sequences, each counted separately.")
    computed_tokens: int = Field(description="Tokens computed, shared prefixes counted once.")
    queue: int = Field(description="Calls that waited when the last micro-batch was done.")
    latency_s: dict[str, float] = Field(
        description="Percentiles of the latest calls' seconds from arrival to answer: p50, p90, p99; empty at first."
    )


class PublishedModel(_Message):
    """A version that the pool began to serve."""

    model_version: str
    at: float = Field(description="Time at which the first replica served it, in seconds since 1970.")


class ReplicaModel(_Message):
    """One replica of the pool, by its last report."""

    replica: str
    model_version: str
    is_current: bool = Field(description="Whether it serves the critic that was published last.")
    load: ReplicaLoad | None = Field(None, description="Load of the replica, by its last report.")


class PrefixCacheModel(_Message):
    """Prefix cache of the replica that describes the pool."""

    max_bytes: int
    bytes: int = Field(description="Bytes that are in use.")
    hit_tokens: int = Field(description="Tokens of scored sequences that the cache had, since the critic was loaded.")
    evicted_tokens: int = Field(description="Tokens that the cache evicted, since the critic was loaded.")


class InfoResponse(_Message):
    """Answer of ``GET /info``."""

    model_version: str
    fingerprint: str
    max_length: int
    normalized: bool
    components: dict[str, float]
    limits: LimitsModel
    replicas: list[ReplicaModel]
    prefix_cache: PrefixCacheModel | None = Field(None, description="null without a prefix cache.")
    collects: bool = Field(False, description="Whether the pool saves judgements.")
    published: list[PublishedModel] = Field([], description="Last published versions, the latest first.")
