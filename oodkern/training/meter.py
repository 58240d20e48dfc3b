"""The bytes that tensors hold, op by op: of real tensors and of fake ones, which have sizes and no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from oodkern.ops._checks import is_fake

WORK = "work"  # the kind of what was not told to be of another one


class Meter(TorchDispatchMode):
    """Inside, every storage that an op reads or makes is counted from then on until it is freed.

    `live` and `peak` are bytes; `by_kind` and `at_peak` the same by kind, which `hold` tells. What kernels allocate for
    themselves (workspaces, temporaries inside of an op) passes no op and is not seen.

    Args:
        device: storages of this type of device are counted.
        block: what a storage's bytes are rounded up to; PyTorch's CUDA allocator hands out multiples of 512.
    """

    def __init__(self, device: str = "cpu", block: int = 1) -> None:
        super().__init__()
        self.device, self.block = device, block
        self.live = self.peak = 0
        self.by_kind: dict[str, int] = {WORK: 0}
        self.at_peak: dict[str, int] = {}
        self._known: dict[int, tuple[int, str]] = {}  # bytes and kind of live storages, by their address

    def begin(self) -> None:
        """The peak is that of what comes from now on."""
        self.peak, self.at_peak = self.live, dict(self.by_kind)

    def hold(self, tensors: Iterable[Any], kind: str) -> None:
        """Counts tensors as of a kind from now on."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.see(tensor, kind)

    def hold_gradients(self, parameters: Iterable[nn.Parameter], kind: str) -> None:
        """Counts the gradients of parameters as of a kind, as soon as they are accumulated."""
        for one in parameters:
            if one.requires_grad:
                one.register_post_accumulate_grad_hook(lambda of: self.hold([of.grad], kind))

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is None:
            size = -(-storage.nbytes() // self.block) * self.block
            self._known[key] = size, kind or WORK
            weakref.finalize(storage, self._free, key).atexit = False
            self._change(size, kind or WORK)
        elif kind is not None and kind != known[1]:
            self._known[key] = known[0], kind
            self.by_kind[known[1]] -= known[0]
            self.by_kind[kind] = self.by_kind.get(kind, 0) + known[0]

    def _change(self, size: int, kind: str) -> None:
        self.live += size
        self.by_kind[kind] = self.by_kind.get(kind, 0) + size
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, dict(self.by_kind)

    def _free(self, key: int) -> None:
        size, kind = self._known.pop(key)
        self._change(-size, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        result = func(*args, **kwargs)
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result


class WorstCase(TorchDispatchMode):
    """Inside, over a FakeTensorMode, code that looks at numbers goes on as if these selected all there is.

    `nonzero` finds everything, and a number that is read is 1 (or true): a label that exists, a condition that holds, a
    factor that changes nothing. Fused optimizers, of which SGD is not known for fake tensors, make nothing.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func.namespace == "aten" and func.__name__.startswith(("_fused_sgd_.", "_fused_adamw_.")):
            return None
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


class FakeCopies(torch.overrides.TorchFunctionMode):
    """Inside, `copy.deepcopy` of whatever holds tensors gives fake ones in their places, on a device.

    As torch's FakeCopyMode, which keeps tensors on the devices that they are on.
    """

    def __init__(self, mode: Any, device: torch.device) -> None:
        super().__init__()
        self.mode, self.device = mode, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C.TensorBase.clone:  # of a parameter
            return self.fake(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.fake(tensor)
            return memo[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def fake(self, tensor: Tensor) -> Tensor:
        with self.mode:
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)
        return made.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def check_fake(tensors: Iterable[Tensor]) -> None:
    """Raises RuntimeError for a tensor with numbers, on which a step would be computed in earnest, and counted wrongly.

    Modules with a `__deepcopy__` of their own, or a PyTorch that copies in another way, could bring one along.
    """
    if real := sum(not is_fake(one) for one in tensors):
        raise RuntimeError(f"expected parameters and buffers without numbers after the copy, got {real} with numbers")
