"""Concurrent work of the driver of a PPO run: several groups at once, and the seconds of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")


def run_concurrently(
    *actions: Callable[[], Any], on_failure: Callable[[BaseException], object] = lambda _: None
) -> tuple[Any, ...]:
    """Runs actions in threads, waits for all, and raises the error of the one that failed first.

    ``on_failure`` is called with that error while other actions may still be at work, which it can end.
    """
    with ThreadPoolExecutor(len(actions)) as threads:
        futures = [threads.submit(action) for action in actions]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failure = next((error for future in futures if future in done and (error := future.exception())), None)
        if failure is not None:
            on_failure(failure)
    if failure is not None:
        raise failure
    return tuple(future.result() for future in futures)


def timed(action: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """Returns the result of an action, and its seconds."""
    started = time.perf_counter()
    result = action(*arguments)
    return result, time.perf_counter() - started
