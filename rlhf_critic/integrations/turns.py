"""Turns of conversations as they come out of a trainer's table of data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_critic.data.encoding import Message


def present_fields(turns: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Turns without their fields that are None: a table gives every turn all the fields that any turn has.

    Training leaves such fields out too (`rlhf_critic.data.preference_schema.Turn`), so the text is the same.
    """
    return [{name: value for name, value in turn.items() if value is not None} for turn in turns]
