"""What a pool's manifest.json says, checked when it is read: a damaged or forged one gives a one-line error."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oodkern._errors import brief
from oodkern.data.pictures import DataError

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("float16", "bfloat16", "float32")
PIECE = 1 << 20  # bytes that are read at once for a checksum
KINDS = {dict: "an object", list: "a list", str: "a string", int: "an integer", bool: "true or false"}
SHA256 = re.compile(r"[0-9a-f]{64}")


class PoolError(DataError):
    """What is wrong with a pool on disk, in one line that names the file and the folder it lies in."""


@dataclass(frozen=True)
class Entry:
    """A shard: the file of its features, its rows and the file's checksum; the same of its keys, where it has any."""

    file: str
    rows: int
    sha256: str
    keys: str | None = None
    keys_sha256: str | None = None


@dataclass(frozen=True)
class HeadEntry:
    file: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """shape is [N, D]: of the rows that are there, and of the planned ones while the pool is not complete.

    Shard s holds the readable ones of the planned rows [s shard_rows, (s + 1) shard_rows).
    """

    complete: bool
    shape: tuple[int, int]
    dtype: str
    planned_rows: int
    shard_rows: int
    has_keys: bool
    fingerprint: str
    source: str
    facts: dict[str, Any]
    head: HeadEntry | None
    shards: tuple[Entry, ...]

    def text(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @property
    def count(self) -> int:
        """Shards that are planned."""
        return -(-self.planned_rows // self.shard_rows)


def shard_file(shard: int) -> str:
    return f"shard-{shard:05d}.npy"


def keys_file(shard: int) -> str:
    return f"shard-{shard:05d}.keys.jsonl"


def sidecar_file(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises PoolError."""
    try:
        content = json.loads(regular(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise PoolError(f"{path}: not readable JSON ({brief(error)})") from None
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror or brief(error)}") from None
    if not isinstance(content, dict):
        raise PoolError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def field(path: Path, content: dict[str, Any], key: str, kind: type, least: int | None = None) -> Any:
    """A value of a JSON object, of a kind, and no less than `least`. Raises PoolError with the file and the key."""
    if key not in content:
        raise PoolError(f"{path}: expected the key {key!r}, and there is none")
    value = content[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PoolError(f"{path}: {key}: expected {KINDS[kind]}, got {shown(value)}")
    if least is not None and content[key] < least:
        raise PoolError(f"{path}: {key}: expected {least} at least, got {value}")
    return value


def shown(value: Any) -> str:
    """A value in few words."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def file_name(path: Path, content: dict[str, Any], key: str) -> str:
    """A plain name of a file in the manifest's own folder, that does not lead out of it. Raises PoolError."""
    name = field(path, content, key, str)
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name) or os.path.isabs(name) or Path(name).drive:
        raise PoolError(f"{path}: {key}: expected a plain name of a file in this folder, got {shown(name)}")
    file = path.parent / name
    if file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(path.parent)):
        raise PoolError(f"{path}: {key}: {name} is a link that leads out of this folder")
    return name


def checksum(path: Path, content: dict[str, Any], key: str) -> str:
    value = field(path, content, key, str)
    if not SHA256.fullmatch(value):
        raise PoolError(f"{path}: {key}: expected 64 hexadecimal digits, got {shown(value)}")
    return value


def read_entry(path: Path, content: Any, keys: bool) -> Entry:
    """A shard's entry, of the manifest or of the file beside the shard. Raises PoolError."""
    if not isinstance(content, dict):
        raise PoolError(f"{path}: shards: expected objects, got {shown(content)}")
    own = file_name(path, content, "file"), field(path, content, "rows", int, 0), checksum(path, content, "sha256")
    if not keys:
        return Entry(*own)
    return Entry(*own, file_name(path, content, "keys"), checksum(path, content, "keys_sha256"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, complete or not. Raises PoolError for anything that is wrong with it."""
    path = folder / MANIFEST
    content = read_object(path)
    if (number := field(path, content, "format", int)) != FORMAT:
        raise PoolError(f"{path}: expected format {FORMAT}, got {number}: another version of oodkern wrote it")
    shape = field(path, content, "shape", list)
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise PoolError(f"{path}: shape: expected [rows, dimension], both positive, got {shown(shape)}")
    dtype = field(path, content, "dtype", str)
    if dtype not in DTYPES:
        raise PoolError(f"{path}: dtype: expected one of {', '.join(DTYPES)}, got {shown(dtype)}")
    has_keys = field(path, content, "has_keys", bool)
    if (head := content.get("head")) is not None:
        head = field(path, content, "head", dict)
        head = HeadEntry(file_name(path, head, "file"), checksum(path, head, "sha256"))
    found = Manifest(
        complete=field(path, content, "complete", bool),
        shape=(shape[0], shape[1]),
        dtype=dtype,
        planned_rows=field(path, content, "planned_rows", int, 1),
        shard_rows=field(path, content, "shard_rows", int, 1),
        has_keys=has_keys,
        fingerprint=field(path, content, "fingerprint", str),
        source=field(path, content, "source", str),
        facts=field(path, content, "facts", dict),
        head=head,
        shards=tuple(read_entry(path, one, has_keys) for one in field(path, content, "shards", list)),
    )
    check_counts(path, found)
    return found


def check_counts(path: Path, manifest: Manifest) -> None:
    """Raises PoolError where the shards are not those of the plan, or their rows not those of the shape."""
    if not manifest.complete:
        return
    if len(manifest.shards) != manifest.count:
        raise PoolError(
            f"{path}: shards: expected {manifest.count:,} of {manifest.shard_rows:,} rows each, as "
            f"{manifest.planned_rows:,} rows need, got {len(manifest.shards):,}"
        )
    names = [name for one in manifest.shards for name in (one.file, one.keys) if name is not None]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PoolError(f"{path}: shards: expected another file for each, got {twice} twice")
    for one in manifest.shards:
        if one.rows > manifest.shard_rows:
            raise PoolError(f"{path}: {one.file}: expected {manifest.shard_rows:,} rows at most, got {one.rows:,}")
    if (total := sum(one.rows for one in manifest.shards)) != manifest.shape[0]:
        raise PoolError(
            f"{path}: expected the shards' rows to sum to {manifest.shape[0]:,}, as its shape says, got {total:,}"
        )


def regular(path: Path) -> Path:
    """The path, where it is a file. Raises PoolError for none, and for what is no file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise PoolError(f"{path}: {(error.strerror or brief(error)).lower()}") from None
    if not stat.S_ISREG(mode):
        raise PoolError(f"{path}: expected a file, got a {'folder' if stat.S_ISDIR(mode) else 'special file'}")
    return path


def file_sha256(path: Path) -> str:
    """In hex, of a file's bytes. Raises PoolError where it cannot be read."""
    found, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    try:
        with open(regular(path), "rb", buffering=0) as file:
            while count := file.readinto(piece):
                found.update(piece[:count])
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror or brief(error)}") from None
    return found.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    if (found := file_sha256(path)) != expected:
        raise PoolError(f"{path}: damaged: expected the SHA-256 {expected[:12]}..., got {found[:12]}...")
