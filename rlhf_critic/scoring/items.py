"""What can be asked of a critic and what it answers: items to score, their encoding within limits, scores.

An item is a conversation (a prompt and a response), a finished text, or token ids. Training encodes conversations;
`encode_items` encodes all three with the same `Encoder`, so that the same text has the same ids and the same reward
whichever way it comes. What a critic must not be asked is refused here, with a word for each reason. Knows nothing of
models, networks or Ray.

Shape legend: S items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from rlhf_critic.errors import EncodingError, ScorerRejected

if TYPE_CHECKING:  # whoever only asks needs neither torch nor transformers
    from rlhf_critic.batching.prefix_tree import TokenIds
    from rlhf_critic.data.conversation import Prompt
    from rlhf_critic.data.encoding import Encoded, Encoder


class Conversation(NamedTuple):
    """A prompt (a text, or turns with ``role`` and ``content``) and the assistant's response to it.

    The response may be empty: a policy that says nothing has said something.
    """

    prompt: Prompt
    response: str


class Text(NamedTuple):
    """A finished text, tokenised as it stands: what `Encoder.render` makes of a conversation.

    Attributes:
        text: The whole text.
        response: The end of it that is the response, where that is known; components other than the critic need it.
        finish: Whether the text is a policy's, whose end is to be put right; see `Encoder.without_ending`.
    """

    text: str
    response: str | None = None
    finish: bool = False


Item: TypeAlias = "Conversation | Text | TokenIds"

NOT_LISTS = (str, bytes, bytearray, memoryview)  # although Python takes them for sequences


@dataclass(frozen=True)
class Limits:
    """What one call may ask.

    Attributes:
        max_items: Items of a call.
        max_text_bytes: UTF-8 bytes of an item's text, prompt included.
        max_tokens: Tokens of an item's text. Between the encoder's ``max_length`` and this it loses its beginning, as
            in training, and that is reported; beyond, it is refused.
    """

    max_items: int = 1024
    max_text_bytes: int = 512 * 1024
    max_tokens: int = 32768


@dataclass(frozen=True)
class ScorerInfo:
    """What a scorer says of itself.

    Attributes:
        model_version: The critic it serves; every answer names it.
        checkpoint: Where that was loaded from.
        fingerprint: Of its encoding.
        max_length: The most tokens of a sequence that it reads.
        limits: What a call may ask.
        normalized: Whether the critic's rewards are put on the scale of its reference responses.
        components: What a reward is the weighted sum of, by name, with weights.
    """

    model_version: str
    checkpoint: str
    fingerprint: str
    max_length: int
    limits: Limits
    normalized: bool
    components: dict[str, float]


@dataclass(frozen=True)
class Scores:
    """The answer to one call.

    Attributes:
        rewards_S: Rewards, fp32; the weighted sum where there are several components.
        model_version: Which critic gave them.
        truncated_S: Whether an item lost its beginning to the critic's length limit, bool.
        tokens_S: Tokens of each item that the critic read, int64.
        components: Each component by itself, fp32 ``[S]``, before its weight; empty where the critic is the only one.
        values: Where they were asked for, the value at every token of each item, fp32; never normalised.
    """

    rewards_S: NDArray[np.float32]
    model_version: str
    truncated_S: NDArray[np.bool_]
    tokens_S: NDArray[np.int64]
    components: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    values: tuple[NDArray[np.float32], ...] | None = None


def conversations(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Conversation]:
    """Pairs prompts with their responses.

    Raises:
        ScorerRejected: There are not as many of one as of the other, or one is a single text instead of a list.
    """
    if isinstance(prompts, str) or isinstance(responses, str):
        raise ScorerRejected(
            "not_a_list", "prompts and responses must be lists of equal length; put a single one in []"
        )
    if len(prompts) != len(responses):
        raise ScorerRejected(
            "unequal_lengths", f"{len(prompts)} prompts and {len(responses)} responses: give one prompt a response"
        )
    return [Conversation(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def finish_items(items: Sequence[Item], encoder: Encoder, limits: Limits) -> list[Item]:
    """Puts right the ends of texts that a policy wrote.

    Other items stay as they are, and so do those that `encode_items` refuses for their length, before it is worked on.
    """

    def is_to_finish(item: Item) -> TypeGuard[Text]:
        if not (isinstance(item, Text) and item.finish and isinstance(item.text, str)):
            return False
        longest = max(len(item.text), len(item.response) if isinstance(item.response, str) else 0)
        return longest <= limits.max_text_bytes

    return [_finish(item, encoder) if is_to_finish(item) else item for item in items]


def _finish(item: Text, encoder: Encoder) -> Text:
    text = encoder.without_ending(item.text)
    response = encoder.without_ending(item.response) if isinstance(item.response, str) else item.response
    return Text(text + encoder.ending if text else "", response)


def encode_items(items: Sequence[Item], encoder: Encoder, limits: Limits) -> list[Encoded]:
    """Token ids of items; those of an item do not depend on its neighbours.

    Raises:
        ScorerRejected: There is no item, or too many; or one of them is of an unknown kind, empty, too long, refused by
            the chat template, or has ids that the vocabulary has not. Names the item by its index.
    """
    from rlhf_critic.data.encoding import Encoded  # who calls this has an encoder

    if len(items) == 0:
        raise ScorerRejected("no_items", "there is nothing to score: give at least one item")
    if len(items) > limits.max_items:
        raise ScorerRejected(
            "too_many_items", f"{len(items)} items in one call, at most {limits.max_items} are taken: split the call"
        )
    texts: dict[int, str] = {}
    encoded: dict[int, Encoded] = {}
    for index, item in enumerate(items):
        if isinstance(item, Conversation):
            texts[index] = _render(index, item, encoder, limits)
        elif isinstance(item, Text):
            _check_text(index, item.text, limits)
            if not isinstance(item.response, str | None):
                raise _refused("not_text", index, f": a response is a text, this is {_kind(item.response)}")
            if item.response:
                _check_text(index, item.response, limits)
            texts[index] = item.text
        else:
            encoded[index] = Encoded(_check_ids(index, item, encoder), truncated=False)
    try:
        all_ids = encoder.tokenize(list(texts.values()))
    except EncodingError as error:
        raise _refused("no_end", list(texts)[error.index or 0], f": {error}") from error
    for index, ids in zip(texts, all_ids, strict=True):
        if len(ids) > limits.max_tokens:
            raise _refused(
                "too_many_tokens",
                index,
                f" has {len(ids)} tokens, at most {limits.max_tokens} are taken: shorten it; this critic "
                f"reads its last {encoder.max_length}",
            )
        encoded[index] = encoder.truncate(ids)
    return [encoded[index] for index in range(len(items))]


def _render(index: int, item: Conversation, encoder: Encoder, limits: Limits) -> str:
    said = item.prompt if isinstance(item.prompt, str) else "".join(_contents(index, item.prompt))
    if not isinstance(item.response, str):
        raise _refused("not_text", index, f": a response is a text, this is {_kind(item.response)}")
    _check_text(index, said + item.response, limits)
    try:
        text = encoder.render(item.prompt, item.response)
    except EncodingError as error:
        raise _refused("template_refused", index, f": {error}") from error
    _check_text(index, text, limits)  # roles, and whatever else of a turn the template shows, count too
    return text


def _contents(index: int, turns: Any) -> list[str]:
    # An iterator would be empty by the time that it is rendered, and whatever else is empty would pass for no prompt.
    is_list = isinstance(turns, Sequence | np.ndarray) and not isinstance(turns, NOT_LISTS)
    is_list = is_list and getattr(turns, "ndim", 1) == 1
    if not is_list or not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        raise _refused("not_text", index, ": a prompt is a text, or a list of turns with 'role' and 'content'")
    if not all(isinstance(turn[name], str) for turn in turns for name in ("role", "content")):
        raise _refused("not_text", index, ": the role and content of a turn are texts")
    return [turn["content"] for turn in turns]


def _check_text(index: int, text: Any, limits: Limits) -> None:
    if not isinstance(text, str):
        raise _refused("not_text", index, f": must be a text, this is {_kind(text)}")
    if not text:
        raise _refused("empty_text", index, " is empty: there is nothing to score")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise _refused("not_unicode", index, f" holds half of a surrogate pair: {error}") from error
    if size > limits.max_text_bytes:
        raise _refused(
            "text_too_long", index, f" has {size} bytes, at most {limits.max_text_bytes} are taken: shorten it"
        )


def _check_ids(index: int, item: Any, encoder: Encoder) -> list[int]:
    try:
        # The bytes of a text would pass for ids.
        ids = np.asarray(None if isinstance(item, NOT_LISTS) else item)
    except Exception as error:  # whatever the item's own conversion raises, such as that of a tensor with a gradient
        raise _refused("not_text", index, f": {_kind(item)} is no item") from error
    if ids.size == 0 and ids.ndim == 1:
        raise _refused("empty_text", index, " has no token ids: there is nothing to score")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise _refused(
            "not_text", index, f" is neither a Conversation nor a Text nor a list of token ids: {_kind(item)}"
        )
    if ids.min() < 0 or ids.max() >= len(encoder.tokenizer):
        raise _refused(
            "bad_token_id",
            index,
            f": token id {ids[(ids < 0) | (ids >= len(encoder.tokenizer))][0]} is not in the critic's "
            f"vocabulary of {len(encoder.tokenizer)}: were the ids made by another tokenizer?",
        )
    if ids[-1] == encoder.tokenizer.pad_token_id:
        raise _refused("no_end", index, " ends with the pad token: remove the padding")
    if len(ids) > encoder.max_length:
        raise _refused(
            "too_many_tokens",
            index,
            f" has {len(ids)} token ids, this critic reads {encoder.max_length}: give its last ones",
        )
    return [int(token) for token in ids]


def _refused(kind: str, index: int, what: str) -> ScorerRejected:
    return ScorerRejected(kind, f"item {index}{what}", index)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
