"""Keys of a configuration, each with its explanation."""

from __future__ import annotations

import copy
from dataclasses import Field, field, fields, is_dataclass
from typing import Any


def option(default: Any, explanation: str) -> Any:
    """A dataclass field with a default and an explanation for `oodkern train --show`."""
    metadata = {"explanation": explanation}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def explanations(config: Any, prefix: str = "") -> dict[str, str]:
    """The explanation of every dotted key of a dataclass instance; a group's is the first line of its docstring."""
    found: dict[str, str] = {}
    for one in fields(config):
        key, value = prefix + one.name, getattr(config, one.name)
        found[key] = explanation_of(one, value)
        if is_dataclass(value):
            found |= explanations(value, f"{key}.")
    return found


def explanation_of(one: Field, value: Any) -> str:
    if is_dataclass(value):
        return (type(value).__doc__ or "").splitlines()[0]
    return one.metadata.get("explanation", "")
