"""Text to token ids: the only place that decides chat template, BOS, EOS and truncation.

An `Encoder` renders a prompt and a response with a chat template, tokenises the rendered text without adding tokens,
and keeps the last ``max_length`` tokens. Two public Hugging Face calls reproduce it from an exported directory::

    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, truncation=True)["input_ids"]

Each checkpoint holds a fingerprint over everything that can change the ids. So a critic is never served with another
encoding than the one it was trained with. Knows nothing about models, batches or preference files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from jinja2 import TemplateError
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_critic.config.model import AUTO_TEMPLATE
from rlhf_critic.data.conversation import Prompt
from rlhf_critic.data.templates import resolve_template
from rlhf_critic.errors import EncodingError

PAD_TOKEN = "<|pad|>"
RESPONSE_MARK = "\u2402"  # a visible symbol, which no template strips


def load_tokenizer(name_or_path: str, chat_template: str = AUTO_TEMPLATE) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and sets its pad token and chat template; removes an implicit BOS.

    Plain transformers finds the end of a sequence by the pad token, so the pad token must not be able to end one.
    ``<|pad|>`` is added if the tokenizer has no pad token or shares it with BOS, EOS or UNK.

    Args:
        name_or_path: Directory or hub id.
        chat_template: ``auto`` (the tokenizer's template, else ``plain``), ``plain`` (prompt, response and EOS, without
            separators), another name of `rlhf_critic.data.templates`, or the path of a Jinja file.

    Returns:
        A fast tokenizer with the chat template. It pads on the right, truncates on the left and adds no special tokens.

    Raises:
        EncodingError: The tokenizer is missing, not fast or without EOS, or the template cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, padding_side="right", truncation_side="left", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
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
    tokenizer.chat_template = resolve_template(tokenizer, chat_template, begins_with_bos)
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        # The template adds all special tokens. A tokenizer that also adds BOS would double it for callers that omit
        # add_special_tokens=False.
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return tokenizer


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text, and whether it was truncated from the left."""

    ids: list[int]
    truncated: bool


class Encoder:
    """Converter from prompt and response to token ids. Every room uses it, so the ids are the same everywhere.

    Args:
        tokenizer: Tokenizer that `load_tokenizer` returned.
        max_length: Maximum sequence length in tokens. Longer sequences are truncated from the left, because the reward
            is read at the end.

    Raises:
        EncodingError: The tokenizer has no chat template, no pad token, or the EOS token as pad token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
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

    def render(self, prompt: Prompt, response: str) -> str:
        """Renders the conversation, with ``response`` as the last turn, of the assistant.

        Raises:
            EncodingError: The template rejects the conversation.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages = [*turns, {"role": "assistant", "content": response}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            roles = [message.get("role") for message in messages]
            raise EncodingError(f"the chat template failed on the roles {roles}: {error}") from error

    def encode(self, prompt: Prompt, response: str) -> Encoded:
        """Encodes one prompt and response; see `encode_batch`."""
        return self.encode_batch([(prompt, response)])[0]

    def encode_batch(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Encoded]:
        """Encodes prompts and responses. The ids of a text do not depend on its neighbours.

        Raises:
            EncodingError: A text has no tokens, or ends with the pad token.
        """
        return [self.truncate(ids) for ids in self.tokenize([self.render(*pair) for pair in pairs])]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenises rendered texts without truncation.

        Raises:
            EncodingError: A text has no tokens, ends with the pad token, or contains half of a surrogate pair.
        """
        if not texts:
            return []
        for index, text in enumerate(texts):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON may contain it, but tokenizers fail on it
                raise EncodingError(f"half of a surrogate pair is not valid text: {error}", index) from error
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
        """Text that the chat template adds after the last response, such as the EOS token."""
        return self.render("", RESPONSE_MARK).rpartition(RESPONSE_MARK)[2]

    def open(self, prompt: Prompt) -> str:
        """Renders the text before a response, from which a policy generates, so that its tokens equal the critic's.

        Raises:
            EncodingError: The template rejects the prompt.
        """
        return self.render(prompt, RESPONSE_MARK).rpartition(RESPONSE_MARK)[0]

    def without_ending(self, text: str) -> str:
        """Removes trailing pad tokens, EOS tokens and template endings from a text.

        The text of a policy may be padded, cut before its EOS, or end with another token than this critic was trained
        with. The reward is read at the end, so callers that score such a text append `ending` instead.
        """
        endings = {self.ending, self.ending.strip(), self.tokenizer.eos_token, self.tokenizer.pad_token} - {""}
        longest_first = sorted(endings, key=len, reverse=True)  # otherwise " </s>" would leave a space
        end = len(text)
        while ending := next((ending for ending in longest_first if text.endswith(ending, 0, end)), ""):
            end -= len(ending)
        return text[:end]

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a text, which may be empty."""
        return len(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])

    def truncate(self, ids: list[int]) -> Encoded:
        """Keeps the last ``max_length`` token ids, because the reward is read at the end."""
        return Encoded(ids[-self.max_length :], truncated=len(ids) > self.max_length)

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
