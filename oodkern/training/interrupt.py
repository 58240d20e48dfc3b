"""Signals between two steps and not within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# What schedulers send before they take a machine away: SIGTERM, or as a warning of so many seconds SIGUSR1.
WARNINGS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """A scheduler asked the run to end: its state is kept, and it can be resumed."""

    everywhere = True  # and so of every process


class Interrupt:
    """While entered, the first signal sets `asked`, its number, for the loop to stop where its state is whole.

    SIGINT and what schedulers send are looked at. A second SIGINT raises KeyboardInterrupt at once. With `at_once` a
    scheduler's signal raises Stopped instead, where no step is under way, and SIGINT stays what it was. Outside the
    main thread, where Python has no signals, it does nothing.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.asked = 0
        self.at_once = at_once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in WARNINGS if self.at_once else (signal.SIGINT, *WARNINGS):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.at_once:
            raise Stopped(signal.Signals(number).name)
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number


def stop(number: int) -> None:
    """Raises what a signal asked for."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(signal.Signals(number).name)
