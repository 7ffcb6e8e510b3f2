"""Judged preferences: one JSON object a line, in a file that training reads and many processes append to.

Knows nothing about HTTP, tokens or models.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from rlhf_critic.data.conversation import Prompt
from rlhf_critic.data.preference_schema import parse_row
from rlhf_critic.errors import ConfigError, DataError

LOCK_TIMEOUT_S = 10.0
POLL_S = 0.02


def preference_line(prompt: Prompt, chosen: str, rejected: str, **about: Any) -> str:
    """Returns a judged preference as a line of JSON, without its end.

    Args:
        prompt: Text, or turns with ``role`` and ``content``.
        chosen: The better response.
        rejected: The other response.
        **about: Further fields, which training ignores.

    Raises:
        DataError: Training would reject the row, or read another preference from it.
    """
    place = "this judgement"
    if chosen == rejected:
        raise DataError(f"{place}: fields 'chosen' and 'rejected' are equal; judge two different answers")
    line = json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, **about}, ensure_ascii=False)
    read = parse_row(place, json.loads(line), {}).conversations()
    if read != [(prompt, chosen), (prompt, rejected)]:
        raise DataError(
            f"{place}: training would take a part of an answer for the prompt, because the texts are written as a "
            "transcript; give the prompt as a list of turns"
        )
    return line


def prepare_file(path: str | Path) -> str:
    """Creates the file if it is missing, and returns its absolute path.

    Raises:
        ConfigError: It cannot be written, or is no ordinary file.
    """
    file = Path(path).expanduser().absolute()
    try:
        with file.open("ab"):
            is_file = file.is_file()
    except OSError as error:
        raise ConfigError(f"collect: {file} cannot be written: {error.strerror}; name another file") from error
    if not is_file:
        raise ConfigError(f"collect: {file} is no ordinary file; name another file")
    return str(file)


def append_line(path: str | Path, line: str) -> None:
    """Appends one line as a whole. Several processes and threads may append to a file at once.

    A line is written in one call under a lock of the file. If it cannot be written completely, the file gets its
    previous length again. A previous last line without an end is ended first.

    Raises:
        OSError: The line cannot be written, or another process holds the lock for too long.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor)  # closing the file frees it
        length = os.fstat(descriptor).st_size
        begin = b"\n" if length and os.pread(descriptor, 1, length - 1) != b"\n" else b""
        data = begin + line.encode("utf-8") + b"\n"
        try:
            if os.write(descriptor, data) != len(data):
                raise OSError("the line was written in part only: free some space")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, length)
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise OSError(f"another process holds the lock for {LOCK_TIMEOUT_S:g} s") from error
            time.sleep(POLL_S)
