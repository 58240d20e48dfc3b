"""Files of a run: written under a temporary name and renamed, so that a killed run leaves no half of one."""

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


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


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
    """A log that grows by one line at a time; what is written stays written."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "w", buffering=1)  # noqa: SIM115  (closed by the context manager below)

    def write(self, **record: Any) -> None:
        self.file.write(json.dumps(record) + "\n")

    def __enter__(self) -> JSONLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
