"""A replica's swap from the configuration that it serves to the one that it was given last, with retries.

A swap may fail for a while: a file system or a store that does not answer, or memory that is not free yet. The replica
then serves the previous critic and tries again, because nobody else may be there to publish once more. Knows nothing
about Serve or how a critic is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 2.0
MAX_WAIT_S = 30.0  # a pool must not serve two critics for more than a minute after the cause of a failure is gone


class Swap:
    """The wanted configuration, the served one, and the task that loads the former. Used in one event loop.

    Args:
        serving: The configuration that is loaded already.
        load: Loads a configuration and starts to serve it. Runs in a thread. If it raises, the previous one is served.
        report: Called after every attempt.

    Attributes:
        wanted: The configuration that the replica was given last.
        serving: The configuration that it serves.
        error: Why ``wanted`` is not served; empty while the first attempt runs and when it is served.
        failures: Number of failed attempts to serve ``wanted``.
    """

    def __init__(
        self, serving: dict[str, Any], load: Callable[[dict[str, Any]], None], report: Callable[[], None]
    ) -> None:
        self.wanted = self.serving = serving
        self.error = ""
        self.failures = 0
        self._load, self._report = load, report
        self._retry_at = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def is_current(self) -> bool:
        """Whether the wanted configuration is served."""
        return self.wanted == self.serving

    def want(self, config: dict[str, Any]) -> None:
        """Takes a new configuration and starts to load it."""
        self.wanted, self.error, self.failures, self._retry_at = config, "", 0, 0.0
        self.proceed()

    def proceed(self) -> None:
        """Starts another attempt if the last one failed and its waiting time is over. Call it periodically."""
        is_idle = self._task is None or self._task.done()
        if not self.is_current and is_idle and time.monotonic() >= self._retry_at:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Loads the latest configuration, until it is served or fails to load."""
        while not self.is_current:
            wanted = self.wanted
            try:
                await asyncio.to_thread(self._load, wanted)
                self.serving = wanted
            except Exception as error:
                if self.wanted == wanted:
                    self._on_failure(error)
                    return
            finally:
                self._report()
        self.error, self.failures = "", 0

    def _on_failure(self, error: Exception) -> None:
        self.error = str(error) or type(error).__name__
        wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2**self.failures)
        self.failures += 1
        self._retry_at = time.monotonic() + wait_s
        message = "cannot serve the published critic; keeping the previous one failures=%d retry_in_s=%.0f"
        logger.exception(message, self.failures, wait_s)
