"""Special tokens inside texts, such as ``<|im_end|>`` in an answer: finds them, and encodes them as ordinary text.

A chat template writes special tokens between the texts of a conversation. A policy can write the same characters into
its answer, and a tokenizer then reads the end of a turn. `LiteralTokens` tells the two apart. Before a template renders
texts, `hide` replaces the special tokens in them with placeholders. `encode` then uses a second tokenizer with the same
rules, which knows the special tokens by secret names only: the template's get these names, and those in texts do not.

Knows nothing about conversations, templates or lengths.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf_critic.errors import EncodingError


class LiteralTokens:
    """Encoder of rendered texts in which some special tokens are ordinary text.

    Args:
        tokenizer: The tokenizer.
        tokens: The special tokens, as text; at least one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Collection[str]) -> None:
        self._tokenizer = tokenizer
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(re.escape(token) for token in longest_first))
        secret = f"\U0010fffd{secrets.token_hex(8)}"  # no caller can write a name that it does not know
        self._placeholders = {token: f"{secret}:{index}:" for index, token in enumerate(longest_first)}
        self._names = {token: f"{secret};{index};" for index, token in enumerate(longest_first)}
        self._hidden = {placeholder: token for token, placeholder in self._placeholders.items()}
        self._placeholder = re.compile(f"{secret}:[0-9]+:")

    def are_in(self, value: Any) -> bool:
        """Returns whether a text, or a text in nested lists and mappings, holds a special token."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        parts = (
            [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        )
        return any(self.are_in(part) for part in parts)

    def hide(self, value: Any) -> Any:
        """Replaces special tokens with placeholders in a text, or in the texts of nested lists and mappings."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: self._placeholders[found[0]], value)
        if isinstance(value, dict):
            return {self.hide(name): self.hide(part) for name, part in value.items()}
        return [self.hide(part) for part in value] if isinstance(value, list | tuple) else value

    def reveal(self, text: str) -> str:
        """Replaces placeholders with their special tokens."""
        return self._placeholder.sub(lambda found: self._hidden[found[0]], text)

    def encode(self, text: str) -> list[int]:
        """Encodes a rendered text with placeholders. Only the special tokens outside of placeholders become tokens."""
        renamed = self._pattern.sub(lambda found: self._names[found[0]], text)
        return list(self._backend.encode(self.reveal(renamed), add_special_tokens=False).ids)

    @cached_property
    def _backend(self) -> Tokenizer:
        rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
        rules.update(truncation=None, padding=None)
        model = rules["model"]
        for token in rules["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        # The model must not find a special token in its own vocabulary either, as a Unigram model would.
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._names.get(token, token): index for token, index in model["vocab"].items()}
        else:
            model["vocab"] = [[self._names.get(token, token), score] for token, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._names.get(model["unk_token"], model["unk_token"])
        try:
            backend = Tokenizer.from_str(json.dumps(rules))
        except Exception as error:  # tokenizers raises no narrower class
            raise self._unsupported(str(error)) from error
        for token, name in self._names.items():
            if backend.token_to_id(name) != self._tokenizer.convert_tokens_to_ids(token):
                raise self._unsupported(f"{token!r} would get another id")
        return backend

    def _unsupported(self, why: str) -> EncodingError:
        return EncodingError(
            f"this tokenizer cannot read special tokens as text ({why}); remove them from the texts, or set "
            "encoding.special_tokens_in_text to token"
        )
