"""Features [N, D] of a pool on disk, mapped into memory: a folder that `oodkern extract` wrote, or a plain file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkern._errors import brief
from oodkern.pools.blocks import Whole, name_of
from oodkern.pools.manifest import PoolError
from oodkern.pools.opening import DTYPES, Opened, Part, open_path
from oodkern.pools.writer import StoreWriter

__all__ = ["CHUNK_ROWS", "FeatureStore", "PoolError", "Shard", "StoreWriter"]

CHUNK_ROWS = 65_536


class Shard(NamedTuple):
    """Rows [start, start + rows) of a store; the first of them is row `number` of the whole pool."""

    name: str
    path: Path
    start: int
    number: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """The rows of a part that are in a store: all, or those of the numbers `chosen` [n] in the part."""

    part: Part
    chosen: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.part.block.rows if self.chosen is None else len(self.chosen)

    def slice(self, start: int, stop: int) -> Tensor:
        block = self.part.block
        return block.slice(start, stop) if self.chosen is None else block.take(self.chosen[start:stop])

    def inside(self, indices: Tensor) -> Tensor:
        """Numbers in the part of rows of the piece."""
        return indices if self.chosen is None else self.chosen[indices]


class FeatureStore:
    """Features [N, D] on disk, read where they are used, and their keys.

    Chunks are views of the mapped file: nothing is copied, and the pages are the file's own, which the system drops
    when it needs the memory. They are read-only by agreement: what is written to one stays in this process, and takes
    memory.

    `dimension` D, `dtype`, `path`; `shards`: what lies in which file; `skipped`: a line for each shard that was left
    out; `fingerprint` of the model and `source` of the images, "" where they are not known; `facts`: whatever else the
    pool keeps; `head`: the (weight [K, D], bias [K] or None) that is stored with it, or None; `has_keys`.
    """

    def __init__(self, opened: Opened, pieces: tuple[Piece, ...] | None = None) -> None:
        self._opened = opened
        self._pieces = tuple(map(Piece, opened.parts)) if pieces is None else pieces
        self.path, self.dimension, self.dtype = opened.path, opened.dimension, opened.dtype
        self.skipped, self.fingerprint, self.source = opened.skipped, opened.fingerprint, opened.source
        self.facts, self.head = opened.facts, opened.head
        self._last_keys: Keys | None = None
        self.has_keys = all(part.keys is not None for part in opened.parts)
        ends = np.cumsum([piece.rows for piece in self._pieces], dtype=np.int64)
        self._ends = torch.from_numpy(ends)
        starts = [0, *ends.tolist()]
        self._length = starts[-1]
        self.shards = tuple(
            Shard(piece.part.name, piece.part.path, start, self._number(piece), piece.rows)
            for piece, start in zip(self._pieces, starts, strict=False)
        )

    @staticmethod
    def _number(piece: Piece) -> int:
        return piece.part.number + (0 if piece.chosen is None else int(piece.chosen[0]))

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        dtype: str | None = None,
        name: str | None = None,
        skip_damaged: bool = False,
        verify: bool = True,
    ) -> FeatureStore:
        """A folder that `oodkern extract` wrote, or a plain file of features by its suffix:

            .npy             float16, float32 or float64 [N, D] in C order, or uint16 with dtype="bfloat16"
            .safetensors     the tensor `name`, by default the only one with two dimensions
            .parquet, .arrow, .feather     the column `name`, by default the only one that holds lists of floats, all of
                             one length and none of them null; needs pyarrow (`pip install 'oodkern[pool]'`)

        Files that are not packed are mapped; of packed ones one row group or record batch is in memory, beside what
        unpacking takes: Arrow held 2.7 times a Parquet row group of 195 MiB (float32) at most, and what it frees it
        keeps for itself (the process grew by up to 6 times; ARROW_DEFAULT_MEMORY_POOL=system: under 4). So write
        small groups.

        Args:
            dtype: what the file has to hold, where it is given.
            skip_damaged: leaves out the shards that are damaged instead of raising the first one's error: `skipped` has
                these, and `numbers` what the rows that stay are in the whole pool.
            verify: compares SHA-256 of each shard with the manifest's, two at a time (a core hashes 1.5 GB/s).
                Size, dtype and shape are looked at always. Of Parquet and Arrow files each part is read once.

        Raises PoolError, in one line with the file, for whatever is wrong on disk; for a manifest that is damaged, or
        names files outside of its folder, also with skip_damaged, and where no shard is left. ValueError for arguments.
        """
        return cls(open_path(Path(path), dtype, name, skip_damaged, verify))

    @classmethod
    def of(cls, features: Tensor) -> FeatureStore:
        """Features [N, D] in memory, which are not copied where they are on the CPU."""
        if features.dim() != 2 or features.dtype not in DTYPES.values():
            kinds = ", ".join(DTYPES)
            got = f"{name_of(features.dtype)} {list(features.shape)}"
            raise ValueError(f"features: expected [N, D] of {kinds}, got {got}")
        path = Path("memory")
        part = Part("memory", path, 0, Whole(features.detach().cpu()))
        return cls(Opened(path, features.shape[1], features.dtype, (part,)))

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}: {list((len(self), self.dimension))}, {name_of(self.dtype)})"

    def _split(self, indices: Tensor) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Of each piece with some of the rows: their numbers in its part, ascending, and their positions in indices."""
        if indices.dim() != 1 or indices.dtype != torch.int64:
            raise ValueError(f"indices: expected int64 [n], got {name_of(indices.dtype)} {list(indices.shape)}")
        indices = indices.cpu()
        if not len(indices):
            return
        low, high = (int(one) for one in indices.aminmax())
        if low < 0 or high >= len(self):
            wrong = low if low < 0 else high
            raise ValueError(f"indices: expected rows of {len(self):,}, 0 to {len(self) - 1}, got {wrong}")
        rows, order = indices.sort(stable=True)
        bounds = torch.searchsorted(rows, self._ends).tolist()
        for number, (start, stop) in enumerate(zip([0, *bounds], bounds, strict=False)):
            if stop > start:
                piece = self._pieces[number]
                yield piece, piece.inside(rows[start:stop] - self.shards[number].start), order[start:stop]

    def rows(self, indices: Tensor) -> Tensor:
        """Copies [n, D] of the rows of indices [n] int64, in their order. Raises ValueError for one out of range."""
        found = torch.empty(len(indices), self.dimension, dtype=self.dtype)
        for piece, inside, positions in self._split(indices):
            for start in range(0, len(inside), CHUNK_ROWS):
                some = slice(start, start + CHUNK_ROWS)
                found.index_copy_(0, positions[some], piece.part.block.take(inside[some]))
        return found

    def chunks(self, rows: int = CHUNK_ROWS, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(offset, features [n, D]) of the rows [start, stop) in order: n at most `rows`, none over a shard's end.

        Views of the mapped file, read-only by agreement; copies of a subset's rows and of packed files.
        """
        if rows < 1:
            raise ValueError(f"rows: expected 1 at least, got {rows}")
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start, stop: expected 0 <= start <= stop <= {len(self)}, got {start}, {stop}")
        return self._chunks(rows, start, stop)

    def _chunks(self, rows: int, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        for piece, shard in zip(self._pieces, self.shards, strict=True):
            for offset in range(max(start, shard.start), min(stop, shard.start + shard.rows), rows):
                end = min(offset + rows, stop, shard.start + shard.rows)
                yield offset, piece.slice(offset - shard.start, end - shard.start)

    def numbers(self, indices: Tensor) -> Tensor:
        """What rows [n] are in the whole pool: others where shards were left out, and in a subset."""
        found = torch.empty(len(indices), dtype=torch.int64)
        for piece, inside, positions in self._split(indices):
            found[positions] = inside + piece.part.number
        return found

    def keys(self, indices: Tensor) -> list[str]:
        """The keys of rows [n]. Raises PoolError where the pool has none, and for a damaged file of them."""
        if not self.has_keys:
            raise PoolError(f"{self.path}: expected a pool with keys of its rows, and it has none")
        found = [""] * len(indices)
        for piece, inside, positions in self._split(indices):
            for position, key in zip(positions.tolist(), self._keys(piece.part).of(inside.tolist()), strict=True):
                found[position] = key
        return found

    def _keys(self, part: Part) -> Keys:
        """Of the last part that was asked for, kept: rows are often asked for in turn."""
        assert part.keys is not None
        last = self._last_keys
        if last is None or last.path != part.keys:
            last = self._last_keys = Keys(part.keys, part.block.rows)
        return last

    def subset(self, indices: Tensor) -> FeatureStore:
        """The rows [n] of it alone, which are in ascending order, as a store that gathers a chunk when it is asked."""
        pieces = tuple(Piece(piece.part, inside) for piece, inside, _ in self._split(indices))
        if len(indices) > 1 and bool((indices[1:] <= indices[:-1]).any()):
            raise ValueError("indices: expected ascending rows, each once")
        return FeatureStore(self._opened, pieces)


class Keys:
    """A file with one JSON string a line, of `rows` lines, mapped into memory. Raises PoolError for another one."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path = path
        try:
            self.content: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:  # a ValueError for an empty one
            raise PoolError(f"{path}: damaged: expected {rows:,} lines ({brief(error)})") from None
        self.ends = np.flatnonzero(self.content == ord("\n"))
        if len(self.ends) != rows or self.ends[-1] != len(self.content) - 1:
            raise PoolError(f"{path}: damaged: expected {rows:,} lines, got {len(self.ends):,}")

    def of(self, rows: list[int]) -> Iterator[str]:
        for row in rows:
            line = self.content[self.ends[row - 1] + 1 if row else 0 : self.ends[row]].tobytes()
            try:
                key: Any = json.loads(line)
            except ValueError:
                key = None
            if not isinstance(key, str):
                raise PoolError(f"{self.path}: damaged: expected a JSON string in line {row + 1:,}, got {line[:40]!r}")
            yield key
