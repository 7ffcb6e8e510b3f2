"""A tokenizer's chat template: renders turns with a response, and checks that the response stands in the text.

Knows nothing about tokens, lengths or special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_critic.data.conversation import Message, Reply, text_of
from rlhf_critic.errors import EncodingError

RESPONSE_MARK = "\u2402"  # a visible symbol, which no template strips
Change: TypeAlias = Literal["", "white space", "kept whole"]
Tools: TypeAlias = Sequence[dict[str, Any]]  # JSON schemas of the tools that the assistant may call


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def render(self, turns: list[Message], response: Reply, tools: Tools = ()) -> tuple[str, Change]:
        """Renders turns and the response to them. Returns the text and what the template changed of the response.

        If the template dropped or rewrote parts of the response, the text consists of the generation prompt, the whole
        response and the ending instead. White space and EOS tokens that the template strips or adds at the ends of
        parts are left as it writes them.

        Raises:
            EncodingError: The template rejects the turns, or leaves out every response or the calls of tools.
        """
        reply = {"role": "assistant", "content": response} if isinstance(response, str) else response
        text = self._apply([*turns, reply], tools)
        if reply.get("tool_calls"):
            self._check_calls(text, turns, reply, tools)
        content = reply.get("content")
        if not isinstance(response, str) and (not content or (self._reads_parts and not isinstance(content, str))):
            return text, ""
        said_whole = text_of(content)
        if self.known_ending is not None and text.endswith(said_whole + self.known_ending):
            return text, ""
        before, after = self.frame(turns, tools, reply)
        if text.endswith(said_whole + after):
            return text, ""
        said = _without_white_space(said_whole)
        eos = self._tokenizer.eos_token
        while said.endswith(eos):  # which some templates write once
            said = said.removesuffix(eos)
        if _without_white_space(text.removesuffix(after)).removesuffix(eos).endswith(said):
            return text, "white space"
        if not isinstance(response, str):  # the template writes other fields, such as the reasoning, before the text
            return before + said_whole + after, "kept whole"
        bare, generating = self._generation_prompt(turns, tools)
        before = generating or before
        for opening in (generating, generating.rstrip()):
            overlap = _overlap(opening.removeprefix(bare), response)
            if overlap:
                before, response = opening, response[overlap:]
                break
        return before + response + after, "kept whole"

    def _check_calls(self, text: str, turns: list[Message], reply: Message, tools: Tools) -> None:
        without = {"content": "", **{name: value for name, value in reply.items() if name != "tool_calls"}}
        if text == self._apply([*turns, without], tools):
            raise EncodingError(
                "the chat template leaves out the tool calls of the last turn, so there would be nothing to judge; "
                "give a template that writes them (encoding.chat_template)"
            )

    def open(self, turns: list[Message], tools: Tools = ()) -> str:
        """Renders turns with the generation prompt. A template without one gives what it writes before a response.

        Raises:
            EncodingError: The template rejects the turns.
        """
        return self._generation_prompt(turns, tools)[1] or self.frame(turns, tools)[0]

    def frame(self, turns: list[Message], tools: Tools = (), reply: Message | None = None) -> tuple[str, str]:
        """Returns what the template writes before and after the text of a response.

        ``reply`` is the turn of the response, if it has other fields than a text.

        Raises:
            EncodingError: The template rejects the turns, or leaves out the response.
        """
        text = self._apply([*turns, {**(reply or {"role": "assistant"}), "content": RESPONSE_MARK}], tools)
        before, found, after = text.rpartition(RESPONSE_MARK)
        if not found:
            raise EncodingError(
                "the chat template leaves out the assistant's last turn, so there would be nothing to judge; give "
                "another template (encoding.chat_template)"
            )
        return before, after

    @cached_property
    def ending(self) -> str:
        """Text that the template adds after the last response, such as the EOS token."""
        return self.frame([{"role": "user", "content": ""}])[1]

    @cached_property
    def separates_turns(self) -> bool:
        """Whether the template writes more than white space between a question and its answer."""
        question = f"{RESPONSE_MARK}?"
        try:
            before, _ = self.frame([{"role": "user", "content": question}])
        except EncodingError:
            return True
        return bool(before.rpartition(question)[2].strip())

    def begins_with(self, text: str) -> bool:
        """Returns whether the template begins every text with this one."""
        try:
            return self.frame([{"role": "user", "content": "a"}])[0].startswith(text)
        except EncodingError:
            return False

    @cached_property
    def known_ending(self) -> str | None:
        """The ending; None if the template rejects the short conversation from which it is read."""
        try:
            return self.ending
        except EncodingError:
            return None

    def _generation_prompt(self, turns: list[Message], tools: Tools = ()) -> tuple[str, str]:
        """Renders turns without and with the generation prompt. The latter is empty if the template has none."""
        try:
            bare, generating = self._apply(turns, tools), self._apply(turns, tools, add_generation_prompt=True)
        except EncodingError:  # such as a template that rejects a conversation without an answer
            return "", ""
        ended = generating.endswith(self._tokenizer.eos_token)  # a template that only changes the end of a text
        return bare, "" if generating == bare or ended else generating

    def _apply(self, turns: list[Message], tools: Tools = (), **options: bool) -> str:
        return self._apply_as_given([self._with_content(turn) for turn in turns], tools, **options)

    def _apply_as_given(self, turns: list[Message], tools: Tools = (), **options: bool) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(turns, tools=list(tools) or None, tokenize=False, **options))
        except (TemplateError, LookupError, TypeError, ValueError) as error:
            roles = [turn.get("role") for turn in turns]
            raise EncodingError(f"the chat template failed on the roles {roles}: {error}") from error

    def _with_content(self, turn: Message) -> Message:
        """Returns a turn with its content in a form that the template reads: a text, or a list of parts."""
        content = turn.get("content")
        if isinstance(content, list | tuple) and not self._reads_parts:
            return {**turn, "content": text_of(content)}
        return _with_parts(turn) if isinstance(content, str) and self._takes_parts else turn

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template renders contents only if they are lists of parts, as those of some vision models do."""
        probe: list[Message] = [{"role": role, "content": RESPONSE_MARK} for role in ("user", "assistant")]
        rendered = []
        for turns in (probe, [_with_parts(turn) for turn in probe]):
            try:
                rendered.append(RESPONSE_MARK in self._apply_as_given(turns))
            except EncodingError:
                rendered.append(False)
        return rendered == [False, True]

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template itself joins a list of parts, instead of writing it as a list or rejecting it."""
        parts = [{"type": "text", "text": RESPONSE_MARK * length} for length in (1, 2)]
        try:
            text = self._apply_as_given([{"role": "user", "content": parts}])
        except EncodingError:
            return False
        return text.count(RESPONSE_MARK) == 3 and "type" not in text.split(RESPONSE_MARK, 1)[1]


def _with_parts(turn: Message) -> Message:
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def _without_white_space(text: str) -> str:
    return "".join(text.split())


def _overlap(generation_prompt: str, response: str) -> int:
    """Returns the length of what both say, such as ``<think>``: an end of one and start of the other with a word."""
    for length in range(min(len(generation_prompt), len(response)), 0, -1):
        if generation_prompt.endswith(response[:length]):
            return length if response[:length].strip() else 0
    return 0
