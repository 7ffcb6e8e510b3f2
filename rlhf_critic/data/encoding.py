"""Text to token ids: the only place that decides chat template, BOS, EOS and truncation.

An `Encoder` renders a prompt and a response with a chat template, tokenises the rendered text without adding tokens,
and keeps the last ``max_length`` tokens. Two public Hugging Face calls reproduce it from an exported directory::

    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, truncation=True)["input_ids"]

They differ from it in two cases, which `rlhf-critic inspect` counts. A response that the template drops or changes is
kept whole. A special token inside a text is read as text, unless `special_tokens_in_text` is ``token``.

Each checkpoint holds a fingerprint over everything that can change the ids. So a critic is never served with another
encoding than the one it was trained with. Knows nothing about models, batches or preference files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers.decoders import DecodeStream
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_critic.config.model import AUTO_TEMPLATE, EncodingConfig, SpecialTokensInText, TemplateDate
from rlhf_critic.data.chat_template import Change, ChatTemplate
from rlhf_critic.data.conversation import Message, Prompt, Reply, tools_of, turns_of
from rlhf_critic.data.special_tokens import LiteralTokens
from rlhf_critic.data.templates import resolve_template, without_trailing
from rlhf_critic.errors import EncodingError

PAD_TOKEN = "<|pad|>"
BYTE_ORDER_MARK = "\ufeff"
BROKEN_CHARACTER = "\ufffd"
PROBES = (("please explain", " of course"), ("", "no."))  # their ends show whether an encoding ends with a token

logger = logging.getLogger(__name__)


def create_encoder(model: str, options: EncodingConfig, ignored_end_id: int | None = None) -> Encoder:
    """Creates the encoder of a base model; see `load_tokenizer` and `leave_out_at_end`."""
    tokenizer = load_tokenizer(model, options.chat_template, template_date=options.template_date)
    ignored_end_id = leave_out_at_end(tokenizer, ignored_end_id)
    return Encoder(tokenizer, options.max_length, options.special_tokens_in_text, ignored_end_id)


def load_tokenizer(
    name_or_path: str,
    chat_template: str = AUTO_TEMPLATE,
    *,
    template_date: TemplateDate = "fixed",
    keeps_template: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and sets its pad token and chat template; removes an implicit BOS.

    Plain transformers finds the end of a sequence by the pad token, so the pad token must not be able to end one.
    ``<|pad|>`` is added if the tokenizer has no pad token or shares it with BOS, EOS or UNK.

    Args:
        name_or_path: Directory or hub id.
        chat_template: ``auto`` (the tokenizer's template, else ``plain``), ``plain`` (prompt, response and EOS, without
            separators), another name of `rlhf_critic.data.templates`, or the path of a Jinja file.
        template_date: Date that a template gets if it asks for the current one: a ``fixed`` one, or ``today``.
        keeps_template: Whether to keep the tokenizer's template to the character, as a saved critic needs. Otherwise
            the template loses a byte order mark at its start, and gets the fixed date.

    Returns:
        A fast tokenizer with the chat template. It pads on the right, truncates on the left and adds no special tokens.

    Raises:
        EncodingError: The tokenizer is missing, not fast or without EOS, or the template cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, padding_side="right", truncation_side="left", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        if (Path(name_or_path) / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            raise EncodingError(
                f"{name_or_path}: the tokenizer is a SentencePiece model (tokenizer.model, without a tokenizer.json), "
                "which needs an optional dependency: pip install 'rlhf-critic[sentencepiece]'"
            ) from error
        raise EncodingError(f"no tokenizer could be loaded from {name_or_path!r}: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise EncodingError(f"the tokenizer of {name_or_path!r} has no fast (Rust) implementation, which is required")
    if tokenizer.eos_token is None:
        raise EncodingError(f"the tokenizer of {name_or_path!r} has no EOS token; set eos_token and save it again")
    begin_or_end = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    if tokenizer.pad_token is None or tokenizer.pad_token_id in begin_or_end:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    begins_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if isinstance(tokenizer.chat_template, str) and not keeps_template:
        tokenizer.chat_template = tokenizer.chat_template.removeprefix(BYTE_ORDER_MARK)
    fixes_date = template_date == "fixed" and not keeps_template
    tokenizer.chat_template = resolve_template(tokenizer, chat_template, begins_with_bos, fixes_date)
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        # The template adds all special tokens. A tokenizer that also adds BOS would double it for callers that omit
        # add_special_tokens=False.
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return tokenizer


def leave_out_at_end(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> int | None:
    """Changes a chat template so that no text ends with a token that the model takes for padding.

    Such a model reads its score before this token. An `Encoder` ignores the token by its id. The template does without
    it for other readers of a saved critic, which read the score at the last token of a text.

    Args:
        tokenizer: Tokenizer that `load_tokenizer` returned. Its template changes in place.
        token_id: The model's pad token, None if it has none.

    Returns:
        The id that the encoder must ignore; None if the token cannot end a text, as the pad token of the tokenizer.

    Raises:
        EncodingError: Without the token at the end, the other ids would change.
    """
    if token_id is None or token_id == tokenizer.pad_token_id:  # an encoder rejects texts that end with its pad
        return None
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:  # an id beyond the vocabulary
        return None

    def ids_of_probes() -> list[list[int]]:
        encoder = Encoder(tokenizer, 1)
        return encoder.tokenize([encoder.render(*probe) for probe in PROBES])

    before = ids_of_probes()
    if not any(ids[-1] == token_id for ids in before):
        return token_id
    if token_id in tokenizer.added_tokens_decoder:  # others may join with the characters beside them
        tokenizer.chat_template = without_trailing(tokenizer.chat_template, token)
    for ids, shorter in zip(before, ids_of_probes(), strict=True):
        while ids[-1] == token_id:
            ids.pop()
        if ids != shorter:
            raise EncodingError(
                f"{tokenizer.name_or_path}: the token {token!r} ends the texts of this chat template and is the pad "
                "token of the model (config.json: pad_token_id), which reads its score before it, and leaving it out "
                "changes other tokens: give a chat template without it"
            )
    logger.warning(
        "encoding_changed left_out=%r reason=%s",
        token,
        "it is the model's pad token, so the model reads its score before it; the scores stay equal",
    )
    return token_id


@dataclass(frozen=True)
class Rendered:
    """A text as the critic reads it.

    Attributes:
        text: The text.
        change: What the chat template did to the response: nothing (empty), it changed ``white space``, or it dropped
            or changed more. In the last case the response was ``kept whole`` in spite of the template.
        has_special_tokens: Whether a text of the conversation holds a special token.
        hidden: The text with placeholders for the special tokens that are read as text; None if there are none.
    """

    text: str
    change: Change = ""
    has_special_tokens: bool = False
    hidden: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text, whether it was truncated from the left, and how it was rendered, if it was."""

    ids: list[int]
    truncated: bool
    rendered: Rendered | None = field(default=None, compare=False, repr=False)


