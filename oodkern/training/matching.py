"""Which row of a pool is of which image: by keys, as 16 bytes each, so that tens of millions fit into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BYTES = 16


def digests(keys: Iterable[str], count: int) -> NDArray[np.uint64]:
    """BLAKE2b [count, 2] of as many keys."""
    found = bytearray(count * BYTES)
    at = 0
    for at, key in enumerate(keys, 1):
        digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=BYTES).digest()
        found[(at - 1) * BYTES : at * BYTES] = digest
    if at != count:
        raise ValueError(f"keys: expected {count:,}, got {at:,}")
    return np.frombuffer(found, np.uint64).reshape(-1, 2)


def images_of(rows: NDArray[np.uint64], images: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Of each row of digests [N, 2] the image [N] of digests [M, 2] with the same one, -1 where there is none.

    No image is of two rows: of a digest that several have the first row has the first image, the second the second.
    """
    either = np.concatenate([images, rows])
    order = np.lexsort((either[:, 1], either[:, 0]))  # stable: of one digest images come first, each side in its order
    ordered = either[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    start = np.flatnonzero(is_new)
    group = np.cumsum(is_new) - 1
    of_images = np.add.reduceat(order < len(images), start, dtype=np.int64) if len(start) else start
    place = np.arange(len(order)) - start[group]  # within the digest
    nth = place - of_images[group]  # row of it
    is_row = np.flatnonzero((nth >= 0) & (nth < of_images[group]))
    found = np.full(len(rows), -1, np.int64)
    found[order[is_row] - len(images)] = order[start[group[is_row]] + nth[is_row]]
    return found
