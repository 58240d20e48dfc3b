"""Readers of data sets on disk. Each gives the set's official parts: `{"train": ..., "test": ...}`, or `{"all": ...}`.

Formats: IDX (http://yann.lecun.com/exdb/mnist), CIFAR-10 and CIFAR-100 in their binary and Python versions
(https://www.cs.toronto.edu/~kriz/cifar.html), and folders with one folder of images for each class.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oodkern._errors import brief
from oodkern.data.images import UNKNOWN, ArraySet, DataError, FolderSet, ImageSet, image_files

Parts = Mapping[str, ImageSet]


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def read_idx(path: Path) -> NDArray:
    """The array of an IDX file, plain or gzipped: bytes 0 0 type rank, big-endian sizes, values."""
    content = read_bytes(path)
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({error})") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != 0x08:
        raise DataError(
            f"{path}: expected an IDX file of unsigned bytes, which begins 00 00 08, got {content[:4].hex()}"
        )
    rank = content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise DataError(f"{path}: ends within its header")
    sizes = struct.unpack(f">{rank}I", content[4:start])
    if len(content) - start != math.prod(sizes):
        raise DataError(f"{path}: expected {math.prod(sizes):,} bytes for {sizes}, got {len(content) - start:,}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def read_idx_folder(folder: Path, transposed: bool = False) -> Parts:
    """A set of the MNIST family: `*train*images-idx3-ubyte[.gz]` and `*labels-idx1-ubyte[.gz]`, t10k or test likewise.

    `transposed` swaps the image axes, as EMNIST stores them.
    """
    raw: dict[str, tuple[NDArray, NDArray]] = {}
    for file in sorted(folder.glob("*images*idx3*")):
        if file.suffix == ".gz" and file.with_suffix("").is_file():
            continue  # unpacked beside it
        labels_file = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
        other = labels_file.with_suffix("") if file.suffix == ".gz" else Path(f"{labels_file}.gz")
        if not labels_file.is_file() and other.is_file():
            labels_file = other
        if not labels_file.is_file():
            raise DataError(f"{file}: its labels, {labels_file.name}, are not there")
        images, labels = read_idx(file), read_idx(labels_file)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{file}: expected [N, H, W] with labels [N], got {images.shape} and {labels.shape}")
        part = "train" if "train" in file.name else "test"
        if part in raw:
            raise DataError(f"{folder}: expected one set of files, found a second {part} part in {file.name}")
        raw[part] = images.swapaxes(1, 2) if transposed else images, labels
    if not raw:
        raise DataError(f"{folder}: expected files such as train-images-idx3-ubyte.gz, found none")
    if len(raw) == 1:  # a lone part is the whole set: it is no test of what is trained on it
        raw = {"all": next(iter(raw.values()))}
    names = np.unique(np.concatenate([labels for _, labels in raw.values()]))  # EMNIST letters begin at 1
    return {
        part: ArraySet(  # of a copy: the bytes of a file are read-only
            torch.from_numpy(np.array(images)).unsqueeze(1),
            torch.from_numpy(np.searchsorted(names, labels)),
            [str(name) for name in names],
        )
        for part, (images, labels) in raw.items()
    }


class NumpyUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and NumPy arrays; a pickle that asks for anything else could run any program."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise DataError(f"a CIFAR file holds arrays and lists alone; this one asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module, name)


def unpickle(path: Path) -> dict[str, Any]:
    """A CIFAR batch of the Python version, with its keys as text."""
    file = io.BytesIO(read_bytes(path))
    try:
        content = NumpyUnpickler(file, encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        raise DataError(f"{path}: not a readable pickle ({brief(error)})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a dict, got {type(content).__name__}")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


def entries(path: Path, *keys: str) -> tuple[Any, ...]:
    """Some entries of a CIFAR batch."""
    content = unpickle(path)
    for key in keys:
        if key not in content:
            raise DataError(f"{path}: expected an entry {key!r}, got {', '.join(map(str, content)) or 'none'}")
    return tuple(content[key] for key in keys)


def read_cifar(root: Path, kind: int) -> Parts:
    """CIFAR-10 or CIFAR-100 (`kind`): the Python version or else the binary one, in `root` or its usual subfolder."""
    stem = f"cifar-{kind}"
    named = {
        10: (
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            ("test_batch",),
            "batches.meta",
            "-batches-py",
            "-batches-bin",
        ),
        100: (("train",), ("test",), "meta", "-python", "-binary"),
    }
    train, test, meta, python, binary = named[kind]
    for folder in (root, root / f"{stem}{python}"):
        if (folder / test[0]).is_file():
            key, names_key = ("labels", "label_names") if kind == 10 else ("fine_labels", "fine_label_names")
            (found,) = entries(folder / meta, names_key)
            names = [name.decode() if isinstance(name, bytes) else str(name) for name in found]
            return {
                part: cifar_set([entries(folder / file, "data", key) for file in files], names)
                for part, files in (("train", train), ("test", test))
            }
    for folder in (root, root / f"{stem}{binary}"):
        if (folder / f"{test[0]}.bin").is_file():
            text = folder / ("batches.meta.txt" if kind == 10 else "fine_label_names.txt")
            names = text.read_text().split() if text.is_file() else [str(i) for i in range(kind)]
            head = 1 if kind == 10 else 2  # label; or coarse label, fine label
            return {
                part: cifar_set([read_records(folder / f"{file}.bin", head) for file in files], names)
                for part, files in (("train", train), ("test", test))
            }
    raise DataError(f"{root}: expected {stem} as {test[0]} (Python version) or {test[0]}.bin (binary), found neither")


def read_records(path: Path, head: int) -> tuple[NDArray, NDArray]:
    """Pixels [N, 3072] and the last of the `head` label bytes of each record."""
    content = np.frombuffer(read_bytes(path), np.uint8)
    if len(content) == 0 or len(content) % (3072 + head):
        raise DataError(f"{path}: expected records of {3072 + head} bytes, got {len(content):,} bytes")
    records = content.reshape(-1, 3072 + head)
    return records[:, head:], records[:, head - 1]


def cifar_set(batches: Sequence[tuple[Any, ...]], names: list[str]) -> ArraySet:
    try:
        pixels = np.concatenate([np.asarray(data, np.uint8).reshape(-1, 3, 32, 32) for data, _ in batches])
        labels = np.concatenate([np.asarray(label, np.int64) for _, label in batches])
    except (ValueError, TypeError) as error:
        raise DataError(f"a CIFAR file: expected pixels [N, 3072] and integer labels ({brief(error)})") from None
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise DataError(f"labels: expected 0..{len(names) - 1}, got {labels.min()}..{labels.max()}")
    return ArraySet(torch.from_numpy(pixels), torch.from_numpy(labels), names)


def read_folder(root: Path, channels: int = 3, size: int = 32, resize: str = "stretch") -> Parts:
    """`root/train/CLASS/*` with `root/test/CLASS/*`, `root/CLASS/*`, or images without classes in `root`.

    The test part may be called test, val, valid or validation. Where there is only `root/train` it is the whole set.
    """
    train = root / "train"
    test = next((root / name for name in ("test", "val", "valid", "validation") if (root / name).is_dir()), None)
    others = [one for one in root.iterdir() if one.is_dir() and one != train and not one.name.startswith(".")]
    folders = {"all": train if train.is_dir() and not others else root}  # among other folders, train is a class
    if train.is_dir() and test is not None:
        folders = {"train": train, "test": test}
    files = {part: image_files(folder) for part, folder in folders.items()}
    for part, found in files.items():
        if not found:
            raise DataError(f"{folders[part]}: expected images, found none")
    # A class is the first folder below the part.
    named = {
        part: [path.relative_to(folders[part]).parts[0] if path.parent != folders[part] else "" for path in found]
        for part, found in files.items()
    }
    classes = sorted(set().union(*named.values()) - {""})
    number = {name: i for i, name in enumerate(classes)} | {"": UNKNOWN}
    return {
        part: FolderSet(found, torch.tensor([number[name] for name in named[part]]), classes, channels, size, resize)
        for part, found in files.items()
    }
