"""The run's directory as its workers see it: a local path, or a URI that is reached through a spool.

TensorBoard and an appended file need a local directory. Where the storage is an object store, history is written to a
local spool and copied up now and then. Knows nothing of what is written.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

from rlhf_critic.errors import CheckpointError

COPY_EVERY_S = 30.0
HISTORY_FOLDER = "history"
REWRITTEN_SUFFIX = "-again"  # after the name of a checkpoint that was damaged and is made again
CHECKPOINT = re.compile(rf"step-(\d+)(?:{REWRITTEN_SUFFIX})*")


def resolve_run(storage_path: str, name: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a run, and the run's directory on it."""
    filesystem, path = pafs.FileSystem.from_uri(storage_path)
    return filesystem, f"{path}/{name}"


def run_exists(filesystem: pafs.FileSystem, run_path: str) -> bool:
    """Whether a run has left anything in its directory."""
    return bool(filesystem.get_file_info(run_path).type != pafs.FileType.NotFound)


def checkpoint_name(step: int) -> str:
    """The directory of a checkpoint below that of its run."""
    return f"step-{step:06d}"


def checkpoint_names(filesystem: pafs.FileSystem, run_path: str) -> list[str]:
    """All that is there of checkpoints, the newest first."""
    selector = pafs.FileSelector(run_path, allow_not_found=True)
    found = [match for info in filesystem.get_file_info(selector) if (match := CHECKPOINT.fullmatch(info.base_name))]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), len(match[0])), reverse=True)]


def remove_broken_list(filesystem: pafs.FileSystem, run_path: str) -> None:
    """Removes Ray Train's list of a run's checkpoints if it cannot be read.

    Ray Train writes it in place, so that a disk which is full leaves it empty, and does not start with such a one.
    Checkpoints are found without it; those that it had are no longer counted by ``run.keep_checkpoints``.
    """
    from actors.runtime.ray_internals import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME  # seconds of import

    path = f"{run_path}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
    if filesystem.get_file_info(path).type == pafs.FileType.NotFound:
        return
    with filesystem.open_input_stream(path) as file:
        content = file.read()
    try:
        json.loads(content)
    except ValueError:
        filesystem.delete_file(path)
        print(
            f"warning: {path} could not be read (was the disk full?) and is removed: checkpoints are found without it"
        )


def remove_leftover(filesystem: pafs.FileSystem, run_path: str, checkpoint: str) -> None:
    """Removes what an attempt that was lost left of a checkpoint, before another attempt writes it.

    Nodes write their parts into one directory, so what is there stays: shards of another number of ranks would be taken
    for some of its own.
    """
    path = f"{run_path}/{checkpoint}"
    if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
        filesystem.delete_dir(path)


def size_of(directory: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def check_free_space(filesystem: pafs.FileSystem, run_path: str, size: int) -> None:
    """Checks that there is room for a checkpoint; of an object store that is not known.

    Raises:
        CheckpointError: There is not.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return
    free = shutil.disk_usage(run_path).free
    if free < size:
        raise CheckpointError(
            f"{run_path}: the next checkpoint takes up to {size / 1e6:.3g} MB and {free / 1e6:.3g} MB are free; those "
            "before it are whole. Free some space, and go on with --resume"
        )


class HistoryDirectory:
    """A local directory that stands for the ``history`` folder of a run.

    Args:
        filesystem: Of the run, as `resolve_run` gives it.
        run_path: The run's directory on it.
    """

    def __init__(self, filesystem: pafs.FileSystem, run_path: str) -> None:
        self._filesystem = filesystem
        self._stored = f"{run_path}/{HISTORY_FOLDER}"
        self._is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self._copied_at = time.monotonic()
        if self._is_local:
            self.local = Path(self._stored)
            return
        self.local = Path(tempfile.mkdtemp(prefix="rlhf-critic-history-"))
        if self._filesystem.get_file_info(self._stored).type == pafs.FileType.Directory:
            pafs.copy_files(self._stored, str(self.local), self._filesystem, pafs.LocalFileSystem())

    def copy_up(self, now: bool = False) -> None:
        """Copies the spool to storage, if it is time or ``now``."""
        if self._is_local or not (now or time.monotonic() - self._copied_at > COPY_EVERY_S):
            return
        self._filesystem.create_dir(self._stored, recursive=True)
        pafs.copy_files(str(self.local), self._stored, pafs.LocalFileSystem(), self._filesystem)
        self._copied_at = time.monotonic()

    def close(self) -> None:
        """Copies what is left and removes the spool."""
        if not self._is_local:
            self.copy_up(now=True)
            shutil.rmtree(self.local, ignore_errors=True)


@contextmanager
def local_directory(path_or_uri: str) -> Iterator[Path]:
    """A directory on this machine: the one at a path, or, within the block, a copy of the one at a URI.

    Raises:
        CheckpointError: There is no directory at the path.
    """
    if "://" in path_or_uri:
        from ray.train import Checkpoint  # seconds of import that a local directory does not need

        with Checkpoint(path_or_uri).as_directory() as copy:
            yield Path(copy)
    elif Path(path_or_uri).is_dir():
        yield Path(path_or_uri)
    else:
        raise CheckpointError(f"{path_or_uri}: no such directory; check the path, or give a URI (s3://, gs://)")
