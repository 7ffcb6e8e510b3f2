"""Rows that repeat or reverse an earlier one, found by 64-bit hashes.

Two rows are the same if the critic reads the same token ids in the same order, with the same targets. The order of the
responses is the label of a preference, so its margin does not count. Two of 1e7 different rows have equal hashes with a
probability of 3e-6. Knows nothing about files, texts or models.

Shape legend: N rows, A targets of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

HashArray = NDArray[np.int64]


def hash_preference(responses: Sequence[bytes]) -> tuple[int, int]:
    """Hashes the ids of all responses of a preference, in their order and in the reversed order."""
    return _hash(responses), _hash(responses[::-1])


def hash_pointwise(response: bytes, kind: str, targets: Sequence[float], tokens: Sequence[int]) -> tuple[int, int]:
    """Hashes the ids of a response with its targets. It reverses no row, so no row has the second hash as its first.

    Args:
        response: Bytes of its ids.
        kind: Kind of the targets. Its length is not a multiple of 4, which that of ids is.
        targets: The targets.
        tokens: Index of the token of each target.
    """
    targets_A = np.asarray(targets, dtype=np.float32) + np.float32(0)  # which makes -0 and 0 equal
    parts = (response, kind.encode(), targets_A.tobytes(), np.asarray(tokens, dtype=np.int32).tobytes())
    return _hash(parts), _hash((*parts, b"reversed"))


def _hash(parts: Sequence[bytes]) -> int:
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(hashlib.blake2b(part, digest_size=16).digest())
    return int.from_bytes(hashed.digest(), "little", signed=True)


def find_repeated(hashes_N: HashArray) -> NDArray[np.bool_]:
    """Returns for each row whether it repeats an earlier one, bool ``[N]``. Needs 18 bytes a row beside the hashes."""
    order_N = hashes_N.argsort(kind="stable")  # equal hashes stay in the order of the rows
    sorted_N = hashes_N[order_N]
    repeated_N = np.zeros(len(hashes_N), dtype=np.bool_)
    repeated_N[order_N[1:]] = sorted_N[1:] == sorted_N[:-1]
    return repeated_N


def find_reversed(hashes_N: HashArray, reversed_N: HashArray) -> NDArray[np.bool_]:
    """Returns for each row whether it reverses an earlier one, bool ``[N]``."""
    order_N = hashes_N.argsort(kind="stable")
    sorted_N = hashes_N[order_N]
    place_N = np.searchsorted(sorted_N, reversed_N).clip(max=len(hashes_N) - 1)
    return (sorted_N[place_N] == reversed_N) & (order_N[place_N] < np.arange(len(hashes_N)))
