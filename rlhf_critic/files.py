"""Atomic writes of files and directories, and manifests of checksums. Knows nothing about what a file holds."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rlhf_critic.errors import CheckpointError

TRY_ANOTHER_CHECKPOINT = "Use another checkpoint of the run, or another copy of this one"
MANIFEST_PATTERN = "manifest-{node}-of-{nodes}.json"


class FileRecord(NamedTuple):
    """Size of a file in a manifest, and its SHA-256 in hexadecimal or, from version 0.1, its CRC-32."""

    bytes: int
    checksum: str | int


def read_text(path: str | Path) -> str:
    """Reads a text file in UTF-8, without the byte order mark that some editors write at its start.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: The file is not UTF-8.
    """
    return Path(path).read_text(encoding="utf-8-sig")


@contextmanager
def atomic_directory(path: str | Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that becomes ``path`` when the block ends without an error.

    With ``keep_existing``, a directory that another process created meanwhile is kept instead of this one.

    Raises:
        CheckpointError: ``path`` exists already, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not keep_existing:
        raise CheckpointError(f"{path} exists already; give a new directory or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", ignore_cleanup_errors=True) as name:
            building = Path(name) / path.name
            building.mkdir()  # with the permissions of the user's umask, unlike the temporary directory
            yield building
            try:
                os.rename(building, path)
            except OSError:
                if not (keep_existing and path.is_dir()):
                    raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); nothing was left there. Free some space, or give another path"
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # process ids repeat on other nodes
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a text file in UTF-8. Readers see the old content or the new, never a part of it."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_manifest(directory: str | Path, node: int, nodes: int, pattern: str = "**/*") -> None:
    """Records the size and SHA-256 of every file that this node, one of ``nodes``, wrote into a checkpoint.

    Call it last. ``pattern`` is a glob that can leave out files with a manifest of their own.
    """
    directory = Path(directory)
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    }
    write_text_atomically(directory / MANIFEST_PATTERN.format(node=node, nodes=nodes), json.dumps(files, indent=1))


def record_file(directory: str | Path, name: str) -> None:
    """Records a file that was added to a directory, or replaced there, in its manifest, if there is one.

    Raises:
        CheckpointError: A manifest is damaged.
    """
    directory = Path(directory)
    manifests = _manifests(directory)[0]
    if not manifests:
        return
    read_manifests(directory)  # raises for a damaged one
    contents = {path: json.loads(path.read_text(encoding="utf-8")) for path in manifests}
    path = next((path for path, files in contents.items() if name in files), manifests[0])
    file = directory / name
    contents[path][name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    write_text_atomically(path, json.dumps(contents[path], indent=1))


def verify_manifest(directory: str | Path) -> None:
    """Checks that a checkpoint has all its manifests, and every file that they record.

    Raises:
        CheckpointError: A manifest is missing or damaged, or a file is missing, truncated or changed.
    """
    found, nodes = _manifests(Path(directory))
    if len(found) != nodes:
        raise CheckpointError(
            f"{directory}: incomplete, {len(found)} of {nodes} manifests found: writing it was interrupted. "
            f"{TRY_ANOTHER_CHECKPOINT}"
        )
    verify_files(directory, read_manifests(directory))


def read_manifests(directory: str | Path) -> dict[str, FileRecord]:
    """Returns the record of each file by its path below ``directory``, from the manifests that are there.

    Raises:
        CheckpointError: A manifest is damaged, or two of them disagree.
    """
    records: dict[str, FileRecord] = {}
    for path in _manifests(Path(directory))[0]:
        try:
            for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
                record = FileRecord(entry["bytes"], entry["sha256"] if "sha256" in entry else entry["crc32"])
                if records.setdefault(name, record) != record:
                    raise ValueError(f"another manifest records {name} differently")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged (not a manifest: {error}). {TRY_ANOTHER_CHECKPOINT}") from error
    return records


def verify_files(directory: str | Path, records: Mapping[str, FileRecord]) -> None:
    """Reads each file once and compares it with its record.

    Raises:
        CheckpointError: A file is missing, truncated or changed.
    """
    for name, record in records.items():
        path = Path(directory) / name
        checksum = _crc32 if isinstance(record.checksum, int) else _sha256
        try:
            intact = path.stat().st_size == record.bytes and checksum(path) == record.checksum
        except OSError as error:
            raise CheckpointError(f"{path}: missing or unreadable ({error}). {TRY_ANOTHER_CHECKPOINT}") from error
        if not intact:
            raise CheckpointError(f"{path}: damaged (size or checksum differs). {TRY_ANOTHER_CHECKPOINT}")


def file_blocks(path: Path) -> Iterator[bytes]:
    """Yields the content of a file block by block."""
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            yield block


def _manifests(directory: Path) -> tuple[list[Path], int]:
    """Returns the manifests found, and the number expected."""
    found = sorted(directory.glob(MANIFEST_PATTERN.format(node="*", nodes="*")))
    return found, int(found[0].stem.rsplit("-", 1)[1]) if found else 1


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    for block in file_blocks(path):
        hashed.update(block)
    return hashed.hexdigest()


def _crc32(path: Path) -> int:
    return functools.reduce(lambda checksum, block: zlib.crc32(block, checksum), file_blocks(path), 0)
