"""The numbers of each epoch for TensorBoard, where that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


class Board:
    """Writes `STAGE/NAME` curves into `folder`; does nothing without the package `tensorboard`.

    A run that goes on begins a file of its own, from whose first step on TensorBoard hides the earlier ones: what a
    killed run wrote after its checkpoint is not shown twice. So steps count through all stages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def begin(self, step: int) -> None:
        """Before the first step of a stage, or of its resumption."""
        if self.writer is None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=step)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
