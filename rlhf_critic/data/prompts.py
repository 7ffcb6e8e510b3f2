"""Prompts that a policy is to answer: rows of data, and the token ids from which it goes on.

Knows nothing of policies, rewards or Ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from rlhf_critic.data.conversation import Prompt, Turns, to_prompt
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.data.rows import validate_row
from rlhf_critic.data.sources import read_rows
from rlhf_critic.errors import DataError, EncodingError


class PromptRow(BaseModel):
    """The field that is read; others are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    prompt: StrictStr | Turns = Field(
        description="a text, or a list of turns with 'role' and 'content' (see --prompts.fields)"
    )


@dataclass(frozen=True)
class Prompts:
    """Prompts, encoded.

    Attributes:
        sources: Where they come from, for messages.
        prompts: Texts, or turns with ``role`` and ``content``.
        ids: For each the token ids that come before a response; at least one.
        truncated: How many lost their beginning to the length limit.
    """

    sources: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...]
    truncated: int

    def __len__(self) -> int:
        return len(self.prompts)

    def __str__(self) -> str:
        """What was read, in a line."""
        lengths = [len(ids) for ids in self.ids]
        cut = f", {self.truncated} of them lost their beginning" if self.truncated else ""
        return (
            f"{', '.join(self.sources)}: {len(self)} prompts of {min(lengths)} to {max(lengths)} tokens (median "
            f"{np.median(lengths):g}){cut}"
        )

    @property
    def fingerprint(self) -> str:
        """A hash of the token ids, by which a resumed run knows its data again."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()

    def select(self, rows: Sequence[int]) -> Prompts:
        """Some of them."""
        return Prompts(
            self.sources,
            tuple(self.prompts[row] for row in rows),
            tuple(self.ids[row] for row in rows),
            self.truncated,
        )


def load_prompts(
    sources: Sequence[str], encoder: Encoder, max_tokens: int, fields: Mapping[str, str] | None = None
) -> Prompts:
    """Reads the prompts of some sources; see `rlhf_critic.data.sources.read_rows` for what a source may be.

    Args:
        sources: At least one; rows have a field ``prompt``, a text or turns.
        encoder: With the policy's tokenizer and template.
        max_tokens: The most tokens of a prompt; longer ones lose their beginning, and are counted.
        fields: Another name of the field in this data: ``{"prompt": theirs}``.

    Raises:
        DataError: Names the file, line and field at fault, such as a prompt that the template refuses.
    """
    name = (fields or {}).get("prompt", "prompt")
    prompts: list[Prompt] = []
    all_ids: list[tuple[int, ...]] = []
    truncated = 0
    for source in sources:
        for number, row in read_rows(source):
            place = f"{source}:{number}"
            prompt = to_prompt(validate_row(PromptRow, row, place, fields or {}).prompt)
            try:
                opening = encoder.open(prompt)
                opening.encode("utf-8")  # which half of a surrogate pair, as JSON may hold it, has not
            except (EncodingError, UnicodeEncodeError) as error:
                raise DataError(f"{source}:{number}: field {name!r}: {error}") from error
            ids = encoder.tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"]
            if not ids:
                raise DataError(
                    f"{source}:{number}: field {name!r}: has no token, and a policy draws its first one after reading "
                    "one: leave the row out, or use a chat template that begins with a token"
                )
            truncated += len(ids) > max_tokens
            prompts.append(prompt)
            all_ids.append(tuple(ids[-max_tokens:]))
    return Prompts(tuple(sources), tuple(prompts), tuple(all_ids), truncated)


def split_prompts(prompts: Prompts, fraction: float, seed: int) -> tuple[Prompts, Prompts]:
    """Prompts to train on and prompts held out, none in both: equal ones stay together.

    Raises:
        DataError: One of the two would be empty.
    """
    of_ids: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(prompts.ids):
        of_ids.setdefault(ids, []).append(row)
    groups = list(of_ids.values())
    chosen = set(np.random.default_rng(seed).permutation(len(groups))[: round(fraction * len(groups))].tolist())
    if not 0 < len(chosen) < len(groups):
        raise DataError(
            f"{', '.join(prompts.sources)}: a fraction of {fraction} of {len(groups)} different prompts leaves nothing "
            "to train or nothing to hold out: give more prompts or another --prompts.validation-fraction"
        )
    parts: tuple[list[int], list[int]] = ([], [])
    for group, rows in enumerate(groups):
        parts[group in chosen].extend(rows)
    return prompts.select(sorted(parts[0])), prompts.select(sorted(parts[1]))
