"""One job at a time works on a run: a lock beside the run's directory, which ends with the process that holds it.

Knows nothing of what a run is. An object store has no locks: there, nobody is kept from starting a run twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock, Timeout

from actors.runtime.storage import resolve_run
from rlhf_critic.errors import ConfigError


@contextmanager
def lock_run(storage_path: str, name: str) -> Iterator[None]:
    """Holds a run for the block.

    Args:
        storage_path: Where runs are, a path or URI; made if it is not there.
        name: Of the run.

    Raises:
        ConfigError: Another job holds it, or nothing can be written there.
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
            f"another job is at work on the run {name!r} in {storage_path}: wait for its end, stop it, or choose "
            "another --run.name"
        ) from None
    except NotImplementedError:
        print(f"warning: {storage_path} has no file locks: see that no other job works on the run {name!r}")
    except OSError as error:
        raise ConfigError(f"run.storage_path {storage_path}: cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()
