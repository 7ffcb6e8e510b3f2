"""Files written atomically, and manifests of checksums. Knows nothing of what is in a file."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_critic.errors import CheckpointError

TRY_ANOTHER_CHECKPOINT = "Take another checkpoint of the run, or another copy of this one"


MANIFEST_PATTERN = "manifest-{node}-of-{nodes}.json"


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A directory that appears at ``path`` when the block ends well, and never otherwise.

    Raises:
        CheckpointError: There is something at ``path`` already, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists already; give a new directory or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", ignore_cleanup_errors=True) as name:
            building = Path(name)
            yield building
            building.chmod(0o755)
            os.rename(building, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); nothing was left there. Free some space, or give another place"
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a file that readers see whole, old or new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_manifest(directory: str | Path, node: int, nodes: int, pattern: str = "**/*") -> None:
    """Records the size and CRC-32 of every file this node wrote into a checkpoint; the last thing to be written.

    Args:
        directory: The checkpoint.
        node: Number of this node.
        nodes: How many write a manifest.
        pattern: Of the files to record; what has a manifest of its own need not be read again.
    """
    directory = Path(directory)
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    }
    write_text_atomically(directory / MANIFEST_PATTERN.format(node=node, nodes=nodes), json.dumps(files, indent=1))


def verify_manifest(directory: str | Path) -> None:
    """Checks a checkpoint against its manifests.

    Raises:
        CheckpointError: A manifest is missing or damaged, or a file is missing, cut short or changed.
    """
    directory = Path(directory)
    manifests, nodes = _manifests(directory)
    if len(manifests) != nodes:
        raise CheckpointError(
            f"{directory}: {len(manifests)} of {nodes} manifests: this checkpoint was not written whole. {TRY_ANOTHER_CHECKPOINT}"
        )
    for manifest in manifests:
        _verify_files(directory, _read_manifest(manifest))


def _manifests(directory: Path) -> tuple[list[Path], int]:
    """The manifests that are there, and how many there should be."""
    found = sorted(directory.glob(MANIFEST_PATTERN.format(node="*", nodes="*")))
    return found, int(found[0].stem.rsplit("-", 1)[1]) if found else 1


def _read_manifest(path: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of each file."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
        return {name: (recorded["bytes"], recorded["crc32"]) for name, recorded in files.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged (no manifest: {error}). {TRY_ANOTHER_CHECKPOINT}") from error


def _verify_files(directory: Path, files: dict[str, tuple[int, int]]) -> None:
    for name, (size, checksum) in files.items():
        path = directory / name
        try:
            whole = path.stat().st_size == size and _crc32(path) == checksum
        except OSError as error:
            raise CheckpointError(f"{path}: missing, or not to be read ({error}). {TRY_ANOTHER_CHECKPOINT}") from error
        if not whole:
            raise CheckpointError(f"{path}: damaged (size or checksum differs). {TRY_ANOTHER_CHECKPOINT}")


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum
