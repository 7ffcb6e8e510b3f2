"""The errors this project raises on purpose.

Each message names what is at fault (option, file, line, key) and says what to do. The classes take plain arguments
only, so that they survive pickling on their way out of an actor.
"""

from __future__ import annotations

from collections.abc import Sequence


class CriticError(Exception):
    """Base of every error raised on purpose by this project."""


class ConfigError(CriticError):
    """An option is unknown, missing or out of range."""


class DataError(CriticError):
    """A preference file cannot be read; the message names file, line and field."""


class EncodingError(CriticError):
    """A text cannot be turned into token ids that have an unambiguous end.

    Args:
        message: Which, and why.
        index: Its place among the texts that were given, where there were several.
    """

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message, index)
        self.message = message
        self.index = index

    def __str__(self) -> str:
        return self.message


class CheckpointError(CriticError):
    """A model or checkpoint directory is missing, incomplete, damaged or does not fit."""


class PlacementError(CriticError):
    """The cluster has no room for the workers, and got none in time."""


class RankLost(CriticError):
    """A rank of a group was lost, failed, or did not answer in time; the group has ended and must be started again."""


class RolloutsUnavailable(CriticError):
    """Rollout workers did not deliver in time, or were lost again and again."""


class DivergedError(CriticError):
    """The policy ran away from its reference, or a number became NaN; the checkpoints saved before are untouched."""


class NonFiniteRewardError(CriticError):
    """A critic gives rewards that are NaN or infinite."""


class ComponentError(CriticError):
    """A component of a reward that the user wrote failed, or did not return numbers."""


class ScorerRejected(CriticError):
    """A scorer cannot score what it was asked to, and would not the next time either.

    Args:
        kind: A word for what is at fault, the same for every message about it, such as ``too_many_items``.
        message: What is at fault and what to do.
        item: The index of the item at fault, where it is one.
    """

    def __init__(self, kind: str, message: str, item: int | None = None) -> None:
        super().__init__(kind, message, item)
        self.kind = kind
        self.message = message
        self.item = item

    def __str__(self) -> str:
        return self.message

    def after(self, items: int) -> ScorerRejected:
        """The same refusal as seen by a caller whose call was split, with so many items before this part."""
        if self.item is None:
            return self
        item = self.item + items
        return ScorerRejected(self.kind, self.message.replace(f"item {self.item}", f"item {item}", 1), item)


class ScorerUnavailable(CriticError):
    """No scorer answered before the deadline: none is there, all are busy, or those that were asked died."""


class ScorerFailed(CriticError):
    """A scorer failed while it was scoring, for a reason that lies neither in what it was asked nor in its absence."""


class VersionMismatch(CriticError):
    """The scorers serve another version of the critic than the one that was asked for, or several at once."""


class NonFiniteLossError(CriticError):
    """The loss, its gradient or a validation reward became NaN or infinite; nothing was saved after that.

    Args:
        step: Optimizer steps done before.
        rows: Where the offending preferences come from, as ``file:line``.
    """

    MAX_ROWS_SHOWN = 16

    def __init__(self, step: int, rows: Sequence[str]) -> None:
        super().__init__(step, list(rows))
        self.step = step
        self.rows = list(rows)

    def __str__(self) -> str:
        shown = ", ".join(self.rows[: self.MAX_ROWS_SHOWN])
        more = len(self.rows) - self.MAX_ROWS_SHOWN
        return (
            f"the loss is not finite at step {self.step} (or its gradient, or a validation reward); the checkpoints "
            f"saved before are untouched. Preferences: {shown}{f' and {more} more' if more > 0 else ''}. "
            "Look at these rows, or start a new run with a lower --train.learning-rate; --model.path may be a "
            "checkpoint of this one."
        )
