"""Where the samples of a tar file lie: made once by reading its headers, kept beside it, and read again.

A sample is what the WebDataset format calls one: the members of one key in a row, which is a member's name up to the
first dot of its last part. An index holds numbers alone, 32 bytes a sample: what a name is, its member's header tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oodkern._errors import brief
from oodkern.data.pictures import DataError

FORMAT = 1
BLOCK = tarfile.BLOCKSIZE
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "tif", "tiff", "gif")
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__($|/)")
WNID = re.compile(r"(?<![A-Za-z0-9])n(\d{8})(?![0-9])")
UNKNOWN = -1


class TarIndex(NamedTuple):
    """Of the N samples of a tar file, all [N] int64; -1 where there is none.

    offsets, sizes: the bytes of the image. integers: the label as the sample has it. wnids: the 8 digits of the WordNet
    id in its key, or else in what its .json says of its file.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    integers: NDArray[np.int64]
    wnids: NDArray[np.int64]


def members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Key, lower-case suffix, offset and size of a tar's files, in order. Raises DataError for a damaged one."""
    try:
        archive: Any
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            length = os.fstat(file.fileno()).st_size
            while (member := archive.next()) is not None:
                archive.members = []  # which it would keep
                if member.isfile() and member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                found = NAME.fullmatch(member.name)
                if member.isfile() and found is not None and not META.match(member.name):
                    yield found[1], found[2].lower(), member.offset_data, member.size
            # A header that is none ends the walk as the end does, which are zeros or nothing.
            if os.pread(file.fileno(), BLOCK, archive.offset).strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {archive.offset:,}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a readable uncompressed tar file ({brief(error)})") from None


def integer_of(path: Path, key: str, suffix: str, content: bytes, entries: dict[str, Any]) -> int:
    """The label that a .cls holds as text, or a .json as its entry "label" or "cls"; -1 for none."""
    if suffix == "json":
        value = next((entries[name] for name in ("label", "cls") if isinstance(entries.get(name), int)), UNKNOWN)
        return max(value, UNKNOWN)
    try:
        return max(int(content), UNKNOWN)
    except ValueError:
        raise DataError(f"{path}: {key}.cls: expected an integer, got {content[:40]!r}") from None


def wnid_of(*texts: Any) -> int:
    for text in texts:
        if isinstance(text, str) and (found := WNID.search(text)) is not None:
            return int(found[1])
    return UNKNOWN


def read_index(path: Path) -> TarIndex:
    """The index of a tar file, of its headers and the members that hold labels. Raises DataError."""
    rows: list[tuple[int, int, int, int]] = []
    key, image, label, wnid = "", (UNKNOWN, 0), UNKNOWN, UNKNOWN
    there: set[str] = set()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for name, suffix, offset, size in members(path):
            if name != key:
                if image[0] >= 0:
                    rows.append((*image, label, wnid))
                key, image, label, wnid, there = name, (UNKNOWN, 0), UNKNOWN, wnid_of(name), set()
            if suffix in there:
                raise DataError(f"{path}: expected one {suffix} of each sample, got two of {key}")
            there.add(suffix)
            if suffix in IMAGES and image[0] < 0:
                image = offset, size
            elif suffix in ("cls", "json"):
                content = os.pread(descriptor, size, offset)
                entries = parsed(path, key, content) if suffix == "json" else {}
                integer = integer_of(path, key, suffix, content, entries)
                label = integer if label == UNKNOWN or suffix == "cls" else label
                if wnid == UNKNOWN:
                    wnid = wnid_of(entries.get("filename"), entries.get("__key__"))
        if image[0] >= 0:
            rows.append((*image, label, wnid))
    finally:
        os.close(descriptor)
    if not rows:
        raise DataError(f"{path}: expected samples with an image ({', '.join(IMAGES)}), found none")
    return TarIndex(*np.array(rows, dtype=np.int64).T.copy())


def parsed(path: Path, key: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path}: {key}.json: not readable ({brief(error)})") from None
    return found if isinstance(found, dict) else {}


def cache_files(path: Path) -> list[Path]:
    """Where the index of a tar may be kept: beside it, or in the user's cache, by its real path."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oodkern" / "tar_index"
    digest = hashlib.blake2b(os.path.realpath(path).encode(), digest_size=16).hexdigest()
    return [path.with_name(f"{path.name}.index.npz"), folder / f"{digest}.npz"]


def stamp_of(path: Path) -> NDArray[np.int64]:
    """What an index is of: this format, and the tar's size and time of change."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return np.array([FORMAT, found.st_size, found.st_mtime_ns])


def kept_index(path: Path) -> TarIndex | None:
    """The index that is kept of a tar as it is now, where there is one."""
    stamp = stamp_of(path)
    for file in cache_files(path):
        try:
            with np.load(file, allow_pickle=False) as content:
                if np.array_equal(content["stamp"], stamp):
                    return TarIndex(*content["rows"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            continue  # none, of another format, or damaged: it is made again
    return None


def keep(path: Path, index: TarIndex, stamp: NDArray[np.int64]) -> None:
    """Writes the index where that is possible. Each process writes a file of its own and renames it."""
    buffer = io.BytesIO()
    np.savez(buffer, stamp=stamp, rows=np.stack(index))
    for file in cache_files(path):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        except OSError:
            continue
        try:
            with open(descriptor, "wb") as target:
                target.write(buffer.getbuffer())
            os.chmod(temporary, 0o644)  # others who read the tar can read this
            os.replace(temporary, file)
            return
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def index_of(path: Path) -> TarIndex:
    """The index of a tar file: kept, or made and kept. Raises DataError."""
    if (found := kept_index(path)) is not None:
        return found
    stamp = stamp_of(path)
    try:
        index = read_index(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    keep(path, index, stamp)
    return index
