"""How much memory there is, and the largest batch that fits into it."""

from __future__ import annotations

import re
from collections.abc import Callable

from oodkern.config import ConfigError

UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "TB": 10**12, "GB": 10**9, "MB": 10**6}


def parse_memory(text: str) -> int:
    """Bytes of a number and a unit, as 80GiB. Raises ConfigError."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", text.strip())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"--memory: expected a positive number with {', '.join(UNITS)}, as 80GiB, got {text!r}")
    return size


def first_true(holds: Callable[[int], bool], most: int) -> int:
    """The least number from 1 to `most` from which on a condition holds; of `most` itself it is not asked."""
    fails, found = 0, 1
    while found < most and not holds(found):
        fails, found = found, 2 * found
    found = min(found, most)
    while found - fails > 1:
        middle = (fails + found) // 2
        fails, found = (fails, middle) if holds(middle) else (middle, found)
    return found


def largest_fitting(size: Callable[[int], float], limit: float, least: int, most: int, start: int) -> int:
    """The largest number from `least` to `most` of a size up to `limit`, sizes growing nearly in line; 0 if none is."""
    if size(least) > limit:
        return 0
    fits, too_large = least, most + 1
    if least < start <= most:
        fits, too_large = (start, too_large) if size(start) <= limit else (fits, start)
    other = least if fits != least else min(2 * least, most)
    tries = 0
    while too_large - fits > 1:
        slope = (size(fits) - size(other)) / (fits - other) if fits != other else 0.0
        guess = fits + int((limit - size(fits)) / slope) if 0 < slope < float("inf") else most
        if tries > 6:  # a size with a kink
            guess = (fits + too_large) // 2
        guess = min(max(guess, fits + 1), too_large - 1)
        tries += 1
        if size(guess) <= limit:
            fits, other = guess, fits
        else:
            too_large = guess
            other = guess if size(guess) < float("inf") else other
    return fits
