"""Writes a pool: its plan first, then shard by shard, by one process or several."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodkern.pools.blocks import name_of
from oodkern.pools.folders import FolderLock, check_folder, make_folder, replacing
from oodkern.pools.formats import npy_header, safetensors_bytes
from oodkern.pools.manifest import (
    DTYPES,
    MANIFEST,
    Entry,
    HeadEntry,
    Manifest,
    PoolError,
    file_sha256,
    keys_file,
    read_entry,
    read_manifest,
    read_object,
    regular,
    shard_file,
    shown,
    sidecar_file,
)

HEAD = "head.safetensors"
PIECE = 4 << 20  # bytes that are hashed and written at once
MODEL_PLACE = ("run", "checkpoint")  # facts: which model it is say the fingerprint and the head
NUMPY = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}  # NumPy has no bfloat16


class StoreWriter:
    """The folder of a pool, whose plan is there when this is made, and whose shards `write` adds.

    Shard s has features of the planned rows [s shard_rows, (s + 1) shard_rows). Each file is written under another name
    and renamed, and shard-00000.json, which has the checksums, after its shard: what a killed process leaves is a whole
    shard, or none. Several processes may write, each its own shards. A complete pool is not when a shard is written
    anew, until `finish`: its manifest has the old checksum.

    Args:
        folder: made where it is not there. One with a pool of the same plan is gone on with, and its plan kept: facts
            `run` and `checkpoint`, where the model lay, may have become others.
        rows, dimension: of all features, N and D.
        dtype: float16, bfloat16 or float32.
        shard_rows: of every shard but the last.
        fingerprint, source, facts: of the model, of the images, and whatever else is to be known: plain values.
        head: (weight [K, D], bias [K] or None) that belongs to the features, or None.
        keys: whether there is a key of each row.
        first: whether this process writes the plan. Another one waits for none: it has to be there.
        exclusive: locks the folder until `close`: an error where another process has.

    Raises ValueError for arguments that are none, PoolError for a folder with a pool of another plan, or other files.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        rows: int,
        dimension: int,
        dtype: str,
        shard_rows: int,
        fingerprint: str = "",
        source: str = "",
        facts: Mapping[str, Any] | None = None,
        head: tuple[Tensor, Tensor | None] | None = None,
        keys: bool = False,
        first: bool = True,
        exclusive: bool = False,
    ) -> None:
        for name, value in (("rows", rows), ("dimension", dimension), ("shard_rows", shard_rows)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 at least, got {value}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        try:
            plain = json.loads(json.dumps(dict(facts or {})))
        except (TypeError, ValueError) as error:
            raise ValueError(f"facts: expected plain values ({error})") from None
        content = None if head is None else head_bytes(head, dimension)
        self.folder = Path(folder)
        self.plan = Manifest(
            complete=False,
            shape=(rows, dimension),
            dtype=dtype,
            planned_rows=rows,
            shard_rows=shard_rows,
            has_keys=keys,
            fingerprint=fingerprint,
            source=source,
            facts=plain,
            head=None if content is None else HeadEntry(HEAD, hashlib.sha256(content).hexdigest()),
            shards=(),
        )
        self.lock: FolderLock | None = None
        if not first and not (self.folder / MANIFEST).exists():
            raise PoolError(f"{self.folder}: expected the plan that the first process writes, and there is none")
        if first:
            check_folder(self.folder)
            make_folder(self.folder)
        if exclusive:
            self.lock = FolderLock(self.folder)
        try:
            if not (self.folder / MANIFEST).exists():
                self._write(MANIFEST, self.plan.text().encode())
            self._adopt_plan()  # also of a manifest just written: another one may have come first
            # After the manifest: a folder with a head alone would be one of other files.
            if first and content is not None and not self._head_is_there():
                self._write(HEAD, content)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets others write, where the folder is locked."""
        if self.lock is not None:
            self.lock.close()

    @property
    def shards(self) -> int:
        return self.plan.count

    @property
    def complete(self) -> bool:
        """Whether the manifest says that the pool is, and its shards are those that are there."""
        manifest = read_manifest(self.folder)
        try:
            return manifest.complete and all(self._entry(shard) == one for shard, one in enumerate(manifest.shards))
        except PoolError:
            return False

    def _head_is_there(self) -> bool:
        try:
            return self.plan.head is not None and file_sha256(self.folder / HEAD) == self.plan.head.sha256
        except PoolError:
            return False

    def _adopt_plan(self) -> None:
        """Takes the plan of the manifest that is there. Raises PoolError where it is another, saying what differs."""
        manifest = read_manifest(self.folder)
        plan = planned(manifest)
        there = asdict(plan)
        for name, value in asdict(self.plan).items():
            found = there[name]
            if name == "facts":
                names = [key for key in {**found, **value} if key not in MODEL_PLACE]
                pairs = [(f"facts.{key}", found.get(key), value.get(key)) for key in names]
            else:
                pairs = [(name, found, value)]
            for what, old, new in pairs:
                if json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
                    raise PoolError(
                        f"{self.folder}: holds a pool of another plan: {what}: {shown(old)}, not {shown(new)}"
                    )
        self.plan, self.closed = plan, manifest.complete
        self.digest = hashlib.sha256(plan.text().encode()).hexdigest()

    def done(self, shard: int) -> bool:
        """Whether a shard is there: its files, and the one beside them that has its checksums, and they agree."""
        try:
            entry = self._entry(shard)
            return file_sha256(self.folder / entry.file) == entry.sha256 and (
                entry.keys is None or file_sha256(self.folder / entry.keys) == entry.keys_sha256
            )
        except PoolError:
            return False

    def _entry(self, shard: int) -> Entry:
        """What is beside a shard, which has the shape and the dtype of this plan. Raises PoolError."""
        path = self.folder / sidecar_file(shard)
        content = read_object(path)
        entry = read_entry(path, content, self.plan.has_keys)
        keys = keys_file(shard) if self.plan.has_keys else None
        if content.get("plan") != self.digest or (entry.file, entry.keys) != (shard_file(shard), keys):
            raise PoolError(f"{path}: of another plan")
        header = npy_header(self.folder / entry.file)
        if header.shape != (entry.rows, self.plan.shape[1]) or entry.rows > self.planned_rows(shard):
            raise PoolError(f"{self.folder / entry.file}: not of the plan's shape")
        if keys is not None:
            regular(self.folder / keys)
        return entry

    def planned_rows(self, shard: int) -> int:
        if not 0 <= shard < self.shards:
            raise ValueError(f"shard: expected 0 to {self.shards - 1}, got {shard}")
        return min(self.plan.shard_rows, self.plan.planned_rows - shard * self.plan.shard_rows)

    def write(self, shard: int, features: Tensor, keys: list[str] | None = None) -> None:
        """A shard: features [n, D], n at most the planned rows, in the plan's dtype, and n keys. Raises ValueError."""
        most, dimension = self.planned_rows(shard), self.plan.shape[1]
        if features.dim() != 2 or features.shape[1] != dimension or len(features) > most:
            raise ValueError(f"features: expected [n, {dimension}], n at most {most}, got {list(features.shape)}")
        if name_of(features.dtype) != self.plan.dtype:
            raise ValueError(f"features: expected {self.plan.dtype}, got {name_of(features.dtype)}")
        if (keys is not None) != self.plan.has_keys or (keys is not None and len(keys) != len(features)):
            expected = f"{len(features)}" if self.plan.has_keys else "none"
            raise ValueError(f"keys: expected {expected}, got {'none' if keys is None else len(keys)}")
        if self.closed:
            self._write(MANIFEST, self.plan.text().encode())
            self.closed = False
        # What is beside it goes first: a process that is killed here leaves a shard that counts as missing.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.folder / sidecar_file(shard))
        content = features.detach().cpu().contiguous().view(torch.uint8).numpy()
        header = npy_bytes(NUMPY[self.plan.dtype], tuple(features.shape))
        entry = Entry(shard_file(shard), len(features), self._write(shard_file(shard), header, content.reshape(-1)))
        if keys is not None:
            lines = "".join(json.dumps(key) + "\n" for key in keys).encode()
            entry = replace(entry, keys=keys_file(shard), keys_sha256=self._write(keys_file(shard), lines))
        beside = {"plan": self.digest, **asdict(entry)}
        self._write(sidecar_file(shard), (json.dumps(beside, indent=2) + "\n").encode())

    def finish(self) -> None:
        """Completes the manifest. Raises PoolError where shards are missing, and where no row is there.

        Removes what killed processes left under temporary names: nobody writes any more.
        """
        entries, missing = [], []
        for shard in range(self.shards):
            try:
                entries.append(self._entry(shard))
            except PoolError:
                missing.append(shard)
        if missing:
            raise PoolError(
                f"{self.folder}: {len(missing):,} of {self.shards:,} shards are missing, the first is "
                f"{shard_file(missing[0])}"
            )
        rows = sum(entry.rows for entry in entries)
        if not rows:
            raise PoolError(f"{self.folder}: expected rows in one shard at least, and all {self.shards:,} are empty")
        whole = replace(self.plan, complete=True, shape=(rows, self.plan.shape[1]), shards=tuple(entries))
        self._write(MANIFEST, whole.text().encode())
        self.closed = True
        for pattern in (".shard-*.tmp", ".manifest.json.*.tmp", f".{HEAD}.*.tmp"):
            for path in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _write(self, name: str, *contents: Any) -> str:
        """A file of these bytes; their SHA-256 in hex."""
        found = hashlib.sha256()
        try:
            with replacing(self.folder / name) as file:
                for content in contents:
                    for start in range(0, len(content), PIECE):
                        piece = memoryview(content)[start : start + PIECE]
                        found.update(piece)
                        file.write(piece)
        except OSError as error:
            raise PoolError(f"{self.folder / name}: {error.strerror}") from None
        return found.hexdigest()


def planned(manifest: Manifest) -> Manifest:
    """The plan of a pool, complete or not."""
    shape = (manifest.planned_rows, manifest.shape[1])
    return replace(manifest, complete=False, shape=shape, shards=())


def npy_bytes(descr: str, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def head_bytes(head: tuple[Tensor, Tensor | None], dimension: int) -> bytes:
    weight, bias = head
    if weight.dim() != 2 or weight.shape[1] != dimension or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"head: expected a weight [K, {dimension}] and a bias [K] or None, got {list(weight.shape)}")
    return safetensors_bytes({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
