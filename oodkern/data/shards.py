"""WebDataset shards: tar files of samples, read at random, since a batch here is a function of its number alone."""

from __future__ import annotations

import contextlib
import copy
import glob
import io
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkern.data.damage import Damage
from oodkern.data.images import UNKNOWN, FileSet, ImageSet
from oodkern.data.pictures import DataError, open_picture
from oodkern.data.stream import ignore_interrupts
from oodkern.data.tar_index import TarIndex, index_of, kept_index
from oodkern.processes import own_rank_is_first

OPEN_FILES = 64  # of each set at once: a process may have 1,024 by default, and a set has thousands of shards
MANY = 8  # shards without an index, which are worth starting processes for
PARTS = {"train": r"train(ing)?", "test": r"test", "validation": r"val(id|idation)?"}


class Shards:
    """Tar files that are open for reading, at most `OPEN_FILES` in each process."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard. Raises DataError where there are fewer.

        By pread, which has no position: descriptors that a fork inherits are shared, and no process moves another's.
        """
        try:
            if shard not in self._open:
                if len(self._open) >= OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                self._open[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            self._open.move_to_end(shard)
            content = os.pread(self._open[shard], size, offset)
        except OSError as error:
            raise DataError(f"{self.paths[shard]}: {error.strerror}") from None
        if len(content) != size:
            raise DataError(f"{self.paths[shard]}: expected {size:,} bytes at {offset:,}, got {len(content):,}")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}  # another process opens them itself

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class ShardSet(FileSet):
    """Images in tar files, each by its shard, offset and size: 20 bytes an image and 16 of number and label.

    `places` are shards [M] int32, offsets [M] and sizes [M] int64.
    """

    def __init__(
        self,
        shards: Shards,
        places: tuple[NDArray, NDArray, NDArray],
        labels: Tensor,
        classes: Sequence[str] = (),
        channels: int = 3,
        size: int = 32,
        resize: str = "stretch",
    ) -> None:
        self.shards, self.places, self.labels, self.classes = shards, places, labels, tuple(classes)
        self.channels, self.size, self.resize = channels, size, resize
        self.numbers = np.arange(len(labels))
        self.damage = Damage(len(labels), self.name, self.picture)

    def name(self, index: int) -> str:
        shards, offsets, _ = self.places
        return f"{self.shards.paths[shards[index]]} at byte {offsets[index]:,}"

    def content(self, index: int) -> bytes:
        shard, offset, size = (int(one[index]) for one in self.places)
        return self.shards.read(shard, offset, size)

    def picture(self, index: int) -> Any:
        return open_picture(io.BytesIO(self.content(index)), self.channels, self.name(index))

    def identities(self) -> Iterator[tuple[str, int]]:
        """The real path of the tar and the offset: made one by one, since millions at once are gigabytes."""
        real = [os.path.realpath(path) for path in self.shards.paths]
        shards, offsets, _ = self.places
        for shard, offset in zip(shards, offsets, strict=True):
            yield real[shard], int(offset)

    def select(self, indices: Tensor) -> ShardSet:
        chosen = indices.numpy()
        shards, offsets, sizes = (one[chosen] for one in self.places)
        return self._of((shards, offsets, sizes), self.numbers[chosen], self.labels[indices], self.classes)

    def relabelled(self, labels: Tensor, classes: Sequence[str]) -> ShardSet:
        return self._of(self.places, self.numbers, labels, classes)

    def _of(
        self, places: tuple[NDArray, NDArray, NDArray], numbers: NDArray, labels: Tensor, classes: Sequence[str]
    ) -> ShardSet:
        made = copy.copy(self)
        made.places, made.numbers, made.labels, made.classes = places, numbers, labels, tuple(classes)
        return made


def expanded(pattern: str) -> list[str]:
    """The names that braces stand for: {0000..0099} with the width of its numbers, and {a,b}."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    inside = found[1]
    if (ends := re.fullmatch(r"(\d+)\.\.(\d+)", inside)) is not None:
        first, last = int(ends[1]), int(ends[2])
        width = max(len(ends[1]), len(ends[2])) if "0" in (ends[1][0], ends[2][0]) else 0
        step = 1 if first <= last else -1
        words = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    elif "," in inside:
        words = inside.split(",")
    else:
        raise DataError(f"{pattern}: expected braces such as {{0000..0099}} or {{a,b}}, got {{{inside}}}")
    return [name for word in words for name in expanded(pattern[: found.start()] + word + pattern[found.end() :])]


def shard_files(pattern: str) -> list[Path]:
    """The tar files of a folder, a glob or braces, or of several joined by `::`, in order and each once.

    Raises DataError for one that is missing, and where there is none.
    """
    files: dict[Path, None] = {}
    for one in pattern.split("::"):
        for name in expanded(os.path.expanduser(one)):
            path = Path(name)
            if path.is_dir():
                found = sorted(path.rglob("*.tar"))
                if not found:
                    raise DataError(f"{path}: expected tar files, found none")
            elif glob.has_magic(name) and not path.is_file():
                found = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
                if not found:
                    raise DataError(f"{name}: expected tar files, found none")
            else:
                found = [path]
                if not path.is_file():
                    raise DataError(f"{path}: no such file")
            files.update(dict.fromkeys(found))
    return list(files)


def part_of_name(name: str) -> str:
    """train, test or validation, where one of these words stands in a shard's name; nothing where none does."""
    words = re.split(r"[^a-z]+", re.sub(r"\d", " ", name.lower()))
    return next((part for part, said in PARTS.items() if any(re.fullmatch(said, word) for word in words)), "")


