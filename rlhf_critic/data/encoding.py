"""Text to token ids: the one place where chat template, BOS, EOS and truncation are decided.

An `Encoder` renders a prompt and a response with a chat template, tokenises the rendered text without adding anything
to it, and keeps the last ``max_length`` tokens. So two public Hugging Face calls reproduce it from an exported
directory, and nothing else is needed::

    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, truncation=True)["input_ids"]

A fingerprint over everything that can change the ids goes into each checkpoint, so that a critic is never served with
another encoding than the one it was fitted with. Knows nothing of models, batches or files of preferences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jinja2 import TemplateError
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_critic.config.model import AUTO_TEMPLATE, PLAIN_TEMPLATE_NAME
from rlhf_critic.data.conversation import Prompt
from rlhf_critic.errors import EncodingError

PAD_TOKEN = "<|pad|>"
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ eos_token }}"
RESPONSE_MARK = "\u2402"  # a visible symbol, which no template strips
# A template that asks for today's date would give another reward tomorrow: it gets this one, for ever.
PINNED_DATE_MACRO = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}"


def load_tokenizer(name_or_path: str, chat_template: str = AUTO_TEMPLATE) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and settles what an encoding depends on: the pad token, the template, no hidden BOS.

    Plain transformers finds the end of a sequence by the pad token, so the pad token must not be able to end one.
    Where the tokenizer has none of its own (none at all, or one shared with BOS, EOS or UNK), ``<|pad|>`` is added.

    Args:
        name_or_path: A directory or hub id.
        chat_template: ``auto`` (the tokenizer's own, else ``plain``), ``plain`` (prompt, response and EOS, nothing
            between) or the path of a Jinja file.

    Returns:
        A fast tokenizer that pads on the right, truncates on the left, adds no special tokens by itself and carries
        the chat template.

    Raises:
        EncodingError: There is no tokenizer, it is not a fast one, it has no EOS, or the template cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, padding_side="right", truncation_side="left", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise EncodingError(f"no tokenizer could be loaded from {name_or_path!r}: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise EncodingError(f"the tokenizer of {name_or_path!r} has no fast (Rust) implementation, which is needed")
    if tokenizer.eos_token is None:
        raise EncodingError(f"the tokenizer of {name_or_path!r} has no EOS token; set eos_token and save it again")
    if tokenizer.pad_token is None or tokenizer.pad_token_id in _tokens_that_end_or_begin(tokenizer):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    begins_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        # The template says what surrounds a text. A tokenizer that adds BOS again would double it, and only for
        # those who forget add_special_tokens=False.
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    tokenizer.chat_template = _resolve_template(tokenizer, chat_template, begins_with_bos)
    return tokenizer


def _tokens_that_end_or_begin(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    return {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}


def _resolve_template(tokenizer: PreTrainedTokenizerBase, choice: str, begins_with_bos: bool) -> str:
    plain = ("{{ bos_token }}" if begins_with_bos else "") + PLAIN_TEMPLATE
    if choice == PLAIN_TEMPLATE_NAME:
        return plain
    if choice == AUTO_TEMPLATE:
        template = tokenizer.chat_template or plain
    else:
        try:
            template = Path(choice).read_text(encoding="utf-8")
        except OSError as error:
            raise EncodingError(
                f"chat_template {choice!r} is neither 'auto' nor 'plain' nor a file that can be read: {error}"
            ) from error
    if not isinstance(template, str):
        raise EncodingError("the tokenizer carries several chat templates; give one of them as a file: chat_template")
    if "strftime_now" in template and not template.startswith(PINNED_DATE_MACRO):
        template = PINNED_DATE_MACRO + template
    return template


@dataclass(frozen=True)
class Encoded:
    """The token ids of one text, and whether its beginning was cut to fit."""

    ids: list[int]
    truncated: bool


class Encoder:
    """Turns a prompt and a response into token ids, the same way wherever it is used.

    Args:
        tokenizer: As `load_tokenizer` returns it.
        max_length: The most tokens a sequence may have; longer ones lose their beginning, never their end, because
            the reward is read there.

    Raises:
        EncodingError: The tokenizer has no chat template, or a pad token that may end a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if tokenizer.chat_template is None:
            raise EncodingError(
                "the tokenizer has no chat template; load it with rlhf_critic.data.encoding.load_tokenizer"
            )
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise EncodingError(
                "the tokenizer has no pad token of its own, so plain transformers would misread where a sequence "
                "ends; load it with rlhf_critic.data.encoding.load_tokenizer"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length

    def render(self, prompt: Prompt, response: str) -> str:
        """The text that is tokenised: the conversation with ``response`` as its last, assistant, turn.

        Raises:
            EncodingError: The template refuses the conversation.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages = [*turns, {"role": "assistant", "content": response}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            roles = [message.get("role") for message in messages]
            raise EncodingError(f"the chat template failed on the roles {roles}: {error}") from error

    def encode(self, prompt: Prompt, response: str) -> Encoded:
        """Token ids of one prompt and response; see `encode_batch`."""
        return self.encode_batch([(prompt, response)])[0]

    def encode_batch(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Encoded]:
        """Token ids of many prompts and responses; a text's ids do not depend on its neighbours.

        Raises:
            EncodingError: A text has no tokens, or ends with the pad token.
        """
        return [self.truncate(ids) for ids in self.tokenize([self.render(*pair) for pair in pairs])]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of finished texts, in full length.

        Raises:
            EncodingError: A text has no tokens, ends with the pad token, or holds half of a surrogate pair.
        """
        if not texts:
            return []
        for index, text in enumerate(texts):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON may hold it, a tokenizer does not take it
                raise EncodingError(f"half of a surrogate pair is no text: {error}", index) from error
        all_ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, truncation=False, verbose=False
        )["input_ids"]
        for index, (text, ids) in enumerate(zip(texts, all_ids, strict=True)):
            if not ids or ids[-1] == self.tokenizer.pad_token_id:
                raise EncodingError(
                    f"a text must have tokens and must not end with the pad token: {text[-80:]!r}", index
                )
        return all_ids

    @cached_property
    def ending(self) -> str:
        """What the chat template puts after the last response, such as the EOS token."""
        return self.render("", RESPONSE_MARK).rpartition(RESPONSE_MARK)[2]

    def open(self, prompt: Prompt) -> str:
        """What comes before a response: the text that a policy goes on from, so that its tokens are the critic's.

        Raises:
            EncodingError: The template refuses the prompt.
        """
        return self.render(prompt, RESPONSE_MARK).rpartition(RESPONSE_MARK)[0]

    def without_ending(self, text: str) -> str:
        """A text without pad tokens, EOS tokens and the template's ending at its end.

        A policy's text may be padded, cut before its EOS, or end with another sign than this critic was fitted with.
        The reward is read at the end, so whoever scores such a text puts `ending` in the place of what was there.
        """
        endings = {self.ending, self.ending.strip(), self.tokenizer.eos_token, self.tokenizer.pad_token} - {""}
        longest_first = sorted(endings, key=len, reverse=True)  # or what is left of " </s>" would be a space
        end = len(text)
        while ending := next((ending for ending in longest_first if text.endswith(ending, 0, end)), ""):
            end -= len(ending)
        return text[:end]

    def count_tokens(self, text: str) -> int:
        """Tokens of a piece of text by itself; it may be empty."""
        return len(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    def truncate(self, ids: list[int]) -> Encoded:
        """The last ``max_length`` of a text's token ids: it loses its beginning, because its end is what is read."""
        return Encoded(ids[-self.max_length :], truncated=len(ids) > self.max_length)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer, with its template and length limit, where `load_tokenizer` and transformers find it."""
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(directory)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over all that decides the ids: vocabulary and rules, special tokens, template, length."""
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for per_call_state in ("truncation", "padding"):
            rules.pop(per_call_state, None)
        deciding = {
            "rules": rules,
            "special_tokens": [self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token],
            "chat_template": self.tokenizer.chat_template,
            "max_length": self.max_length,
            "truncation_side": "left",
        }
        canonical = json.dumps(deciding, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def validate_same_tokens(policy: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase) -> None:
    """Checks that a policy's token ids mean the same to a critic, which is to give values at the policy's tokens.

    The pad token may differ: it is never read.

    Raises:
        EncodingError: Names a token that differs.
    """
    pads = {policy.pad_token, critic.pad_token}  # that of the one may be an ordinary token of the other
    entries = policy.get_vocab().items() ^ critic.get_vocab().items()
    differing = sorted((entry for entry in entries if entry[0] not in pads), key=lambda entry: entry[1])
    if differing:
        token, index = differing[0]
        raise EncodingError(
            f"the policy's tokenizer is not the critic's: {len(differing)} entries differ, such as {token!r} with the "
            f"id {index}. Values stand at the policy's tokens, so the critic must read the same ids: start it from the "
            "policy (leave critic.model.path empty) or from a model of the policy's family. Scorers read texts and may "
            "be of any family"
        )
