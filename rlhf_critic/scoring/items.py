"""Items to score, their encoding within limits, and scores.

An item is a conversation (a prompt and a response), a finished text, or token ids. `encode_items` encodes all three
with the `Encoder` of training, so the same text has the same ids and the same reward in every form. It rejects items
that a critic cannot score, with a distinct ``kind`` for each reason. Knows nothing about models, networks or Ray.

Shape legend: S items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.batching.prefix_cache import PrefixCacheFigures
from rlhf_critic.errors import EncodingError, ScorerRejected

if TYPE_CHECKING:  # clients need neither torch nor transformers
    from rlhf_critic.batching.prefix_tree import TokenIds
    from rlhf_critic.config.serve import CallLimits
    from rlhf_critic.data.conversation import Prompt, Reply, Turn
    from rlhf_critic.data.encoding import Encoded, Encoder, Rendered


class Conversation(NamedTuple):
    """A prompt (a text, or turns with ``role`` and ``content``) and the assistant's response to it.

    The response is a text, or a whole turn with ``tool_calls`` or other fields. A text may be empty, because a policy
    may end at once. A prompt with tools is a `rlhf_critic.data.conversation.ToolPrompt`.
    """

    prompt: Prompt
    response: Reply


class Text(NamedTuple):
    """A finished text, in the form that `Encoder.render` gives a conversation.

    It is tokenised unchanged, without the tokens that pad it; see `Encoder.without_padding`.

    Attributes:
        text: The whole text.
        response: The response at the end of the text, if known. Components other than the critic need it.
        finish: Whether to replace the text's end with the critic's ending; see `Encoder.without_ending`.
    """

    text: str
    response: str | None = None
    finish: bool = False


class Adjusted(NamedTuple):
    """An item with further wishes of an HTTP client.

    Attributes:
        item: The item.
        begin: Whether to begin a text with BOS, if the critic's texts begin so and this one does not.
        last_tokens: Number of last tokens to keep. None keeps as many as the critic reads.
        token_texts: Whether to answer the text of each token.
    """

    item: Conversation | Text | TokenIds
    begin: bool = False
    last_tokens: int | None = None
    token_texts: bool = False

    def begun(self, bos_token: str) -> Conversation | Text | TokenIds:
        """Returns the item alone. ``bos_token`` begins the critic's texts; empty if they begin without one."""
        if not (self.begin and bos_token and isinstance(self.item, Text)) or self.item.text.startswith(bos_token):
            return self.item
        return self.item._replace(text=bos_token + self.item.text)

    def shortened(self, encoded: Encoded) -> Encoded:
        """Returns the last of the item's tokens."""
        if self.last_tokens is None or self.last_tokens >= len(encoded.ids):
            return encoded
        return dataclasses.replace(encoded, ids=encoded.ids[-self.last_tokens :], truncated=True)


Item: TypeAlias = "Conversation | Text | TokenIds | Adjusted"

NOT_LISTS = (str, bytes, bytearray, memoryview)  # sequences in Python, but not lists of ids or turns


@dataclass(frozen=True)
class ScorerInfo:
    """Description of a scorer.

    Attributes:
        model_version: Version of the critic it serves; every answer names it.
        checkpoint: Path or URI of that critic.
        fingerprint: Fingerprint of its encoding.
        max_length: Maximum tokens of a sequence that the critic reads.
        limits: Limits of one call.
        normalized: Whether rewards are normalised to the scale of the critic's reference responses.
        components: Weights of the reward's components, by name.
        prefix_cache: Figures of its prefix cache; None without one.
    """

    model_version: str
    checkpoint: str
    fingerprint: str
    max_length: int
    limits: CallLimits
    normalized: bool
    components: dict[str, float]
    prefix_cache: PrefixCacheFigures | None = None