class Encoder:
    """Converter from prompt and response to token ids. Every room uses it, so the ids are the same everywhere.

    Args:
        tokenizer: Tokenizer that `load_tokenizer` returned.
        max_length: Maximum sequence length in tokens. Longer sequences are truncated from the left, because the reward
            is read at the end.
        special_tokens_in_text: How to read a special token inside a text: as ``token``, as plain transformers does, or
            as ordinary ``text``. See `special_tokens`.
        ignored_end_id: Token to remove from the end of texts and token ids, because the model was trained to take it
            for padding, such as an EOS token that was also the pad token. None removes nothing.

    Raises:
        EncodingError: The tokenizer has no chat template, no pad token, or the EOS token as pad token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        special_tokens_in_text: SpecialTokensInText = "token",
        ignored_end_id: int | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise EncodingError(
                "the tokenizer has no chat template; load it with rlhf_critic.data.encoding.load_tokenizer"
            )
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise EncodingError(
                "the tokenizer has no separate pad token, so plain transformers would find a wrong end of a "
                "sequence; load it with rlhf_critic.data.encoding.load_tokenizer"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.special_tokens_in_text = special_tokens_in_text
        self.ignored_end_id = ignored_end_id
        self._template = ChatTemplate(tokenizer)

    def render(self, prompt: Prompt, response: Reply) -> str:
        """Renders the conversation, with ``response`` as the last turn, of the assistant; see `render_conversation`."""
        return self.render_conversation(prompt, response).text

    def render_conversation(self, prompt: Prompt, response: Reply) -> Rendered:
        """Renders the conversation, and checks that the response stands in the text.

        Some templates drop or rewrite parts of a response, such as the reasoning before ``</think>``. Then the text
        consists of the generation prompt, the whole response and the ending. White space that a template strips or
        adds stays as the template leaves it.

        Raises:
            EncodingError: The template rejects the conversation, or leaves out every response.
        """
        turns, tools, answer, found = self._hide(prompt, response)
        text, change = self._template.render(turns, answer, tools)
        if not found:
            return Rendered(text, change)
        return Rendered(self._literal.reveal(text), change, True, text if self._reads_text else None)

    def render_finished(self, text: str, response: str | None) -> Rendered:
        """Returns a finished text. Special tokens in its response, if that is known, are read as in a conversation."""
        if response and self._reads_text and self._literal.are_in(response):
            for end in (self.ending, ""):
                if text.endswith(response + end):
                    before = text.removesuffix(response + end)
                    return Rendered(text, "", True, before + self._literal.hide(response) + end)
        return Rendered(text)

    @property
    def _reads_text(self) -> bool:
        return self.special_tokens_in_text == "text"

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Tokens that a text must not write: all special tokens, and others with which the template ends a turn.

        Tokens that a tokenizer adds without calling them special, such as ``<think>`` of Qwen3, are none of them.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        ending = self._template.known_ending or ""
        markup = [token for token in added if token.content.strip()]  # white space may be an added token
        return frozenset(token.content for token in markup if token.special or token.content in ending)

    @cached_property
    def _literal(self) -> LiteralTokens:
        return LiteralTokens(self.tokenizer, self.special_tokens)

    def _hide(self, prompt: Prompt, response: Reply) -> tuple[list[Message], list[dict[str, Any]], Reply, bool]:
        """Returns turns, tools and response with placeholders for their special tokens, and whether there are any."""
        turns, tools = turns_of(prompt), tools_of(prompt)
        if not any(map(self._literal.are_in, (response, turns, tools))):
            return turns, tools, response, False
        if self._reads_text:
            response = self._literal.hide(response)
            if self._template.separates_turns:  # otherwise special tokens of the prompt do
                turns, tools = self._literal.hide(turns), self._literal.hide(tools)
        return turns, tools, response, True

    def encode(self, prompt: Prompt, response: Reply) -> Encoded:
        """Encodes one prompt and response; see `encode_batch`."""
        return self.encode_batch([(prompt, response)])[0]

    def encode_batch(self, pairs: Sequence[tuple[Prompt, Reply]]) -> list[Encoded]:
        """Encodes prompts and responses. The ids of a text do not depend on its neighbours.

        Raises:
            EncodingError: A text has no tokens, or ends with the pad token.
        """
        rendered = [self.render_conversation(*pair) for pair in pairs]
        return [self.truncate(ids, one) for ids, one in zip(self.tokenize(rendered), rendered, strict=True)]

    def tokenize(self, texts: Sequence[str | Rendered]) -> list[list[int]]:
        """Tokenises rendered texts without truncation.

        Raises:
            EncodingError: A text has no tokens, ends with the pad token, or contains half of a surrogate pair.
        """
        all_ids = self._ids_of([one if isinstance(one, Rendered) else Rendered(one) for one in texts])
        all_ids = [self.without_ignored_end(ids) for ids in all_ids]
        for index, (text, ids) in enumerate(zip(texts, all_ids, strict=True)):
            if not ids or ids[-1] == self.tokenizer.pad_token_id:
                shown = text.text if isinstance(text, Rendered) else text
                raise EncodingError(
                    f"a text must have tokens and must not end with the pad token: {shown[-80:]!r}", index
                )
        return all_ids

    def without_ignored_end(self, ids: list[int]) -> list[int]:
        """Removes the tokens at the end that the model takes for padding: those with `ignored_end_id`."""
        end = len(ids)
        while end and ids[end - 1] == self.ignored_end_id:
            end -= 1
        return ids[:end]

    def _ids_of(self, texts: Sequence[Rendered]) -> list[list[int]]:
        for index, rendered in enumerate(texts):
            try:
                rendered.text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON may contain it, but tokenizers fail on it
                raise EncodingError(f"half of a surrogate pair is not valid text: {error}", index) from error
        plain = [rendered.text for rendered in texts if rendered.hidden is None]
        ids_of_plain = iter(
            self.tokenizer(plain, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            if plain
            else []
        )
        return [
            next(ids_of_plain) if rendered.hidden is None else self._literal.encode(rendered.hidden)
            for rendered in texts
        ]

    @cached_property
    def ending(self) -> str:
        """Text that the chat template adds after the last response, such as the EOS token."""
        return self._template.ending

    def open(self, prompt: Prompt) -> str:
        """Renders the text from which a policy generates a response.

        It is the prompt with the template's generation prompt (``add_generation_prompt=True``). A template without one
        gives the text that it writes before a response.

        Raises:
            EncodingError: The template rejects the prompt.
        """
        return self._open(prompt).text

    def encode_opening(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of `open`, which may be none.

        Raises:
            EncodingError: The template rejects the prompt, or it contains half of a surrogate pair.
        """
        return self._ids_of([self._open(prompt)])[0]

    def _open(self, prompt: Prompt) -> Rendered:
        turns, tools, _, found = self._hide(prompt, "")
        text = self._template.open(turns, tools)
        return Rendered(self._literal.reveal(text), "", found, text if found and self._reads_text else None)

    def without_ending(self, text: str) -> str:
        """Removes trailing pad tokens, EOS tokens and template endings from a text.

        The text of a policy may be padded, cut before its EOS, or end with another token than this critic was trained
        with. The reward is read at the end, so callers that score such a text append `ending` instead.
        """
        endings = self._endings
        end = len(text)
        while ending := next((ending for ending in endings if text.endswith(ending, 0, end)), ""):
            end -= len(ending)
        return text[:end]

    @cached_property
    def _endings(self) -> list[str]:
        endings = {self.ending, self.ending.strip(), self.tokenizer.eos_token, self.tokenizer.pad_token} - {""}
        return sorted(endings, key=len, reverse=True)  # otherwise " </s>" would leave a space

    def without_padding(self, text: str) -> str:
        """Removes the tokens with which a policy's batch was padded, at both ends.

        At the start pad, EOS and UNK tokens go, because some systems pad with EOS or UNK. A BOS token stays once; where
        the BOS token is also the EOS token, it stays if the template begins with it. At the end the first EOS token or
        template ending stays, and what repeats or pads it goes.
        """
        text = self._without_left_padding(text)
        body = self.without_ending(text)
        rest = text[len(body) :]
        last = next((end for end in self._endings if rest.startswith(end) and end != self.tokenizer.pad_token), "")
        return body + last

    def _without_left_padding(self, text: str) -> str:
        found = self._left_padding.match(text)
        if not found:
            return text
        if found.end() == len(text):  # the end of an empty text, which is no padding
            return re.sub(rf"^(?:{re.escape(self.tokenizer.pad_token)})+", "", text)
        bos, pads = self.tokenizer.bos_token, self._pads
        begins = bool(bos) and found[0].endswith(bos)
        keeps = begins and (bos not in pads or self._template.begins_with(bos))
        return (bos if keeps else "") + text[found.end() :]

    @cached_property
    def _pads(self) -> set[str]:
        tokens = (self.tokenizer.pad_token, self.tokenizer.eos_token, self.tokenizer.unk_token)
        return {token for token in tokens if token}

    @cached_property
    def _left_padding(self) -> re.Pattern[str]:
        tokens = sorted(self._pads | {self.tokenizer.bos_token or ""} - {""}, key=len, reverse=True)
        padding = "|".join(map(re.escape, tokens))
        return re.compile(rf"(?:{padding})(?:\s*(?:{padding}))*")

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a text, which may be empty."""
        return len(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    def token_texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Returns the text of each token, special tokens included. Joined, they are the decoded text.

        A character may consist of several tokens. It is then the text of its last one, and the others are empty.
        """
        backend = self.tokenizer.backend_tokenizer
        stream = DecodeStream(skip_special_tokens=False)
        texts = [stream.step(backend, int(token)) or "" for token in ids]
        if rest := len(backend.decode(list(map(int, ids)), skip_special_tokens=False)) - sum(map(len, texts)):
            texts[-1] += BROKEN_CHARACTER * rest  # the beginning of a character that does not end
        return tuple(texts)

    def truncate(self, ids: list[int], rendered: Rendered | None = None) -> Encoded:
        """Keeps the last ``max_length`` token ids, because the reward is read at the end."""
        return Encoded(ids[-self.max_length :], len(ids) > self.max_length, rendered)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer, with template and length limit, for `load_tokenizer` and transformers."""
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(directory)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids: vocabulary and rules, special tokens, template, length."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for per_call_state in ("truncation", "padding"):
            rules.pop(per_call_state, None)
        deciding = {
            "rules": rules,
            "special_tokens": [self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token],
            "chat_template": self.tokenizer.chat_template,
            "max_length": self.max_length,
            "truncation_side": "left",
            # Absent for "token" and None, so that critics that were saved before keep their fingerprint.
            **({"special_tokens_in_text": "text"} if self._reads_text else {}),
            **({} if self.ignored_end_id is None else {"ignored_end_id": self.ignored_end_id}),
        }
        canonical = json.dumps(deciding, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def validate_same_tokens(policy: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase) -> None:
    """Validates that policy and critic use the same token ids, because the critic gives values at the policy's tokens.

    Pad tokens may differ, because they are never read.

    Raises:
        EncodingError: The vocabularies differ. Names a token.
    """
    pads = {policy.pad_token, critic.pad_token}  # the pad token of one may be an ordinary token of the other
    entries = policy.get_vocab().items() ^ critic.get_vocab().items()
    differing = sorted((entry for entry in entries if entry[0] not in pads), key=lambda entry: entry[1])
    if differing:
        token, index = differing[0]
        raise EncodingError(
            f"the policy's tokenizer is not the critic's: {len(differing)} entries differ, such as {token!r} with the "
            f"id {index}. The critic must read the token ids of the policy: start it from the policy (leave "
            "critic.model.path empty) or from a model of the same family. Scorers read text and may be of any family"
        )
