"""Directories by path or URI, as any process of the cluster reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_critic.errors import CheckpointError


@contextmanager
def directory_at(path_or_uri: str) -> Iterator[Path]:
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
