"""Convolutions whose derivatives, of every order, are convolutions of the kinds that PyTorch has kernels for.

y = conv(x, w) is bilinear, and so are its gradients gx = back_x(g, w) and gw = back_w(g, x), g being y's cotangent: all
three are derivatives of <g, conv(x, w)>, linear in each of its factors. Of cotangents v of gx and u of gw,

    <v, gx> + <u, gw> = <g, conv(v, w)> + <g, conv(x, u)>

so that the second derivatives are

    in g: conv(v, w) + conv(x, u)        in w: back_w(g, v)        in x: back_x(g, u)

PyTorch forms back_w(g, v) as a convolution of transposes whose kernel is as large as the image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from oodkern.ops._checks import is_fake
from oodkern.ops._product import autocast

try:
    from torch._C import _are_functorch_transforms_active, _will_engine_execute_node
except ImportError:  # private, and may move: every convolution is then PyTorch's own
    _will_engine_execute_node: Any = None  # type: ignore[no-redef]

FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Geometry(NamedTuple):
    """What PyTorch's kernels take after the tensors."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class Convolution(torch.autograd.Function):
    """conv(x, w) + b of a batch.

    Nodes save what PyTorch's own save, in their order: layers whose activations are checkpointed are computed again
    inside the gradients, where `TwiceDifferentiable` is not, and `torch.utils.checkpoint` compares the two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        with torch.autocast(x.device.type, enabled=False):  # the tensors are in the dtype that it would give them
            return torch.ops.aten.convolution.default(x, w, b, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple:
        if g is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        in_x, in_w, in_b = asked_for(ctx, 3)
        gx = gw = None
        if in_x or in_w:
            gx, gw = ConvolutionBackward.apply(g, x, w, ctx.geometry, (in_x, in_w))
        gb = g.sum([0, *range(2, g.dim())]) if in_b else None
        return gx, gw, gb, None


class ConvolutionBackward(torch.autograd.Function):
    """back_x(g, w), in which x is a shape alone, and back_w(g, x), in which w is; None for what is not asked for."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, which: tuple[bool, bool]) -> tuple:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        with torch.autocast(g.device.type, enabled=False):
            gradients = torch.ops.aten.convolution_backward.default(g, x, w, None, *geometry, [*which, False])
        return gradients[:2]

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None) -> tuple:
        g, x, w = ctx.saved_tensors
        in_g, in_x, in_w = asked_for(ctx, 3)
        gg = gx = gw = None
        if in_g and v is not None:
            gg = Convolution.apply(v, w, None, ctx.geometry)
        if in_g and u is not None:
            more = Convolution.apply(x, u, None, ctx.geometry)
            gg = more if gg is None else gg + more
        if in_x and u is not None:
            gx, _ = ConvolutionBackward.apply(g, x, u, ctx.geometry, (True, False))
        if in_w and v is not None:
            _, gw = ConvolutionBackward.apply(g, v, w, ctx.geometry, (False, True))
        return gg, gx, gw, None, None


def asked_for(ctx: Any, count: int) -> list[bool]:
    """In which of a node's first inputs, tensors or None at the end, the running backward pass wants gradients.

    needs_input_grad knows what may be differentiated, and nothing of what torch.autograd.grad was given: a gradient in
    the inputs would form those in all weights and throw them away.
    """
    return [needed and executes(ctx.next_functions[i][0]) for i, needed in enumerate(ctx.needs_input_grad[:count])]


def executes(node: Any) -> bool:
    """Whether the running backward pass has a use for what is handed to a node; true where the engine does not say."""
    try:
        return _will_engine_execute_node(node)
    except RuntimeError:  # of a leaf that torch.autograd.grad was given
        return True


class TwiceDifferentiable(TorchFunctionMode):
    """While entered, convolutions of torch.nn.functional, those of modules among them, are `Convolution`s.

    PyTorch's own are left where there is no second derivative in a weight to form, where function transforms, forward
    mode or torch.compile would have to see inside, for what is unbatched, padded on one side more than on the other, or
    neither a plain tensor on the CPU nor the fake of one (elsewhere nothing was measured), and where they are as fast.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for dims, function in enumerate(FUNCTIONS, 1):
            if func is function and may_replace():
                try:
                    found = arguments(dims, *args, **kwargs)
                except TypeError:  # PyTorch tells what is wrong
                    found = None
                if found is not None:
                    return Convolution.apply(*found)
        return func(*args, **kwargs)


def may_replace() -> bool:
    return (
        torch.is_grad_enabled()
        and _will_engine_execute_node is not None
        and not torch.compiler.is_compiling()
        and not _are_functorch_transforms_active()
        and getattr(forward_ad, "_current_level", 0) < 0
    )


def arguments(
    dims: int,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Geometry] | None:
    """What `Convolution` takes, of a call of torch.nn.functional.conv{dims}d; None where that is left to PyTorch."""
    tensors = [input, weight] if bias is None else [input, weight, bias]
    if not all(map(is_plain, tensors)) or not (input.requires_grad and weight.requires_grad):
        return None
    if input.dim() != dims + 2 or weight.dim() != dims + 2:
        return None
    stride, dilation = spread(stride, dims), spread(dilation, dims)
    if padding == "same":
        twice = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        if any(both % 2 for both in twice) or stride != [1] * dims:
            return None
        padding = [both // 2 for both in twice]
    padding = spread(0 if padding == "valid" else padding, dims)
    x, w, b = autocast(input, weight, bias)
    if w.dtype != x.dtype or (b is not None and b.dtype != x.dtype):
        return None
    geometry = Geometry(stride, padding, dilation, False, [0] * dims, groups)
    if not is_faster(x, w, geometry):
        return None
    # Not the leaves themselves, of which the engine does not say whether they are asked for.
    return x.view_as(x), w.view_as(w), None if b is None else b.view_as(b), geometry


def spread(value: Any, dims: int) -> list[int]:
    """A number, or one a dimension, as numbers of all dimensions."""
    values = [value] if isinstance(value, int) else list(value)
    values = values * dims if len(values) == 1 else values
    if len(values) != dims or not all(isinstance(one, int) for one in values):
        raise TypeError
    return values


def is_plain(tensor: Any) -> bool:
    return (
        (type(tensor) in (Tensor, nn.Parameter) or is_fake(tensor))
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
    )


def is_faster(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Whether both gradients of 32 rows, on a core of an EPYC 9000, take less time than with PyTorch's double backward.

    Of the layers left to it they took 1.0 to 2.5 times as long: in float32 of 3 x 3 to an image of 3 x 3, groups of 2
    or 4 channels, and depthwise 5 x 5 and 7 x 7, in bfloat16 of 3 x 3 to an image of 8 x 8. Of others they took, in
    float32, 0.56 (3 x 3, 64 channels of 32 x 32) to 0.95 (3 x 3, 512 of 4 x 4) times as long, 0.5 for 1 x 1 of stride
    2, and 0.17 for depthwise 3 x 3.
    """
    kernel, members = math.prod(w.shape[2:]), w.shape[1]
    if geometry.groups > 1 and members < 8:
        return members == 1 and kernel <= 9
    if min(geometry.stride) < 1:
        return False  # an error, and PyTorch's
    sides = zip(x.shape[2:], w.shape[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True)
    image = math.prod((size + 2 * pad - step * (k - 1) - 1) // stride + 1 for size, k, stride, pad, step in sides)
    return image > (kernel if w.dtype in (torch.float32, torch.float64) else max(kernel, 64))
