"""Where the scores of a pool are: a .npy file each, with a name or without, mapped into memory when it is complete."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oodkern.ops._checks import score_dtype
from oodkern.pools.folders import temporary_path
from oodkern.processes import Processes


class PoolScores(Mapping[str, np.memmap]):
    """Scores by name, each [N] float32 (float64 of float64 features), in a file that is mapped into memory.

    The maps are copy-on-write: what is written to them stays in this process. Files without a name go with the maps.
    """

    def __init__(self, scores: Mapping[str, np.memmap]) -> None:
        self._scores = dict(scores)

    def __getitem__(self, name: str) -> np.memmap:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        return f"PoolScores({', '.join(f'{name}: {list(one.shape)} {one.dtype}' for name, one in self.items())})"


class ScoreFiles:
    """A .npy file for each score, written front to back or in pieces, and mapped when all are complete."""

    def __init__(
        self, names: tuple[str, ...], rows: int, dtype: torch.dtype, folder: Path | None, processes: Processes
    ) -> None:
        self.rows, self.folder = rows, folder if processes.first else None
        self.dtype = torch.empty(0, dtype=score_dtype(torch.empty(0, dtype=dtype))).numpy().dtype
        if folder is not None:
            processes.once(partial(folder.mkdir, parents=True, exist_ok=True))
        self.files: dict[str, Any] = {}
        self.paths: dict[str, tuple[Path, Path]] = {}  # temporary and own name of each file that has one
        self.offset = 0
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (rows,)}
        try:
            for name in names:
                self.files[name] = file = self._temporary(name)
                np.lib.format.write_array_header_1_0(file, header)
                self.offset = file.tell()
        except BaseException:
            self._remove()
            raise

    def _temporary(self, name: str) -> Any:
        """A file of its own also where others write to the same folder."""
        if self.folder is None:
            return tempfile.TemporaryFile()
        own = self.folder / f"{name}.npy"
        temporary = temporary_path(own)
        self.paths[name] = temporary, own
        return open(temporary, "xb+")

    def write(self, name: str, row: int, values: np.ndarray) -> None:
        """Not by a map: where the disk is full that ends the process, and this raises."""
        file = self.files[name]
        file.seek(self.offset + row * self.dtype.itemsize)
        file.write(np.ascontiguousarray(values, self.dtype).tobytes())

    def read(self, name: str, row: int, stop: int) -> np.ndarray:
        file = self.files[name]
        file.seek(self.offset + row * self.dtype.itemsize)
        return np.frombuffer(file.read((stop - row) * self.dtype.itemsize), self.dtype)

    def finish(self) -> PoolScores:
        for file in self.files.values():
            file.flush()
            if self.folder is not None:
                os.fsync(file.fileno())
        # Mapped before they are renamed: by its own name one may be another's that came later.
        found: dict[str, Any] = {}
        for name, file in self.files.items():
            found[name] = np.memmap(file, self.dtype, "c", self.offset, (self.rows,))
        for name, (temporary, own) in self.paths.items():
            os.replace(temporary, own)
            found[name].filename = own.resolve()
        return PoolScores(found)

    def __enter__(self) -> ScoreFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for file in self.files.values():
            file.close()
        for temporary, _ in self.paths.values():
            with contextlib.suppress(OSError):
                temporary.unlink()
