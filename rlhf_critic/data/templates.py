"""Chat templates: the shipped ones, and changes to the begin and end of any template. Knows nothing about models.

Shipped are ``plain`` and the encodings of other systems, written from their code: OpenRLHF 0.11.2
(``RewardDataset``), and Cong Chen's "Reward Modeling Practice" (the article).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_critic.config.model import (
    ARTICLE_TEMPLATE_NAME,
    AUTO_TEMPLATE,
    OPENRLHF_PLAIN_TEMPLATE_NAME,
    OPENRLHF_TEMPLATE_NAME,
    PLAIN_TEMPLATE_NAME,
    SHIPPED_TEMPLATE_NAMES,
)
from rlhf_critic.errors import EncodingError

# A template that reads the current date would give another reward tomorrow, so it gets this date.
PINNED_DATE_MACRO = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}"

JOINED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PLAIN = JOINED + "{{ eos_token }}"
ARTICLE = "{% for message in messages %}{{ message['content'] }}{{ '\\n<|im_end|>' if loop.last else ' ' }}{% endfor %}"
# OpenRLHF removes the line breaks at the end of every text, and adds an EOS, after a space, where there is none.
OPENRLHF_END = (
    "{% if add_generation_prompt %}{{ text }}{% else %}{% set text = text.rstrip('\\n') %}{{ text }}"
    "{% if not text.endswith(eos_token) %}{{ ' ' + eos_token }}{% endif %}{% endif %}"
)
# Removes every TOKEN at the end of the text. The last of the parts between tokens are empty there.
WITHOUT_TRAILING_END = (
    "{% if add_generation_prompt %}{{ text }}{% else %}{% set parts = text.split(TOKEN) %}"
    "{% set end = namespace(length=0) %}"
    "{% for part in parts %}{% if part %}{% set end.length = loop.index %}{% endif %}{% endfor %}"
    "{{ parts[:end.length] | join(TOKEN) }}{% endif %}"
)
# A SentencePiece tokenizer puts a space before the first word of a text, but not before a word after a special token.
BOS_AND_SPACE = "{{ bos_token }}{{ ' ' if text and not text.startswith(BEGINNINGS) }}{{ text }}"
BOS_PROBES = ("a", "Ab c", " a", "  a", "\na", "\ta", "1", ".", "\u00e9", "\u2581a", "a\nb  c", "")


def resolve_template(
    tokenizer: PreTrainedTokenizerBase, choice: str, begins_with_bos: bool, fixes_date: bool = True
) -> str:
    """Returns the source of a chat template.

    Args:
        tokenizer: The tokenizer, with its own template and post-processor.
        choice: ``auto``, the name of a shipped template, or the path of a Jinja file.
        begins_with_bos: Whether the tokenizer begins texts with BOS.
        fixes_date: Whether a template that asks for the current date gets a fixed one.

    Raises:
        EncodingError: The file cannot be read, or the tokenizer has several templates or an unknown kind of BOS.
    """

    def joined(template: str) -> str:
        return _with_bos(tokenizer, template) if begins_with_bos else template

    shipped: dict[str, Callable[[], str]] = {
        PLAIN_TEMPLATE_NAME: lambda: joined(PLAIN),
        ARTICLE_TEMPLATE_NAME: lambda: joined(ARTICLE),
        OPENRLHF_PLAIN_TEMPLATE_NAME: lambda: changed(JOINED, OPENRLHF_END),
        OPENRLHF_TEMPLATE_NAME: lambda: changed(tokenizer.chat_template or JOINED, OPENRLHF_END),
        AUTO_TEMPLATE: lambda: tokenizer.chat_template or joined(PLAIN),
    }
    if choice in {AUTO_TEMPLATE, OPENRLHF_TEMPLATE_NAME} and not isinstance(tokenizer.chat_template, str | None):
        raise EncodingError("the tokenizer has several chat templates; pass one of them as a file in chat_template")
    template = shipped[choice]() if choice in shipped else _template_file(choice)
    if fixes_date and "strftime_now" in template and not template.startswith(PINNED_DATE_MACRO):
        template = PINNED_DATE_MACRO + template
    return template


def template_name(choice: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the name of the chosen template, for logs and names of versions. ``auto`` may have chosen ``plain``."""
    is_plain = choice == AUTO_TEMPLATE and PLAIN in str(tokenizer.chat_template)
    return PLAIN_TEMPLATE_NAME if is_plain else Path(choice).stem


def without_trailing(template: str, token: str) -> str:
    """Returns a template whose texts do not end with a token, even if a response does."""
    return changed(template, WITHOUT_TRAILING_END.replace("TOKEN", json.dumps(token)))


def changed(template: str, change: str) -> str:
    """Returns a template that renders another one as ``text`` and then renders ``change``."""
    # Jinja drops one line break at the end of a source, and with transformers' settings one after a tag.
    date = PINNED_DATE_MACRO if template.startswith(PINNED_DATE_MACRO) else ""
    source = template.removeprefix(date).removesuffix("\n")
    return f"{date}{{% set text +%}}{source}{{%+ endset %}}{change}"


def _template_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(SHIPPED_TEMPLATE_NAMES)
        raise EncodingError(
            f"chat_template {path!r} is not 'auto', 'plain' or a readable file: {error}; shipped templates: {names}"
        ) from error


def _with_bos(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Adds BOS in front of a template that joins texts, so that the ids are the tokenizer's own.

    Raises:
        EncodingError: No way of writing BOS gives the tokenizer's own ids.
    """

    def ids(source: str, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        rendered = str(tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False))
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    probes = [*BOS_PROBES, f"{tokenizer.eos_token}a"]
    own = [[tokenizer.bos_token_id, *ids(template, probe)] for probe in probes]
    beginnings = json.dumps([" ", "\u2581", *tokenizer.all_special_tokens])
    spaced = changed(template, BOS_AND_SPACE.replace("BEGINNINGS", f"({beginnings[1:-1]})"))
    for with_bos in ("{{ bos_token }}" + template, spaced):
        if [ids(with_bos, probe) for probe in probes] == own:
            return with_bos
    raise EncodingError(
        f"the tokenizer of {tokenizer.name_or_path!r} adds {tokenizer.bos_token!r} in front of texts, but a text that "
        "begins with these characters gets other ids. Write a chat template that gives the ids you want, and pass its "
        "file in chat_template"
    )
