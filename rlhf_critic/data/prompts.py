"""Prompts for a policy: data rows, and the token ids from which the policy generates.

Knows nothing about policies, rewards or Ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from rlhf_critic.data.conversation import Prompt, Tools, Turns, to_prompt
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.data.rows import validate_row
from rlhf_critic.data.sources import read_rows
from rlhf_critic.errors import DataError, EncodingError


class PromptRow(BaseModel):
    """Fields that are read. Other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns = Field(
        description="a text, or a list of turns with 'role' and 'content' (see --prompts.fields)"
    )
    tools: Tools = ()


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts.

    Attributes:
        sources: Names of the sources, for messages.
        prompts: Texts, or turns with ``role`` and ``content``, with tools or without.
        ids: Token ids of each prompt, at least one.
        truncated: Number of prompts that were truncated from the left.
    """

    sources: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    truncated: int

    def __len__(self) -> int:
        return len(self.prompts)

    def __str__(self) -> str:
        """Summary in one line."""
        lengths = [len(ids) for ids in self.ids]
        cut = f", {self.truncated} of them truncated from the left" if self.truncated else ""
        return (
            f"{', '.join(self.sources)}: {len(self)} prompts of {min(lengths)} to {max(lengths)} tokens (median "
            f"{np.median(lengths):g}){cut}"
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the token ids. A resumed run compares it to recognise its data."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()

    def select(self, rows: Sequence[int]) -> Prompts:
        """Returns the prompts of some rows."""
        return Prompts(
            self.sources, tuple(self.prompts[row] for row in rows), tuple(self.ids[row] for row in rows), self.truncated
        )


def load_prompts(
    sources: Sequence[str], encoder: Encoder, max_tokens: int, fields: Mapping[str, str] | None = None
) -> Prompts:
    """Reads and encodes the prompts of sources; `rlhf_critic.data.sources` lists the kinds of source.

    Args:
        sources: At least one source. Rows have a field ``prompt``, a text or turns.
        encoder: Encoder with the tokenizer and template of the policy.
        max_tokens: Maximum prompt length in tokens. Longer prompts are truncated from the left and counted.
        fields: Name of the prompt field in this data, as ``{"prompt": NAME}``.

    Raises:
        DataError: Names the file, line and field at fault, such as a prompt that the template rejects.
    """
    name = (fields or {}).get("prompt", "prompt")
    prompts: list[Prompt] = []
    all_ids: list[tuple[int, ...]] = []
    truncated = 0
    for source in sources:
        for number, row in read_rows(source):
            place = f"{source}:{number}"
            parsed = validate_row(PromptRow, row, place, fields or {})
            prompt = to_prompt(parsed.prompt, parsed.tools)
            try:
                ids = encoder.encode_opening(prompt)
            except EncodingError as error:
                raise DataError(f"{place}: field {name!r}: {error}") from error
            if not ids:
                raise DataError(
                    f"{place}: field {name!r}: has no token, but a policy must read one before it samples; "
                    "remove this row, or use a chat template that begins with a token"
                )
            truncated += len(ids) > max_tokens
            prompts.append(prompt)
            all_ids.append(tuple(ids[-max_tokens:]))
    return Prompts(tuple(sources), tuple(prompts), tuple(all_ids), truncated)


def split_prompts(prompts: Prompts, fraction: float, seed: int) -> tuple[Prompts, Prompts]:
    """Splits prompts into training and held-out prompts. Equal prompts stay together.

    Raises:
        DataError: One part would be empty.
    """
    rows_of_ids: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(prompts.ids):
        rows_of_ids.setdefault(ids, []).append(row)
    groups = list(rows_of_ids.values())
    chosen = set(np.random.default_rng(seed).permutation(len(groups))[: round(fraction * len(groups))].tolist())
    if not 0 < len(chosen) < len(groups):
        raise DataError(
            f"{', '.join(prompts.sources)}: a fraction of {fraction} of {len(groups)} different prompts leaves nothing "
            "to train on or nothing to hold out; give more prompts or another --prompts.validation-fraction"
        )
    parts: tuple[list[int], list[int]] = ([], [])
    for group, rows in enumerate(groups):
        parts[group in chosen].extend(rows)
    return prompts.select(sorted(parts[0])), prompts.select(sorted(parts[1]))