def parts_of(pattern: str) -> Mapping[str, list[Path]]:
    """Shards by part: of a folder whose shards all name one, train among them; or else all."""
    files = shard_files(pattern)
    folder = Path(os.path.expanduser(pattern))
    if not folder.is_dir():
        return {"all": files}
    named: dict[str, list[Path]] = {}
    for file in files:
        named.setdefault(part_of_name(str(file.relative_to(folder))), []).append(file)
    if "train" not in named or len(named) == 1:
        return {"all": files}
    if "" in named:
        raise DataError(
            f"{folder}: expected train, val or test in the name of every shard, since some have them, got "
            f"{named[''][0].name}"
        )
    return named


def indices_of(files: Sequence[Path]) -> list[TarIndex]:
    """The index of each shard, made where there is none yet, of many by all cores; what takes seconds shows a bar."""
    from tqdm import tqdm

    found = {file: kept_index(file) for file in files}
    missing = [file for file, index in found.items() if index is None]
    with contextlib.ExitStack() as stack:
        made: Iterable[TarIndex] = map(index_of, missing)
        if len(missing) >= MANY and (cores := os.cpu_count() or 1) > 1:
            how: Any = {"mp_context": get_context("fork"), "initializer": ignore_interrupts, "initargs": (0,)}
            pool = stack.enter_context(ProcessPoolExecutor(min(cores, 16), **how))
            made = pool.map(index_of, missing)
        bar: Any = {"desc": "index of shards", "unit": "tar", "leave": False, "delay": 3}
        # In a log a line a minute.
        bar |= {"disable": not own_rank_is_first(), "mininterval": 0.1 if sys.stderr.isatty() else 60}
        found.update(zip(missing, tqdm(made, total=len(missing), **bar), strict=True))
    return [index for index in found.values() if index is not None]


def has_labels(indices: Iterable[TarIndex]) -> bool:
    return any(bool((one.integers >= 0).any() or (one.wnids >= 0).any()) for one in indices)


def read_shards(pattern: str, channels: int = 3, size: int = 32, resize: str = "stretch") -> Mapping[str, ImageSet]:
    """The parts of WebDataset shards: `train` and `test` where a folder's shards name them, or else `all`.

    `pattern` is a folder, a glob, or braces as in imagenet-{0000..0099}.tar; several are joined by `::`. The test part
    is that of the shards called test, or where there are none with labels those called val.

    A sample's label is the integer in its .cls, or "label" or "cls" of its .json; classes are the integers there are,
    in order. Where all samples have a WordNet id, in the key or in "filename" or "__key__" of the .json, those are the
    classes. Samples without a label are -1.

    An index is made once of each tar's headers and kept beside it, as NAME.tar.index.npz, or else in the user's cache.
    Raises DataError with the path.
    """
    named = {part: (files, indices_of(files)) for part, files in parts_of(pattern).items()}
    parts = {part: named[part] for part in named if part not in ("test", "validation")}
    of_labels = any(has_labels(found) for _, found in parts.values())
    for part in ("test", "validation"):
        if part in named and "test" not in parts and (has_labels(named[part][1]) or not of_labels):
            parts["test"] = named[part]
    wnids = all((one.wnids >= 0).all() for _, found in parts.values() for one in found)
    labels = {
        part: np.concatenate([one.wnids if wnids else one.integers for one in found])
        for part, (_, found) in parts.items()
    }
    numbers = np.unique(np.concatenate(list(labels.values())))
    numbers = numbers[numbers >= 0]
    classes = [f"n{number:08d}" if wnids else str(number) for number in numbers.tolist()]
    made = {}
    for part, (files, found) in parts.items():
        counts = [len(one.offsets) for one in found]
        places = (
            np.repeat(np.arange(len(files), dtype=np.int32), counts),
            np.concatenate([one.offsets for one in found]),
            np.concatenate([one.sizes for one in found]),
        )
        known = np.where(labels[part] < 0, UNKNOWN, np.searchsorted(numbers, labels[part]))
        made[part] = ShardSet(Shards(files), places, torch.from_numpy(known), classes, channels, size, resize)
    return made
