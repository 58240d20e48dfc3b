"""The folder that a pool is written to: who may, and how files come into it."""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from oodkern.pools.manifest import MANIFEST, PoolError

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def check_folder(folder: Path) -> None:
    """Raises PoolError for a folder that has files, hidden ones apart, and no manifest: the user's own."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):  # of which the second is told when it is made
        return
    except OSError as error:
        raise PoolError(f"{folder}: {error.strerror}") from None
    if MANIFEST not in names and not all(name.startswith(".") for name in names):
        raise PoolError(f"{folder}: expected a new or empty folder, or a pool, and it has other files")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PoolError(f"{folder}: {error.strerror}") from None


class FolderLock:
    """That of a folder, from here to `close`, which the system does for a process that is killed.

    An advisory one, of a file that stays, empty: who removed it could remove the one that another has just locked.
    Nothing is locked where the system, or the file system, knows no such locks, and in a folder that cannot be written
    to. Raises PoolError where another one has it.
    """

    def __init__(self, folder: Path) -> None:
        self.file: BinaryIO | None = None
        if fcntl is None:
            return
        try:
            self.file = open(folder / LOCK, "ab")  # noqa: SIM115
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise PoolError(f"{folder}: another process is writing this pool") from None
        except OSError:
            self.close()
        else:
            HELD.add(self)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _let_go() -> None:
    """A child that is forked shares the lock, and would keep it when its parent is killed: workers live on for a while.

    Its own descriptor is closed, which unlocks nothing while the parent has another.
    """
    for lock in list(HELD):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def temporary_path(path: Path) -> Path:
    """Beside the path, of a name that no other has, of this process or another."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the path's name when it is on disk; another one for each process that writes it."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
