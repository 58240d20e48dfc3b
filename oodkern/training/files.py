"""Files of a run. See `oodkern._files` for how they are written."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodkern._files import write_bytes as write_bytes
from oodkern._files import write_json as write_json
from oodkern._files import write_text as write_text


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def save_scores(path: Path, scores: Mapping[str, Tensor]) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: values.numpy() for name, values in scores.items()}
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


class JSONLines:
    """A log that grows by one line at a time; what is written stays written.

    Opened at `size`, it drops what stands after so many bytes: lines that a killed run wrote after its checkpoint,
    and that the resumed run writes again.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.file: Any = open(path, "ab")  # noqa: SIM115  (closed by the context manager below)
        self.file.truncate(size)

    def write(self, **record: Any) -> None:
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def sync(self) -> int:
        """Bytes so far, all of them on the disk."""
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def __enter__(self) -> JSONLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


class NoLines(JSONLines):
    """The log of a process that is not the first."""

    def __init__(self) -> None:
        self.file = io.BytesIO()

    def write(self, **record: Any) -> None:
        pass

    def sync(self) -> int:
        return 0


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
