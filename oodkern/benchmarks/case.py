"""What is compared: one computation at one shape, ours and what a user would write or install instead."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PASSES = ("forward", "backward", "double backward", "whole")
UPSTREAMS = ("random", "mean", "loss")
LOSS_SCALE = 1024.0
OURS = "oodkern"
COMPILED = "torch.compile"
SEED = 0


@dataclass(frozen=True)
class Contender:
    """One way to compute it.

    `function(*inputs)` gives the score (of passes "forward": whatever the case is about), through which autograd forms
    the gradients of the case. `told`: it also takes `upstream=`, the gradient that will come back. `by_hand`: it takes
    that too and returns the gradients itself. `compiled`: torch.compile makes the kernel, at the first call. `needs`:
    modules of third parties, and "cuda" where it has no CPU kernels; see `missing`.
    """

    function: Callable[..., Any]
    told: bool = False
    by_hand: bool = False
    compiled: bool = False
    needs: tuple[str, ...] = ()

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None where it can."""
        for name in self.needs:
            if name == "cuda":
                if device.type != "cuda":
                    return "has no CPU kernels"
                continue
            try:
                importlib.import_module(name)
            except Exception as error:  # third parties fail in many ways
                return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return None


@dataclass(frozen=True, eq=False)
class Case:
    """A room of ops, what is computed of it, sizes, dtype, passes, inputs, contenders and the least work.

    Cases are made by functions that `case` decorates, which know how to make each again at other sizes and in another
    process.
    """

    room: str
    title: str
    sizes: Mapping[str, int]
    dtype: str
    passes: str
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    """Random inputs of a seeded generator: tensors are on its device, without that being said."""
    contenders: Mapping[str, Contender]
    """The first is ours; `base` is one of them."""
    oracle: Callable[..., Any] | None = None
    """The same in float64: of inputs in float64 what contenders give (gradients are formed by autograd)."""
    error: Callable[[Any, tuple[Any, ...]], float] | None = None
    """Where an oracle does not say it: of a result and the inputs how wrong the result is."""
    leaves: tuple[int, ...] = (0,)
    """The inputs whose gradients are formed."""
    upstream: int | None = None
    """Rows of the upstream gradient; None: it is a number."""
    upstreams: str = "random"
    """"random" numbers; "mean": one for all rows, as a mean has it; "loss": a power of two, as loss scales are."""
    rows: tuple[int, ...] = ()
    """The inputs that have one row a sample, where samples do not meet: the oracle takes some at a time."""
    flops: float = 0.0
    """Floating-point operations of the matrix products that no method can do without."""
    bytes: float = 0.0
    """Bytes of what is read and written once."""
    slack: float = 1e-6
    """The error that ours may have where the base happens to be exact: <= 2 * error of the base + slack."""
    memory_share: float | None = None
    """The share of the base's memory beyond results that ours may hold at most, where that is promised."""
    base: str = "eager"
    target: float | None = None
    """How many times faster than the base was aimed for on a CPU."""
    why: str = ""
    """Why a target is out of reach, or a rival faster: what of it is the hardware's or the rival's, as measured."""
    factory: Callable[..., Case] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.passes not in PASSES:
            raise ValueError(f"passes: expected one of {', '.join(PASSES)}, got {self.passes!r}")
        if self.base not in self.contenders:
            raise ValueError(f"base: expected one of {', '.join(self.contenders)}, got {self.base!r}")
        if self.upstreams not in UPSTREAMS:
            raise ValueError(f"upstreams: expected one of {', '.join(UPSTREAMS)}, got {self.upstreams!r}")

    def __reduce__(self) -> Any:
        if self.factory is None:
            raise TypeError(f"{self.title}: only cases of a function decorated with `case` go to other processes")
        return _again, (self.factory, dict(self.arguments))

    @property
    def shape(self) -> str:
        return " x ".join(f"{name}={size:,}" for name, size in self.sizes.items())

    @property
    def name(self) -> str:
        """Unique among cases."""
        return f"{self.room}: {self.title}, {self.shape}, {self.dtype}"

    def at(self, **changes: Any) -> Case:
        """The same at other sizes, or with other arguments of the function that made it."""
        assert self.factory is not None
        return self.factory(**{**self.arguments, **changes})

    def ready(self, name: str, dynamic: bool = False) -> Callable[..., Any]:
        """A contender's function; what is compiled is so at its first call, for any sizes where `dynamic`."""
        contender = self.contenders[name]
        return torch.compile(contender.function, dynamic=dynamic) if contender.compiled else contender.function

    def data(self, device: torch.device) -> tuple[tuple[Any, ...], Tensor]:
        """The inputs and the upstream gradient, the same in every process.

        They are made on the device: a CPU takes 16 ns a normal number, more than a minute for 10 million features.
        """
        generator = torch.Generator(device).manual_seed(SEED)
        with device:
            inputs = self.inputs(generator)
            size = () if self.upstream is None else (self.upstream,)
            if self.upstreams == "random":
                upstream = torch.randn(size, generator=generator)
            elif self.upstreams == "mean":
                upstream = torch.randn((), generator=generator).expand(size)
            else:
                upstream = torch.full(size, LOSS_SCALE)
        moved = tuple(one.to(device) if isinstance(one, Tensor) else one for one in inputs)
        return moved, upstream.to(device)

    def work(
        self, name: str, inputs: tuple[Any, ...], upstream: Tensor, function: Callable[..., Any] | None = None
    ) -> Callable[[], Any]:
        """What is timed: the passes of a contender over these inputs, by `function` where `ready` made that before."""
        contender = self.contenders[name]
        function = self.ready(name) if function is None else function
        if contender.told:
            function = functools.partial(function, upstream=upstream)
        if contender.by_hand:
            return functools.partial(function, *inputs, upstream=upstream)
        seconds = cotangents(inputs, self.leaves) if self.passes == "double backward" else ()
        return functools.partial(run_passes, self.passes, function, inputs, upstream, self.leaves, seconds)


