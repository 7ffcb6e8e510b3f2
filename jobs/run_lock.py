"""The name of a run: free, to be resumed, or locked by the job at work on it.

The lock of a directory is beside it and ends with the process that holds it. An object store has no locks, so nothing
prevents two jobs on one run there. Knows nothing about what a job does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock, Timeout

from actors.runtime.storage import HISTORY_FOLDER, remove_leftover, resolve_run, run_exists
from rlhf_critic.errors import ConfigError

logger = logging.getLogger(__name__)


@contextmanager
def lock_run(storage_path: str, name: str) -> Iterator[None]:
    """Locks a run for the duration of the block. A block that fails before the run has a history leaves no directory.

    Args:
        storage_path: The directory of all runs, a path or URI; created if it is missing.
        name: The name of the run.

    Raises:
        ConfigError: Another job holds the lock, or the directory cannot be written.
    """
    with _lock(storage_path, name):
        try:
            yield
        except BaseException:
            filesystem, path = resolve_run(storage_path, name)
            with suppress(OSError):  # the error of the block is the one to report
                history = filesystem.get_file_info(f"{path}/{HISTORY_FOLDER}")
                if history.type == pafs.FileType.NotFound and not run_exists(filesystem, path):
                    remove_leftover(filesystem, *path.rsplit("/", 1))
            raise


@contextmanager
def _lock(storage_path: str, name: str) -> Iterator[None]:
    filesystem, path = resolve_run(storage_path, name)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield
        return
    taken = (
        f"another job is at work on the run {name!r} in {storage_path}: wait until it ends, stop it, or choose another "
        "--run.name"
    )
    with lock_directory(Path(path), f"run.storage_path {storage_path}", taken):
        yield


@contextmanager
def lock_directory(directory: Path, what: str, taken: str) -> Iterator[None]:
    """Locks a directory for the duration of the block. Its parent is created if it is missing.

    Args:
        directory: The directory, which need not exist.
        what: The option that names it, with its value, for messages.
        taken: The message if another process holds the lock.

    Raises:
        ConfigError: Another process holds the lock, or the parent cannot be written.
    """
    lock = FileLock(directory.parent / f".{directory.name}.lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(taken) from None
    except NotImplementedError:
        logger.warning("no file locks, so run only one job on this directory path=%s", directory)
    except OSError as error:
        raise ConfigError(f"{what}: cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


def prepare_run(storage_path: str, name: str, resume: bool) -> None:
    """Checks that a run which exists is resumed on purpose, by ``--resume``, and removes what a failed start left.

    Raises:
        ConfigError: The run exists and the user did not ask to resume it.
    """
    filesystem, path = resolve_run(storage_path, name)
    if not run_exists(filesystem, path):
        remove_leftover(filesystem, *path.rsplit("/", 1))
        if resume:
            logger.info("nothing to resume, starting a new run name=%s storage_path=%s", name, storage_path)
    elif not resume:
        raise ConfigError(
            f"there is a run named {name!r} in {storage_path}: continue it with --resume, or choose another --run.name"
        )
