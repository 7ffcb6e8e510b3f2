"""Directory of a run, at a local path or a URI: its checkpoints, its history, and free space.

TensorBoard and an appended file need a local directory. If the storage is an object store, the history is written to
a local spool, which is copied to storage periodically. Knows nothing about what is written.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

from rlhf_critic.errors import CheckpointError

logger = logging.getLogger(__name__)

COPY_EVERY_S = 30.0
HISTORY_FOLDER = "history"
REWRITTEN_SUFFIX = "-again"  # follows the name of a checkpoint that replaces a damaged one
# A history alone cannot be resumed, and the other two are Ray Train's.
LEFT_BY_A_START = (HISTORY_FOLDER, ".validate_storage_marker", "checkpoint_manager_snapshot.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # of config and tokenizer
CHECKPOINT = re.compile(rf"step-(\d+)(?:{REWRITTEN_SUFFIX})*")


def resolve_run(storage_path: str, name: str) -> tuple[pafs.FileSystem, str]:
    """Returns the file system of a run, and the run's directory on it."""
    filesystem, path = pafs.FileSystem.from_uri(storage_path)
    return filesystem, f"{path}/{name}"


def run_exists(filesystem: pafs.FileSystem, run_path: str) -> bool:
    """Returns whether a run has a directory with anything but what a start leaves that made no checkpoint."""
    found = filesystem.get_file_info(pafs.FileSelector(run_path, allow_not_found=True))
    return any(info.base_name not in LEFT_BY_A_START for info in found)


def checkpoint_name(step: int) -> str:
    """Returns the name of a checkpoint's directory, which is inside that of its run."""
    return f"step-{step:06d}"


def checkpoint_names(filesystem: pafs.FileSystem, run_path: str) -> list[str]:
    """Lists a run's checkpoints, the newest first, complete or not."""
    selector = pafs.FileSelector(run_path, allow_not_found=True)
    found = [match for info in filesystem.get_file_info(selector) if (match := CHECKPOINT.fullmatch(info.base_name))]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), len(match[0])), reverse=True)]


def remove_broken_list(filesystem: pafs.FileSystem, run_path: str) -> None:
    """Removes Ray Train's list of a run's checkpoints if it cannot be read.

    Ray Train writes the list in place, so a full disk leaves it empty, and Ray Train does not start with an empty one.
    Checkpoints are found without it. Those that it named are no longer counted by ``run.keep_checkpoints``.
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
        logger.warning(
            "removed unreadable Ray Train snapshot %s (possibly written on a full disk); checkpoints are located by "
            "directory instead",
            path,
        )


def remove_leftover(filesystem: pafs.FileSystem, run_path: str, checkpoint: str) -> None:
    """Removes the incomplete checkpoint of a lost attempt, before another attempt writes it.

    Nodes write their parts into one directory and remove nothing there. Shards from another number of ranks would
    otherwise become part of the new checkpoint.
    """
    path = f"{run_path}/{checkpoint}"
    if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
        filesystem.delete_dir(path)


def size_of(directory: Path) -> int:
    """Returns the size in bytes of all files of a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def check_free_space(filesystem: pafs.FileSystem, run_path: str, size: int) -> None:
    """Checks that there is room for a checkpoint. The free space of an object store is unknown and not checked.

    Raises:
        CheckpointError: There is too little.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return
    free = shutil.disk_usage(run_path).free
    if free < size:
        raise CheckpointError(
            f"{run_path}: the next checkpoint takes up to {size / 1e6:.3g} MB and {free / 1e6:.3g} MB are free; "
            "earlier checkpoints are complete. Free some space, then continue with --resume"
        )


class HistoryDirectory:
    """A local directory that stands for the ``history`` folder of a run.

    Args:
        filesystem: File system of the run, from `resolve_run`.
        run_path: Directory of the run on it.
        local: A local directory that is kept and copied to storage. Default: the storage itself if it is local, else a
            temporary spool that begins with the stored history.

    Attributes:
        local: The local directory.
    """

    def __init__(self, filesystem: pafs.FileSystem, run_path: str, local: Path | None = None) -> None:
        self._filesystem = filesystem
        self._stored = f"{run_path}/{HISTORY_FOLDER}"
        is_local = isinstance(filesystem, pafs.LocalFileSystem)
        self._is_copied = local is not None or not is_local
        self._is_spool = local is None and not is_local
        self._copied_at = time.monotonic()
        self.local = local or Path(self._stored)
        if self._is_spool:
            self.local = Path(tempfile.mkdtemp(prefix="rlhf-critic-history-"))
            if filesystem.get_file_info(self._stored).type == pafs.FileType.Directory:
                pafs.copy_files(self._stored, str(self.local), filesystem, pafs.LocalFileSystem())

    def copy_up(self, now: bool = False) -> None:
        """Copies the directory to storage, at most every `COPY_EVERY_S` seconds unless ``now``."""
        if not self._is_copied or not (now or time.monotonic() - self._copied_at > COPY_EVERY_S):
            return
        self._filesystem.create_dir(self._stored, recursive=True)
        pafs.copy_files(str(self.local), self._stored, pafs.LocalFileSystem(), self._filesystem)
        self._copied_at = time.monotonic()

    def close(self) -> None:
        """Copies the directory a last time, and removes a spool."""
        self.copy_up(now=True)
        if self._is_spool:
            shutil.rmtree(self.local, ignore_errors=True)


@contextmanager
def local_directory(path_or_uri: str) -> Iterator[Path]:
    """Yields a directory on this machine: the one at a path, or a copy of the one at a URI or of a hub id.

    The copy of a URI lives within the block. That of a hub id stays in the cache of Hugging Face.

    Raises:
        CheckpointError: There is no directory at the path, or the model of a hub id cannot be downloaded.
    """
    if "://" in path_or_uri:
        from ray.train import Checkpoint  # seconds of import, needed for URIs only

        with Checkpoint(path_or_uri).as_directory() as copy:
            yield Path(copy)
    elif Path(path_or_uri).is_dir():
        yield Path(path_or_uri)
    elif HUB_ID.fullmatch(path_or_uri):
        yield _download_from_hub(path_or_uri)
    else:
        raise CheckpointError(f"{path_or_uri}: no such directory; check the path, or give a URI (s3://, gs://)")


def _download_from_hub(hub_id: str) -> Path:
    """Downloads a model, weights as safetensors if it has them. Offline, it finds what was downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=[*MODEL_FILES, "*.safetensors"]))
        if not any(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(hub_id, allow_patterns=[*MODEL_FILES, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id}: no such directory, and it could not be downloaded as the hub id of a model: "
            f"{str(error).strip().splitlines()[0]} Check the path or the id"
        ) from error
    return directory