def _again(factory: Callable[..., Case], arguments: dict[str, Any]) -> Case:
    return factory(**arguments)


def case(factory: Callable[..., Case]) -> Callable[..., Case]:
    """Decorates a function of keywords, at the top of a module, that returns a `Case`; it takes `why` besides."""

    @functools.wraps(factory)
    def make(*, why: str = "", **arguments: Any) -> Case:
        made = factory(**arguments)
        for name, value in (("factory", make), ("arguments", {**arguments, "why": why}), ("why", why)):
            object.__setattr__(made, name, value)
        return made

    return make


def cotangents(inputs: tuple[Any, ...], leaves: tuple[int, ...]) -> list[Tensor]:
    """For the gradients of the leaves: their cosines, numbers between -1 and 1 that are the same in float64."""
    return [inputs[i].detach().cos() for i in leaves]


def run_passes(
    passes: str,
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    upstream: Tensor,
    leaves: tuple[int, ...],
    seconds: Sequence[Tensor] = (),
) -> Any:
    """What a function of the inputs costs: "forward" its value alone; "backward" the value and the gradients of the
    leaves for the upstream, which are returned; "double backward" the gradients of these too, returned, for the
    cotangents `seconds`; "whole" whatever it does."""
    if passes == "whole":
        return function(*inputs)
    if passes == "forward":
        with torch.no_grad():
            return function(*inputs)
    inputs = tuple(one.detach().requires_grad_() if i in leaves else one for i, one in enumerate(inputs))
    wanted = [inputs[i] for i in leaves]
    value = function(*inputs)
    upstream = upstream.to(value.dtype)
    if passes == "backward":
        return torch.autograd.grad(value, wanted, upstream)
    gradients = torch.autograd.grad(value, wanted, upstream, create_graph=True)
    return torch.autograd.grad(gradients, wanted, seconds)
