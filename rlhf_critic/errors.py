"""Typed errors of this project.

Each message names the cause (option, file, line, key) and the next step. The classes take plain arguments only, so that
they survive pickling on their way out of an actor.
"""

from __future__ import annotations

from collections.abc import Sequence


class CriticError(Exception):
    """Base of all typed errors of this project."""


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
