"""The raw ops of room `energy`, computed by the CUDA kernels in the emulator: what oodkern.ops takes them for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = {"energy": (0, -1.0), "joint_energy": (1, 1.0)}  # of cpu/rows.h, and the score's sign
STORAGES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
INTEGERS = ("reduction", "pass_", "storage", "rows", "columns", "multiprocessors", "order", "seed")
TENSORS = ("logits", "score", "saved_score", "grad_score", "grad_logits", "cotangent", "grad_grad_score")
STRIDES = ("logits_stride", "saved_score_stride", "grad_score_stride", "cotangent_stride")


class Span(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("elements", ctypes.c_int64), ("offset", ctypes.c_int64))


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("temperature", ctypes.c_double),
        ("sign", ctypes.c_double),
        *((name, Span) for name in TENSORS),
        *((name, ctypes.c_int64) for name in STRIDES),
    )


def span(tensor: Tensor | None) -> Span:
    """The memory that a tensor covers, where it lies relative to a multiple of 16 bytes."""
    if tensor is None:
        return Span(None, 0, 0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Span(tensor.data_ptr(), extent if tensor.numel() else 0, tensor.data_ptr() % 16)


def as_rows(tensor: Tensor) -> Tensor:
    """[N, K] with dense rows, without a copy where the strides allow it: csrc/stable.h."""
    K = tensor.shape[-1]
    rows = tensor.shape[:-1].numel()
    if K > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    try:
        return tensor.view(rows, K)
    except RuntimeError:
        return tensor.contiguous().view(rows, K)


def as_column(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.numel())


class EmulatedOps:
    """`raw(name, *arguments)` as oodkern.ops calls it. Settings hold for the calls that follow."""

    def __init__(self, library: Any) -> None:
        self.library = library
        library.run_rows.restype = ctypes.c_char_p
        self.order, self.seed, self.multiprocessors = 0, 0, 4
        self.grad_offset = 0  # elements behind a multiple of 16 bytes at which gradients begin

    def raw(self, name: str, *arguments: Any) -> Any:
        values = [argument for argument in arguments if argument is not None]
        room = name.removesuffix("_backward").removesuffix("_double")
        temperature = values.pop() if room == "energy" else 1.0
        kind = (room, float(temperature))
        if name == room:
            return self.run(kind, 0, *values)
        if name == f"{room}_backward":
            grad, logits, *saved = values
            return self.run(kind, 1, logits, grad, saved[0] if saved else grad)
        cotangent, grad, logits, *saved = values
        return self.run(kind, 2, logits, grad, saved[0] if saved else grad, cotangent)

    def run(
        self,
        kind: tuple[str, float],
        which: int,
        logits: Tensor,
        grad: Tensor | None = None,
        saved: Tensor | None = None,
        cotangent: Tensor | None = None,
    ) -> Any:
        reduction, sign = REDUCTIONS[kind[0]]
        shape, z = logits.shape, as_rows(logits.detach())
        real = torch.float64 if z.dtype == torch.float64 else torch.float32
        call = Call(reduction, which, STORAGES[z.dtype], *z.shape, self.multiprocessors, self.order, self.seed)
        call.temperature, call.sign = kind[1], sign
        call.logits, call.logits_stride = span(z), z.stride(0)
        kept = [z]

        def given(name: str, tensor: Tensor) -> None:
            kept.append(tensor)
            setattr(call, name, span(tensor))
            setattr(call, f"{name}_stride", tensor.stride(0))

        def result(name: str, size: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
            made = torch.zeros(size, dtype=dtype)
            described = span(made)
            described.offset = offset * made.element_size()
            setattr(call, name, described)
            return made

        if which == 0:
            results = [result("score", shape[:-1], real)]
        else:
            assert grad is not None
            assert saved is not None
            given("grad_score", as_column(grad.detach()))
            given("saved_score", as_column(saved.detach()))
            results = [result("grad_logits", shape, z.dtype, self.grad_offset)]
        if which == 2:
            assert cotangent is not None
            given("cotangent", as_rows(cotangent.detach()))
            results.insert(0, result("grad_grad_score", shape[:-1], real))
        said = self.library.run_rows(ctypes.byref(call)).decode()
        assert not said, said
        return results[0] if len(results) == 1 else tuple(results)

    def launched(self) -> set[str]:
        """Names of the kernels that ran since this was asked last."""
        return set(self.library.launched_kernels().decode().split())


Raw = Callable[..., Any]
