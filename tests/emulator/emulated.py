"""Raw ops computed by the CUDA kernels and their host code in the emulator: what oodkern.ops takes them for."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)  # of tests/emulator/emulated_host.h


class EmulatedOps:
    """`raw(name, *arguments)` as oodkern.ops calls it, on tensors of the CPU. Settings hold for the calls that follow.

    Every tensor is copied to memory between guards, every result lies there; stores outside of them are errors, and
    so are stores to what the op's schema does not say that it writes.
    """

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self.library = ctypes.CDLL(str(library))
        self.library.set_up.argtypes = [ctypes.c_int64] * 5
        self.library.place.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
        self.library.place.restype = ctypes.c_void_p
        self.library.check.restype = self.library.launched_kernels.restype = ctypes.c_char_p
        self.set()

    def set(self) -> None:
        """The settings as they are at first."""
        self.order, self.seed, self.multiprocessors = 0, 0, 4
        self.shared_bytes = 227 << 10
        self.offset = 0  # bytes behind a multiple of 16 at which results begin

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor between guards, with its strides, as far behind a multiple of 16 bytes as it lies."""
        tensor = tensor.detach()
        if not tensor.numel():
            return tensor
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        bytes_ = extent * tensor.element_size()
        address = self.library.place(name.encode(), tensor.data_ptr(), bytes_)
        words = torch.frombuffer((ctypes.c_uint8 * bytes_).from_address(address), dtype=tensor.dtype)
        return words.as_strided(tensor.shape, tensor.stride())

    def raw(self, name: str, *arguments: Any) -> Any:
        op = getattr(torch.ops.oodkern, name).default
        if len(arguments) > len(op._schema.arguments):  # of a room that passes None for what its op has not
            arguments = tuple(argument for argument in arguments if argument is not None)
        self.library.set_up(self.order, self.seed, self.multiprocessors, self.shared_bytes, self.offset)
        try:
            placed = []
            for declared, argument in zip(op._schema.arguments, arguments, strict=False):
                placed.append(self.place(declared.name, argument) if isinstance(argument, Tensor) else argument)
            results = op.redispatch(KEY, *placed)
            said = self.library.check().decode()
            assert not said, said
            for declared, argument, copy in zip(op._schema.arguments, arguments, placed, strict=False):
                if not isinstance(argument, Tensor):
                    continue
                if declared.alias_info is not None and declared.alias_info.is_write:
                    argument.detach().copy_(copy)
                else:
                    assert same_bits(argument.detach(), copy), f"{name} wrote to {declared.name}"
            if isinstance(results, Tensor):
                return results.clone()
            return None if results is None else tuple(result.clone() for result in results)
        finally:
            self.library.clear()

    def launched(self) -> set[str]:
        """Names of the kernels that ran since this was asked last."""
        return set(self.library.launched_kernels().decode().split())


class Namespace:
    """Stands for torch.ops.oodkern where raw ops are called by the name of their backend."""

    NAME = "oodkern_in_the_emulator"

    def __init__(self, rooms: EmulatedOps) -> None:
        self._rooms = rooms

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._rooms.raw, name)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
