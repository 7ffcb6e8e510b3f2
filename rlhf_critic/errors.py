"""Typed errors of this project, and the description of any other error as one of them.

Each message names the cause (option, file, line, key) and the next step. The classes take plain arguments only, so that
they survive pickling on their way out of an actor.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # a full disk, or a user's quota
WRONG_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
# An accelerator's error has a class of its own; torch reports a lack of host memory as a RuntimeError.
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
OUT_OF_HOST_MEMORY = "can't allocate memory"
SHOWN_CHARACTERS = 500
TRACEBACK = "Traceback (most recent call last)"
ROOMS = ("rlhf_critic", "actors", "jobs")
# A frame of a traceback: the first directory of this project in its path, the rest of the path, the line.
FRAME = re.compile(r'File "(?:[^"]*/(?=(?:rlhf_critic|actors|jobs)/))?([^"/]*)/?([^"]*)", line (\d+)')


class CriticError(Exception):
    """Base of all typed errors of this project.

    Attributes:
        exit_code: Exit code of a command that ends with this error: 2 if the user can change something, else 1.
        trace: Traceback of the error that caused this one, as text; empty if there is none.
    """

    exit_code = 2
    trace = ""


class UnexpectedError(CriticError):
    """A fault of the program, a library or the machine that no other class describes. A retry would meet it again."""

    exit_code = 1


class ConfigError(CriticError):
    """An option is unknown, missing or out of range."""


class DataError(CriticError):
    """Data cannot be read. The message names file, line and field."""


class EncodingError(CriticError):
    """A text cannot be encoded as token ids with an unambiguous end.

    Args:
        message: Text and cause.
        index: Index of the text, if several were given.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message, index)
        self.message = message
        self.index = index

    def __str__(self) -> str:
        return self.message


class CheckpointError(CriticError):
    """A model or checkpoint directory is missing, incomplete, damaged or incompatible."""


class PlacementError(CriticError):
    """The cluster did not provide the resources for the workers in time."""


class RankLost(CriticError):
    """A rank of a group died, failed, or did not answer in time. The group has ended and must be started again."""


class RankFailed(RankLost):
    """A rank of a group failed with an error that another group would meet again. The group has ended."""


class RolloutsUnavailable(CriticError):
    """Rollout workers did not answer in time, or died repeatedly."""


class DivergedError(CriticError):
    """The policy diverged from its reference, or a number became NaN. Earlier checkpoints are intact."""


class NonFiniteRewardError(CriticError):
    """A reward is NaN or infinite."""


class ComponentError(CriticError):
    """A user's reward component failed or did not return numbers."""


class ScorerRejected(CriticError):
    """A scorer rejected a request. Repeating the same request fails again.

    Args:
        kind: Name of the cause, such as ``too_many_items``.
        message: Cause and next step.
        item: Index of the item at fault, if any.
    """

    def __init__(self, kind: str, message: str, item: int | None = None) -> None:
        super().__init__(kind, message, item)
        self.kind = kind
        self.message = message
        self.item = item

    def __str__(self) -> str:
        return self.message

    def after(self, items: int) -> ScorerRejected:
        """Returns the same error with its item index shifted by ``items``, the number of items in earlier parts."""
        if self.item is None:
            return self
        item = self.item + items
        return ScorerRejected(self.kind, self.message.replace(f"item {self.item}", f"item {item}", 1), item)


class ScorerUnavailable(CriticError):
    """No scorer answered before the deadline, because none is running, all are busy, or those called died."""


class ScorerLost(ScorerUnavailable):
    """The scorer that was working on a call died. A retry helps, unless an item of the call killed it."""


class ScorerFailed(CriticError):
    """A scorer failed with an internal error during scoring."""


class VersionMismatch(CriticError):
    """The scorers serve another version of the critic than the requested one, or several at once."""


class NonFiniteLossError(CriticError):
    """The loss, its gradient or a validation reward became NaN or infinite. Nothing was saved after that.

    Args:
        step: Number of optimizer steps completed before.
        rows: Origins of the preferences in the failed step, as ``file:line``.
    """

    def __init__(self, step: int, rows: Sequence[str]) -> None:
        super().__init__(step, list(rows))
        self.step = step
        self.rows = list(rows)

    def __str__(self) -> str:
        more = f" and {len(self.rows) - 16} more" if len(self.rows) > 16 else ""
        return (
            f"the loss is not finite at step {self.step} (or its gradient, or a validation reward). The checkpoints "
            f"saved before are intact. Preferences: {', '.join(self.rows[:16])}{more}. "
            "Check these rows, or start a new run with a lower --train.learning-rate; --model.path may be a "
            "checkpoint of this one."
        )


def describe_error(error: BaseException) -> CriticError:
    """Returns a typed error for any error, with its traceback in ``trace``.

    Lack of memory, a full disk, a path that cannot be used and a missing package are settings of the user. Anything
    else becomes an `UnexpectedError` with type, message and line.
    """
    # Ray wraps the error of a task, with the traceback of the task's process in its text.
    cause = getattr(error, "cause", None)
    trace = str(error) if isinstance(cause, BaseException) else "".join(traceback.format_exception(error))
    error = cause if isinstance(cause, BaseException) else error
    described = error if isinstance(error, CriticError) else _describe(error, trace)
    described.trace = described.trace or trace
    return described


def _describe(error: BaseException, trace: str) -> CriticError:
    text = str(error).strip()
    if TRACEBACK in text:  # Ray's errors have that of another process in their text, with the error in its last line
        text = text.splitlines()[-1]
    text = " ".join(text.split())
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS // 2]} ... {text[-SHOWN_CHARACTERS // 2 :]}"
    if type(error).__name__ in OUT_OF_MEMORY or OUT_OF_HOST_MEMORY in text:
        return ConfigError(
            f"out of memory: {text}. Lower the token budget or the maximum length, use gradient checkpointing, or "
            "shard the model over more ranks at ZeRO stage 3; rlhf-critic plan calculates the memory"
        )
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return CheckpointError(f"{text}; checkpoints written before are complete. Free some space")
    if isinstance(error, OSError) and error.errno in WRONG_PLACE and error.filename is not None:
        name = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else error.filename
        return ConfigError(f"{name}: {error.strerror}; check that the path exists and can be used, or give another")
    if isinstance(error, ImportError):
        return ConfigError(f"a package is missing or does not fit: {text}. Install it, or leave out what needs it")
    lines = FRAME.findall(trace)
    ours = [line for line in lines if line[0] in ROOMS] or lines
    place = f" at {Path(*ours[-1][:2])}:{ours[-1][2]}" if ours else ""
    return UnexpectedError(f"{type(error).__name__}{place}: {text or 'no message'}")
