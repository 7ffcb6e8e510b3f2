"""Processes that apply one function to many items, in order. Knows nothing about what the function does.

A worker starts as ``python -m rlhf_critic.data.processes`` and imports the function by name. So it neither inherits the
threads of its parent, as a fork would, nor imports the parent's main module, as `multiprocessing` would: the parent may
be an interactive session, a script without a guard or an actor.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, TypeVar

from rlhf_critic.errors import UnexpectedError

END_TIMEOUT_S = 10.0
Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item], processes: int
) -> Iterator[Result]:
    """Applies ``function(shared, item)`` to all items in several processes, and yields the results in order.

    Args:
        function: Function of a module that workers can import.
        shared: First argument of all calls. It is pickled once for each process.
        items: Second arguments. One item, or one process, is computed here.
        processes: Maximum number of processes.

    Raises:
        Exception: What the function raised for the first item for which it did.
        UnexpectedError: A process was killed.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        yield from (function(shared, item) for item in items)
        return
    workers = [_Worker(function, shared) for _ in range(processes)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def apply(item: Item) -> Result:
        worker = idle.get()
        try:
            result: Result = worker.apply(item)
            return result
        finally:
            idle.put(worker)

    executor = ThreadPoolExecutor(processes)
    try:
        yield from executor.map(apply, items)
    finally:
        for worker in workers:
            worker.end()
        executor.shutdown(cancel_futures=True)


class _Worker:
    """The parent's side of one process."""

    def __init__(self, function: Callable[..., Any], shared: object) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "rlhf_critic.data.processes"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._first: tuple[Callable[..., Any], object] | None = (function, shared)

    def apply(self, item: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if self._first is not None:
                _send(self._process.stdin, self._first)
                self._first = None
            _send(self._process.stdin, item)
            is_error, result = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
            raise UnexpectedError(
                f"a process that prepares data ended with exit code {self._process.poll()} (killed, or out of memory?)"
            ) from error
        if is_error:
            raise result
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent yet has no reader
                    pipe.close()


def _send(pipe: IO[bytes], value: object) -> None:
    pipe.write(pickle.dumps(value))
    pipe.flush()


def _serve() -> None:
    """Reads a function and its first argument, then items, from standard input, and writes results to the output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not mix with the answers
    questions = sys.stdin.buffer
    function, shared = pickle.load(questions)
    while True:
        try:
            item = pickle.load(questions)
        except EOFError:
            return
        try:
            answer = pickle.dumps((False, function(shared, item)))
        except Exception as error:
            answer = pickle.dumps((True, error))
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    _serve()
