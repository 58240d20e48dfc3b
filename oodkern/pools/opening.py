"""Opens what holds features, and finds out what is damaged: a folder with a manifest, or a plain file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkern.pools.blocks import Block, mapped, name_of
from oodkern.pools.formats import SUFFIXES, npy_header, open_npy, open_safetensors, read_safetensors
from oodkern.pools.manifest import (
    MANIFEST,
    Entry,
    HeadEntry,
    Manifest,
    PoolError,
    check_sha256,
    read_manifest,
    regular,
)

VERIFIERS = 2  # threads, each with another file: hashlib lets go of the interpreter's lock
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
Head = tuple[Tensor, Tensor | None]


class Part(NamedTuple):
    """A piece of a pool that is whole: the number of its first row in the pool, its features, its keys' file."""

    name: str
    path: Path
    number: int
    block: Block
    keys: Path | None = None


@dataclass(frozen=True)
class Opened:
    """Parts in order, and what is known beside them; `skipped` are the errors of those that were left out."""

    path: Path
    dimension: int
    dtype: torch.dtype
    parts: tuple[Part, ...]
    skipped: tuple[str, ...] = ()
    fingerprint: str = ""
    source: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    head: Head | None = None


def open_path(path: Path, dtype: str | None, name: str | None, skip_damaged: bool, verify: bool) -> Opened:
    """See FeatureStore.open."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not path.exists():
        raise PoolError(f"{path}: no such file or folder")
    folder = path.is_dir()
    if name is not None and (folder or path.suffix.lower() == ".npy"):
        raise ValueError(f"name: expected none for {path}, which holds features alone, got {name!r}")
    opened = open_folder(path, skip_damaged, verify) if folder else open_file(path, dtype, name, skip_damaged, verify)
    if dtype is not None and opened.dtype != DTYPES[dtype]:
        raise PoolError(f"{path}: expected {dtype}, got {name_of(opened.dtype)}")
    return opened


def open_file(path: Path, dtype: str | None, name: str | None, skip_damaged: bool, verify: bool) -> Opened:
    """A plain file, by its suffix. Raises PoolError."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise PoolError(
            f"{path}: expected a folder that `oodkern extract` wrote, or a file of features ({', '.join(SUFFIXES)})"
        )
    if not path.stat().st_size:
        raise PoolError(f"{path}: expected features, and the file is empty")
    if suffix in (".npy", ".safetensors"):
        features = open_npy(path, dtype) if suffix == ".npy" else open_safetensors(path, name)
        return Opened(path, features.dimension, features.dtype, (Part(path.name, path, 0, features.block),))
    from oodkern.pools.arrow import open_arrow, open_parquet

    columns = open_parquet(path, name) if suffix == ".parquet" else open_arrow(path, name)
    openers, number = [], 0
    for position, block in enumerate(columns.blocks):
        part = Part(f"{path.name}:{position}", path, number, block)
        openers.append(partial(checked, part, verify))
        number += block.rows
    kept, skipped = whole_ones(path, openers, skip_damaged, threads=1)
    return Opened(path, columns.dimension, columns.dtype, kept, skipped)


def checked(part: Part, verify: bool) -> Part:
    if verify:
        part.block.slice(0, part.block.rows)  # reads what is packed
    return part


def open_folder(folder: Path, skip_damaged: bool, verify: bool) -> Opened:
    """A pool that is complete. Raises PoolError, for anything wrong with the manifest whatever skip_damaged says."""
    if not (folder / MANIFEST).exists():
        raise PoolError(f"{folder}: expected a pool that `oodkern extract` wrote, and there is no {MANIFEST}")
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise PoolError(unfinished(folder, manifest))
    head = None if manifest.head is None else read_head(folder, manifest.head, manifest.shape[1])
    size, kind = manifest.shape[1], DTYPES[manifest.dtype]
    openers, number = [], 0
    for entry in manifest.shards:
        openers.append(partial(open_shard, folder, entry, number, size, kind, verify))
        number += entry.rows
    kept, skipped = whole_ones(folder, openers, skip_damaged, VERIFIERS if verify else 1)
    return Opened(
        *(folder, size, kind, kept, skipped),
        fingerprint=manifest.fingerprint,
        source=manifest.source,
        facts=manifest.facts,
        head=head,
    )


def unfinished(folder: Path, manifest: Manifest) -> str:
    there = sum((folder / f"{path.stem}.json").exists() for path in folder.glob("shard-*.npy"))
    return (
        f"{folder}: the pool is not complete: {there:,} of {manifest.count:,} shards are there; the same "
        f"`oodkern extract` command goes on"
    )


def read_head(folder: Path, entry: HeadEntry, dimension: int) -> Head:
    """The weight [K, D] and bias [K] or None that are stored with a pool. Raises PoolError."""
    path = folder / entry.file
    check_sha256(path, entry.sha256)
    there = read_safetensors(path)
    weight, bias = there.get("weight"), there.get("bias")
    if weight is None or weight.dim() != 2 or weight.shape[1] != dimension:
        raise PoolError(f"{path}: expected a weight [K, {dimension}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PoolError(f"{path}: expected a bias [{len(weight)}], got {list(bias.shape)}")
    return weight, bias


def open_shard(folder: Path, entry: Entry, number: int, dimension: int, dtype: torch.dtype, verify: bool) -> Part:
    """A shard that is what its entry says. Raises PoolError, naming its file."""
    path = folder / entry.file
    header = npy_header(path)
    expected = torch.uint16 if dtype == torch.bfloat16 else dtype  # NumPy has no bfloat16
    if header.dtype != expected:
        raise PoolError(f"{path}: expected {name_of(expected)}, as the manifest says, got {name_of(header.dtype)}")
    if header.shape != (entry.rows, dimension):
        raise PoolError(
            f"{path}: expected the shape {[entry.rows, dimension]}, as the manifest says, got {list(header.shape)}"
        )
    keys = None if entry.keys is None else regular(folder / entry.keys)
    if verify:
        check_sha256(path, entry.sha256)
        if keys is not None:
            check_sha256(keys, entry.keys_sha256 or "")
    return Part(entry.file, path, number, mapped(path, header.offset, (entry.rows, dimension), dtype), keys)


def whole_ones(
    path: Path, openers: Sequence[Callable[[], Part]], skip_damaged: bool, threads: int
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The parts with rows that can be opened, and the errors of others; without skip_damaged the first is raised."""
    kept: list[Part] = []
    skipped: list[str] = []
    pool = ThreadPoolExecutor(threads)
    try:
        for found in pool.map(opened_or_error, openers):
            if isinstance(found, Part):
                kept.append(found)
            elif skip_damaged:
                skipped.append(str(found))
            else:
                raise found
    finally:
        pool.shutdown(cancel_futures=True)
    kept = [part for part in kept if part.block.rows]
    if not kept and skipped:
        raise PoolError(f"{path}: none of {len(openers):,} shards is whole; the first: {skipped[0]}")
    if not kept:
        raise PoolError(f"{path}: expected features, and there are no rows")
    return tuple(kept), tuple(skipped)


def opened_or_error(opener: Callable[[], Part]) -> Part | PoolError:
    try:
        return opener()
    except PoolError as error:
        return error
