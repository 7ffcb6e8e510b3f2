"""Ray Train's cleaner of placement groups, without the traceback that it prints where Ray's dashboard does not answer.

The cleaner asks the dashboard every second whether the run's controller is alive. Its thread ends with a traceback at
an answer that it does not expect, such as none while Ray starts or ends. Knows nothing about training.
"""

from __future__ import annotations

import logging
from typing import Any

from actors.runtime.ray_internals import PlacementGroupCleaner, PlacementGroupCleanerCallback, placement_group_callback
from rlhf_critic.logs import configure_logging

logger = logging.getLogger(__name__)

WAIT_S = 1.0


class QuietCleaner(PlacementGroupCleaner):
    """A cleaner that asks again after any error."""

    _registered: Any = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        configure_logging()  # this process logs only here
        super().__init__(*arguments, **options)

    def register_placement_group(self, placement_group: Any) -> None:
        """Registers the placement group to remove when the controller is gone."""
        self._registered = placement_group
        super().register_placement_group(placement_group)

    def _monitor_loop(self) -> None:
        while not self._stop_event.is_set():
            try:
                super()._monitor_loop()
                return
            except Exception:
                logger.debug("the state of the controller is unknown, asking again", exc_info=True)
                if self._registered is not None:
                    self._pg_queue.put(self._registered)
                self._stop_event.wait(WAIT_S)

    def _stop_monitor_thread(self) -> bool:
        thread = self._monitor_thread  # it sets the attribute to None when it ends
        if thread is None:
            return False
        self._stop_event.set()
        thread.join(self._stop_timeout)
        return not thread.is_alive()


class QuietCleanerCallback(PlacementGroupCleanerCallback):
    """Ray Train's callback, which starts the cleaner above."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Starts the cleaner; runs in Ray Train's controller."""
        placement_group_callback.PlacementGroupCleaner = QuietCleaner
        super().after_controller_start(train_run_context)


def with_quiet_cleaner(callbacks: list[Any]) -> list[Any]:
    """Replaces Ray Train's own cleaner in a list of callbacks."""
    return [QuietCleanerCallback() if type(one) is PlacementGroupCleanerCallback else one for one in callbacks]