@dataclass(frozen=True)
class Scores:
    """The answer to one call.

    Attributes:
        rewards_S: Rewards, fp32; the weighted sum if there are several components.
        model_version: Version of the critic that scored.
        truncated_S: Whether each item was truncated from the left to the critic's length limit, bool.
        tokens_S: Tokens of each item that the critic read, int64.
        components: Unweighted value of each component, fp32 ``[S]``; empty if the critic is the only component.
        values: Value at every token of each item, fp32, never normalised; None if not requested.
        token_texts: Text of every token of each item; see `Encoder.token_texts`. None if not requested.
        stds_S: Standard deviation of the critic's reward of each item, fp32, normalised like it; None if the critic is
            not calibrated.
    """

    rewards_S: NDArray[np.float32]
    model_version: str
    truncated_S: NDArray[np.bool_]
    tokens_S: NDArray[np.int64]
    components: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    values: tuple[NDArray[np.float32], ...] | None = None
    token_texts: tuple[tuple[str, ...], ...] | None = None
    stds_S: NDArray[np.float32] | None = None

    def logs(self) -> dict[str, NDArray[np.float32]]:
        """Returns the components, and ``std`` if the critic is calibrated, for logs of other trainers."""
        return self.components if self.stds_S is None else {**self.components, "std": self.stds_S}


