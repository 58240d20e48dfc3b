"""What the differentiable functions of all rooms share.

An op is three torch.autograd.Functions around raw ops: its value, its gradient, and the gradient's gradient.
Functions with `setup_context`, not torch.library.register_autograd: that breaks torch.func.grad and vmap, and
its forward mode silently returns zero tangents. For the same reason none defines a jvp: forward mode raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments) at less cost where nothing but autograd looks on.

    torch.autograd.Function binds arguments to the signature of a forward that has no context, for 10 to 45 us: value
    and gradient of a `pairwise_hinge` of 64 and 128 scores take 88 us instead of 168. Where no graph is recorded, as in
    most backward passes, forward is all that is left.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return function.apply(*arguments)
    if not torch.is_grad_enabled():
        return function.forward(*arguments)
    return _with_context(function).apply(*arguments)


@functools.cache
def _with_context(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same Function for autograd alone: its context is set up in forward."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        outputs = function.forward(*arguments)
        function.setup_context(ctx, arguments, outputs)
        return outputs

    parts = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), parts)


def readable(*tensors: Tensor) -> bool:
    """Whether numbers can be looked at: not those of fake tensors, of traces and of torch.vmap's batches."""
    return (
        _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and not any("Batched" in torch._C._dispatch_key_set(tensor) for tensor in tensors)
    )


def formed_with_values(*tensors: Tensor | None) -> bool:
    """Whether gradients may be formed with a value, and are wanted.

    Not where an upstream cannot be looked at (torch.compile, torch.func, fake tensors); nor where tensors are to be
    saved elsewhere or formed again (saved-tensor hooks, checkpointing), since gradients would not be.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        any(tensor.requires_grad for tensor in given)
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and readable(*given)
    )


def _raw(name: str, *arguments: Any) -> Any:
    """Calls a raw op with the arguments that it has."""
    return getattr(torch.ops.oodkern, name)(*[argument for argument in arguments if argument is not None])


def _over_rows(function: type[torch.autograd.Function], info: Any, in_dims: tuple, arguments: tuple) -> tuple:
    """torch.vmap of a Function whose tensors share their leading dimensions and whose rows do not see one another.

    The batch is one more leading dimension. Arguments that are not batched are expanded, at no memory.
    """

    def lead(argument: Any, dim: int | None) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        if dim is None:
            return argument.expand(info.batch_size, *argument.shape)
        return argument.movedim(dim, 0)

    outputs = function.apply(*map(lead, arguments, in_dims))
    return outputs, tuple(0 for _ in outputs) if isinstance(outputs, tuple) else 0


class RowScore(torch.autograd.Function):
    """A function of one tensor [..., K] that gives one number a row and can be differentiated twice.

    `RowScore.apply(name, saves_score, tensor, parameter)`, where `name` is that of the raw ops

        name(tensor, [parameter])
        name_backward(grad, tensor, [score], [parameter])
        name_double_backward(cotangent, grad, tensor, [score], [parameter]), which gives the derivatives of
            name_backward in `grad` and in `tensor`, the latter including the path through the score,

    `saves_score` says whether the derivatives take the score, and a `parameter` of None is left out.

    Two habits of torch.compile shape this: a Function that is used in another's backward must be a global, so
    the name is an argument and not a variable around the class; and its forward must not take *arguments, whose
    number torch 2.13 compares with the signature's to find out whether there is a context.
    """

    @staticmethod
    def forward(name: str, saves_score: bool, tensor: Tensor, parameter: float | None) -> Tensor:
        return _raw(name, tensor, parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.op, saves_score, tensor, ctx.parameter = inputs
        ctx.save_for_backward(tensor, output if saves_score else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        tensor, score = ctx.saved_tensors
        # The derivatives of the gradient include the path through the score; attached, it would be gone along again.
        score = None if score is None else score.detach()
        return None, None, apply(RowScoreGradient, ctx.op, grad, tensor, score, ctx.parameter), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _over_rows(RowScore, info, in_dims, arguments)


class RowScoreGradient(torch.autograd.Function):
    @staticmethod
    def forward(name: str, grad: Tensor, tensor: Tensor, score: Tensor | None, parameter: float | None) -> Tensor:
        return _raw(name + "_backward", grad, tensor, score, parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.op, *tensors, ctx.parameter = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:
        grad, tensor = apply(RowScoreCurvature, ctx.op, cotangent, *ctx.saved_tensors, ctx.parameter)
        return None, grad, tensor, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _over_rows(RowScoreGradient, info, in_dims, arguments)


class RowScoreCurvature(torch.autograd.Function):
    @staticmethod
    def forward(
        name: str, cotangent: Tensor, grad: Tensor, tensor: Tensor, score: Tensor | None, parameter: float | None
    ) -> tuple[Tensor, Tensor]:
        return _raw(name + "_double_backward", cotangent, grad, tensor, score, parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise RuntimeError(
            f"oodkern.{ctx.op} can be differentiated twice, and a third derivative was asked for. "
            "`with oodkern.backend('reference'):` computes it with plain PyTorch, to any order."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _over_rows(RowScoreCurvature, info, in_dims, arguments)


def register_row_score_fakes(name: str, score_dtype: Callable[[Tensor], torch.dtype]) -> None:
    """Shapes and dtypes of the three raw ops of a `RowScore`, for torch.compile."""

    def score(tensor: Tensor, *_: Any) -> Tensor:
        return tensor.new_empty(tensor.shape[:-1], dtype=score_dtype(tensor))

    def gradient(grad: Tensor, tensor: Tensor, *_: Any) -> Tensor:
        return tensor.new_empty(tensor.shape)

    def curvature(cotangent: Tensor, grad: Tensor, tensor: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return score(tensor), gradient(grad, tensor)

    torch.library.register_fake(f"oodkern::{name}", score)
    torch.library.register_fake(f"oodkern::{name}_backward", gradient)
    torch.library.register_fake(f"oodkern::{name}_double_backward", curvature)
