"""What the rooms around a product features @ weight.T share: namespaces of raw ops, fakes, vmap, autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oodkern import _native, reference, triton_kernels
from oodkern.backends import backend_for
from oodkern.ops._checks import check_floating

# Backend -> the namespace of its raw ops.
NAMESPACES = {"native": "oodkern", "triton": triton_kernels.NAMESPACE}
# Raw ops that csrc/cuda/stream.cu leaves to Triton.
STREAM_DERIVATIVES = (
    *("linear_score_backward", "linear_score_double_backward", "alignment_backward"),
    *("subspace_energy_backward", "subspace_energy_double_backward"),
)


def _on_cuda(arguments: Sequence[Any]) -> bool:
    return any(isinstance(argument, Tensor) and argument.is_cuda for argument in arguments)


def raw(backend: str, name: str, *arguments: Any) -> Any:
    """Calls a raw op of a backend; a derivative of what native CUDA kernels stream is Triton's."""
    if backend == "native" and name in STREAM_DERIVATIVES and _on_cuda(arguments):
        if triton_kernels.missing["cuda"]:
            raise RuntimeError(f"backend('native') has no {name} on cuda, and Triton: {triton_kernels.missing['cuda']}")
        backend = "triton"
    return _call(NAMESPACES[backend], name, *arguments)


def _call(namespace: str, name: str, *arguments: Any) -> Any:
    return getattr(getattr(torch.ops, namespace), name)(*arguments)


def mixed_backend(
    room: str, features: Tensor, weight: Tensor, bias: Tensor | None = None, widened: bool = False
) -> tuple[str, Tensor, Tensor, Tensor | None]:
    """The backend of a room for features beside which weight and bias may be float32, and the three as it takes them.

    The native kernels of the CPU take them as they are. Others take one dtype: all are widened where any two differ,
    and where `widened` asks for it.
    """
    backend = backend_for(room, features, len(weight))
    widened = widened or any(t is not None and t.dtype != features.dtype for t in (weight, bias))
    if not widened or (backend == "native" and features.device.type == "cpu"):
        return backend, features, weight, bias
    features, weight = reference.widen(features), reference.widen(weight)
    bias = None if bias is None else reference.widen(bias)
    return backend_for(room, features, len(weight)), features, weight, bias


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Shapes and dtypes of a raw op, for torch.compile, in every namespace that has it."""
    if not _native.missing["cpu"]:
        torch.library.register_fake(f"oodkern::{name}", fake)
    if not triton_kernels.missing["cuda"] and triton_kernels.has(name):
        torch.library.register_fake(f"{triton_kernels.NAMESPACE}::{name}", fake, lib=triton_kernels.LIBRARY)


def gradient_like(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    """The fake of a gradient: like its tensor where it is wanted, without elements elsewhere."""
    return tensor.new_empty(tensor.shape) if wanted and tensor is not None else None


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Raw ops give a tensor without elements for a gradient that was not asked for; autograd wants None."""
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def one_by_one(function: type[torch.autograd.Function], info: Any, in_dims: tuple, arguments: tuple) -> tuple:
    """torch.vmap of a Function whose outputs depend on whole tensors: a loop over the batch."""
    if info.batch_size == 0:
        raise ValueError("torch.vmap: expected a batch of at least one, got 0")

    def one(argument: Any, dim: int | None, i: int) -> Any:
        return argument.select(dim, i) if isinstance(argument, Tensor) and dim is not None else argument

    results = [
        function.apply(*(one(argument, dim, i) for argument, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), tuple(0 for _ in results[0])
    return torch.stack(results), 0


def rows_folded(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple, arguments: tuple, by_row: Sequence[int]
) -> tuple:
    """torch.vmap of a Function whose rows do not see one another: the batch joins the rows.

    `by_row` are the positions of the arguments that have rows; where another one is batched too, or there is nothing
    to join, the batch is gone through `one_by_one`.
    """
    rows = [arguments[i] for i in by_row if isinstance(arguments[i], Tensor)]
    if any(tensor.numel() == 0 for tensor in rows) or any(
        dim is not None and i not in by_row for i, dim in enumerate(in_dims)
    ):
        return one_by_one(function, info, in_dims, arguments)
    folded = list(arguments)
    for i in by_row:
        if isinstance(argument := arguments[i], Tensor):
            dim = in_dims[i]
            lead = argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            folded[i] = lead.flatten(0, 1)
    outputs = function.apply(*folded)

    def unfold(output: Tensor) -> Tensor:
        # An output that was not asked for has no elements, whatever the batch.
        return output.unflatten(0, (info.batch_size, -1)) if output.numel() else output.expand(info.batch_size, 0)

    if isinstance(outputs, tuple):
        return tuple(map(unfold, outputs)), tuple(0 for _ in outputs)
    return unfold(outputs), 0


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is enabled, float64 ones apart, as torch.nn.functional.linear does.

    Raw ops compute in float32 from 16-bit numbers and never round what they make of them.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    if not reference.autocasting(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_matrix(
    value: Any, name: str, meaning: str = "N, D", like: Tensor | None = None, of: str = "features"
) -> None:
    """A floating matrix; with `like`, of its number of columns, its dtype and its device."""
    check_floating(value, name)
    if value.dim() != 2:
        raise ValueError(f"{name}: expected [{meaning}], got {list(value.shape)}")
    if like is not None:
        if value.shape[1] != like.shape[1]:
            raise ValueError(f"{name}: expected {like.shape[1]} columns as {of} have, got {list(value.shape)}")
        check_beside(value, name, like, of)


def check_beside(value: Tensor, name: str, like: Tensor, of: str, dtype: bool = True, or_float32: bool = False) -> None:
    """On the device, and with `dtype` in the dtype, of another argument; `or_float32`: or float32 beside 16 bits."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, where {of} are, got {value.device}")
    or_float32 = or_float32 and like.dtype in (torch.float16, torch.bfloat16)
    if dtype and value.dtype != like.dtype and not (or_float32 and value.dtype == torch.float32):
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in (like, value)]
        either = ", or float32" if or_float32 else ""
        raise TypeError(f"{name}: expected {names[0]} as {of} are{either}, got {names[1]}; cast one of them")


def check_head(features: Any, weight: Any, bias: Any, prefix: str = "", or_float32: bool = False) -> None:
    """features [N, D], weight [K, D], bias [K] or None. Under autocast dtypes may differ: they are cast.

    With `or_float32` weight and bias may be float32 beside 16-bit features.
    """
    check_matrix(features, "features")
    check_matrix(weight, prefix + "weight", "K, D")
    mixed = reference.autocasting(features)
    if weight.shape[1] != features.shape[1]:
        raise ValueError(f"{prefix}weight: expected [K, {features.shape[1]}] as features are, got {list(weight.shape)}")
    check_beside(weight, prefix + "weight", features, "features", not mixed, or_float32)
    if bias is not None:
        check_floating(bias, prefix + "bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{prefix}bias: expected [{len(weight)}], one number a row of {prefix}weight, got {list(bias.shape)}"
            )
        check_beside(bias, prefix + "bias", features, "features", not mixed, or_float32)


def no_third(name: str) -> RuntimeError:
    return RuntimeError(
        f"oodkern.{name} can be differentiated twice, and a third derivative was asked for. "
        "`with oodkern.backend('reference'):` computes it with plain PyTorch, to any order."
    )


def no_second(name: str) -> RuntimeError:
    return RuntimeError(
        f"oodkern.{name} can be differentiated once, and a second derivative was asked for. "
        "`with oodkern.backend('reference'):` computes it with plain PyTorch, to any order."
    )
