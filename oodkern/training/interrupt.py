"""Ctrl-C between two steps and not within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupt:
    """While entered, the first SIGINT sets `asked`, for the loop to stop where its state is whole.

    A second one raises KeyboardInterrupt at once. Outside the main thread, where Python has no signals, it does
    nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: signal.Handlers | None = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)  # type: ignore[assignment]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
