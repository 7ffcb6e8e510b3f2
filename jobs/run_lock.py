"""A lock beside a run's directory, so that one job at a time works on the run. It ends with the process that holds it.

Knows nothing about what a run is. An object store has no locks, so nothing prevents two jobs on one run there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock, Timeout

from actors.runtime.storage import resolve_run
from rlhf_critic.errors import ConfigError

logger = logging.getLogger(__name__)


@contextmanager
def lock_run(storage_path: str, name: str) -> Iterator[None]:
    """Locks a run for the duration of the block.

    Args:
        storage_path: The directory of all runs, a path or URI; created if it is missing.
        name: The name of the run.

    Raises:
        ConfigError: Another job holds the lock, or the directory cannot be written.
    """
    filesystem, path = resolve_run(storage_path, name)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield
        return
    lock = FileLock(Path(path).parent / f".{name}.lock")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"another job is at work on the run {name!r} in {storage_path}: wait until it ends, stop it, or choose "
            "another --run.name"
        ) from None
    except NotImplementedError:
        logger.warning("no file locks, so run only one job on this run path=%s run=%s", storage_path, name)
    except OSError as error:
        raise ConfigError(f"run.storage_path {storage_path}: cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()