def conversations(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Conversation]:
    """Pairs prompts with their responses.

    Raises:
        ScorerRejected: The lists differ in length, or one of them is a single text.
    """
    if isinstance(prompts, str) or isinstance(responses, str):
        raise ScorerRejected(
            "not_a_list", "prompts and responses must be lists of equal length; write a single one as a list of one"
        )
    if len(prompts) != len(responses):
        raise ScorerRejected(
            "unequal_lengths", f"{len(prompts)} prompts and {len(responses)} responses: give one prompt per response"
        )
    return [Conversation(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def finish_items(items: Sequence[Item], encoder: Encoder, limits: CallLimits) -> list[Item]:
    """Removes the padding of texts, and replaces the ends of texts with ``finish`` by the critic's ending.

    Other items stay unchanged. So do texts beyond the size limit, which `encode_items` rejects.
    """

    def finish(item: Item) -> Item:
        if not (isinstance(item, Text) and isinstance(item.text, str)):
            return item
        if max(len(part) for part in (item.text, item.response) if isinstance(part, str)) > limits.max_text_bytes:
            return item
        text, response = encoder.without_padding(item.text), item.response
        if text != item.text or item.finish:
            # The response has the same end as its text, and is compared without it.
            response = encoder.without_ending(response) if isinstance(response, str) else response
        if item.finish:
            body = encoder.without_ending(text)
            text = body + encoder.ending if body else ""
        return Text(text, response)

    return [finish(item) for item in items]


def encode_items(items: Sequence[Item], encoder: Encoder, limits: CallLimits) -> list[Encoded]:
    """Returns the token ids of items. They do not depend on the other items of the call.

    Raises:
        ScorerRejected: There is no item, or too many. Or an item has an unknown type, is empty or too long, fails in
            the chat template, or has ids outside the vocabulary. The message names the item's index.
    """
    from rlhf_critic.data.encoding import Encoded  # loaded already: the caller has an encoder

    if len(items) == 0:
        raise ScorerRejected("no_items", "there is nothing to score: give at least one item")
    if len(items) > limits.max_items:
        raise ScorerRejected(
            "too_many_items", f"{len(items)} items in one call, maximum {limits.max_items}: split the call"
        )
    texts: dict[int, str | Rendered] = {}
    encoded: dict[int, Encoded] = {}
    for index, item in enumerate(items):
        if isinstance(item, Conversation):
            texts[index] = _render(index, item, encoder, limits)
        elif isinstance(item, Text):
            _check_text(index, item.text, limits)
            if not isinstance(item.response, str | None):
                raise _rejected("not_text", index, f": a response must be a text, not {_kind(item.response)}")
            if item.response:
                _check_text(index, item.response, limits)
            texts[index] = encoder.render_finished(item.text, item.response)
        else:
            encoded[index] = Encoded(_check_ids(index, item, encoder), truncated=False)
    try:
        all_ids = encoder.tokenize(list(texts.values()))
    except EncodingError as error:
        raise _rejected("no_end", list(texts)[error.index or 0], f": {error}") from error
    for index, ids in zip(texts, all_ids, strict=True):
        if len(ids) > limits.max_tokens:
            raise _rejected(
                "too_many_tokens",
                index,
                f" has {len(ids)} tokens, maximum {limits.max_tokens}: shorten it; this critic reads its last "
                f"{encoder.max_length}",
            )
        encoded[index] = encoder.truncate(ids)
    return [encoded[index] for index in range(len(items))]


def _render(index: int, item: Conversation, encoder: Encoder, limits: CallLimits) -> Rendered:
    from rlhf_critic.data.conversation import text_of, to_prompt, tools_of, turns_of

    prompt, response = item.prompt, item.response
    if not isinstance(response, str):
        if not isinstance(response, Mapping):
            raise _rejected("not_text", index, f": a response must be a text or a turn, not {_kind(response)}")
        (turn,) = _validated(index, [response], "a response")
        if turn.role != "assistant":
            raise _rejected("no_response", index, f": the response is a turn of {turn.role!r}, not of the assistant")
        response = turn.to_reply()
    if not isinstance(prompt, str):
        tools = tools_of(prompt)
        turns = prompt.turns if tools else prompt  # type: ignore[union-attr]
        prompt = to_prompt(_validated(index, turns, "a prompt"), tools)
    texts = [prompt] if isinstance(prompt, str) else [text_of(turn) for turn in turns_of(prompt)]
    if isinstance(response, str):
        _check_text(index, "".join([*texts, response]), limits)
    try:
        rendered = encoder.render_conversation(prompt, response)
    except EncodingError as error:
        raise _rejected("template_refused", index, f": {error}") from error
    _check_text(index, rendered.text, limits)  # counts roles and other fields that the template renders
    return rendered


def _validated(index: int, turns: Any, what: str) -> list[Turn]:
    from pydantic import ValidationError

    from rlhf_critic.data.conversation import Turn

    # An iterator would be exhausted before it is rendered, and other empty values would count as an empty prompt.
    is_list = isinstance(turns, Sequence | np.ndarray) and not isinstance(turns, NOT_LISTS)
    is_list = is_list and getattr(turns, "ndim", 1) == 1
    if not is_list or not all(isinstance(turn, Mapping) for turn in turns):
        raise _rejected("not_text", index, ": a prompt must be a text, or a list of turns with 'role' and 'content'")
    validated = []
    for turn in turns:
        if turn.keys() == {"role", "content"} and all(isinstance(part, str) for part in turn.values()):
            validated.append(Turn.model_construct(**turn))  # most turns are plain
            continue
        try:
            validated.append(Turn.model_validate(dict(turn)))
        except ValidationError as error:
            first = max(error.errors(), key=lambda found: len(found["loc"]))
            field = ".".join(str(part) for part in first["loc"][:1])
            raise _rejected("not_text", index, f": {what}: field {field!r} of a turn: {first['msg']}") from error
    return validated


def _check_text(index: int, text: Any, limits: CallLimits) -> None:
    if not isinstance(text, str):
        raise _rejected("not_text", index, f": must be a text, not {_kind(text)}")
    if not text:
        raise _rejected("empty_text", index, " is empty: there is nothing to score")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise _rejected("not_unicode", index, f" holds half of a surrogate pair: {error}; remove it") from error
    if size > limits.max_text_bytes:
        raise _rejected("text_too_long", index, f" has {size} bytes, maximum {limits.max_text_bytes}: shorten it")


def _check_ids(index: int, item: Any, encoder: Encoder) -> list[int]:
    try:
        ids = np.asarray(None if isinstance(item, NOT_LISTS) else item)  # bytes would be read as ids
    except Exception as error:  # an item's own conversion may raise anything; a tensor with a gradient does
        raise _rejected("not_text", index, f": {_kind(item)} cannot be scored; give a text or token ids") from error
    if ids.size == 0 and ids.ndim == 1:
        raise _rejected("empty_text", index, " has no token ids: there is nothing to score")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise _rejected("not_text", index, f" must be a Conversation, a Text or a list of token ids, not {_kind(item)}")
    if ids.min() < 0 or ids.max() >= len(encoder.tokenizer):
        raise _rejected(
            "bad_token_id",
            index,
            f": token id {ids[(ids < 0) | (ids >= len(encoder.tokenizer))][0]} is not in the critic's "
            f"vocabulary of {len(encoder.tokenizer)}: use the critic's own tokenizer",
        )
    if ids[-1] == encoder.tokenizer.pad_token_id:
        raise _rejected("no_end", index, " ends with the pad token: remove the padding")
    kept = encoder.without_ignored_end([int(token) for token in ids])
    if not kept:
        raise _rejected("no_end", index, " has no token but the model's pad token: there is nothing to score")
    if len(kept) > encoder.max_length:
        raise _rejected(
            "too_many_tokens",
            index,
            f" has {len(kept)} token ids, maximum {encoder.max_length}: give the last {encoder.max_length}",
        )
    return kept


def _rejected(kind: str, index: int, reason: str) -> ScorerRejected:
    return ScorerRejected(kind, f"item {index}{reason}", index)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
