"""Checks of what users give: each names the argument, what came and what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oodkern.backends import DTYPES

try:
    from torch._subclasses.fake_tensor import is_fake as _is_fake
except ImportError:  # private, and may move: nothing but what is foretold on fake tensors needs it
    _is_fake: Any = None  # type: ignore[no-redef]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def is_fake(value: Any) -> bool:
    """Whether this is a tensor without numbers, by which memory is foretold; False where PyTorch does not tell."""
    return _is_fake is not None and _is_fake(value)


def check_floating(value: Any, name: str) -> None:
    check_tensor(value, name)
    if value.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}: expected one of {names}, got {str(value.dtype).removeprefix('torch.')}")


def check_logits(value: Any, name: str = "logits") -> None:
    check_floating(value, name)
    if value.dim() == 0:
        raise ValueError(f"{name}: expected [..., K], got a tensor without dimensions")


def check_non_negative(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number that is not negative, got {value}")
    return float(value)


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_count(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")


# z / T is formed in float32: 2^100 keeps 1 / T and what it multiplies within its range.
LARGEST_TEMPERATURE = 2.0**100


def check_temperature(value: Any, name: str = "temperature") -> float:
    """Comparisons alone, no math.isfinite: under torch.compile the value may be symbolic."""
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 1 / LARGEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:
        raise ValueError(f"{name}: expected a positive number (between 2^-100 and 2^100), got {value}")
    return float(value)


def check_margin(value: Any) -> float:
    """Comparisons alone, no math.isfinite: under torch.compile the value may be symbolic."""
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"margin: expected a number, got {type(value).__name__}")
    if not -1e30 <= value <= 1e30:  # its square is to stay finite in float64
        raise ValueError(f"margin: expected a finite number (between -1e30 and 1e30), got {value}")
    return float(value)


def score_dtype(logits: Tensor) -> torch.dtype:
    """Scores are float32 whatever the input; float64 stays float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
