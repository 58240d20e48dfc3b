"""Image files that cannot be read: which of a set they are, whoever found it out, and how many may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from oodkern.data.pictures import DataError
from oodkern.processes import ALONE, Processes

ONE_IN = 1000  # files of a set may be unreadable
NAMED = 3  # of them in the error


class Damage:
    """A flag for each of the `count` files of a set as it was opened; all sets made of it share them.

    The flags lie in shared memory: what a loader's worker finds out, the process that started it knows. `name(number)`
    is a file's name and `look(number)` raises DataError where it cannot be read; both take numbers of that first set.

    One unreadable file in 1,000 is allowed, and always one.
    """

    def __init__(self, count: int, name: Callable[[int], str], look: Callable[[int], Any]) -> None:
        self.flags = torch.zeros(count, dtype=torch.uint8).share_memory_()
        self.name, self.look = name, look
        self.told: set[int] = set()
        self.limit = max(1, count // ONE_IN)

    @property
    def found(self) -> list[int]:
        """Numbers of the files that could not be read, in order."""
        # Of a copy: nonzero() reads twice, first to count, and fails where another process sets a flag in between.
        return self.flags.clone().nonzero().flatten().tolist()

    def note(self, *numbers: int) -> None:
        """Counts files, each once. Raises DataError with their number and the first names past the limit.

        Also where all were counted before: a loader's worker that found the last of them may have said so in a batch
        that nobody took.
        """
        for number in numbers:
            self.flags[number] = 1
        if not numbers or len(found := self.found) <= self.limit:
            return
        names = ", ".join(map(self.name, found[:NAMED])) + (", ..." if len(found) > NAMED else "")
        raise DataError(
            f"{len(found):,} of {len(self.flags):,} image files cannot be read, and more than {self.limit:,} "
            f"(one in {ONE_IN:,}) are an error: {names}"
        )

    def news(self) -> list[int]:
        """Numbers of the files found since this was asked last."""
        fresh = [number for number in self.found if number not in self.told]
        self.told.update(fresh)
        return fresh

    def reason(self, number: int) -> str:
        """Why a file cannot be read, with its name."""
        try:
            self.look(number)
        except DataError as error:
            return str(error)
        return f"{self.name(number)}: could not be read, and now can"


def damage_lines(sets: Iterable[Any], processes: Processes = ALONE) -> list[str]:
    """A line for each file of the sets that could not be read and was not told yet, by name and reason.

    All processes ask together, with sets opened alike: each then counts what any of them found. The lines are those of
    the first process, and none on others.
    """
    lines = []
    damages = {id(one): one for images in sets if (one := getattr(images, "damage", None)) is not None}
    for damage in damages.values():
        damage.note(*sorted({number for found in processes.objects(damage.found) for number in found}))
        for number in damage.news():
            if processes.first:
                lines.append(f"left out, {damage.reason(number)}")
    return lines
