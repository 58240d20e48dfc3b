"""Convolutions that are differentiated twice: in the penalty, under autocast, checkpointed, on fake tensors."""

import contextlib
import copy

import pytest
import torch
from networks import error, penalised
from ops.test_convolution_gradient import Counted, is_ours, leaves_of
from oracle import like
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import oodkern
from oodkern import gradient_penalty
from oodkern.ops._convolution import Convolution, TwiceDifferentiable
from oodkern.ops._penalty import input_gradient


def network():
    """Convolutions of several kinds, none of which is left to PyTorch, and smooth functions between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding="same"),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(inplace=True),
        nn.Conv2d(16, 16, 1, stride=2),
        nn.Tanh(),
        nn.Conv2d(16, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).double()


class TestPenalty:
    x = torch.randn(5, 3, 11, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = torch.tensor([0.3, -0.2, 1.0, 0.0, 0.5], dtype=torch.float64)

    def ours(self, module, score=None):
        def energies(x):
            return oodkern.energy(module(x))

        return penalised(module, lambda: gradient_penalty(score or energies, self.x, self.weight, chunk=3))

    def plain(self, module):
        """Without the library's nodes: the norms of all rows at once, differentiated."""
        module = copy.deepcopy(module).eval()

        def penalty():
            x = self.x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(oodkern.energy(module(x)).sum(), x, create_graph=True)
            return (self.weight * gradient.flatten(1).norm(dim=1)).sum()

        return penalised(module, penalty)

    def test_network(self):
        module = network()
        kinds = []
        for layer in module:
            layer.register_forward_hook(lambda layer, _, y: kinds.append(isinstance(layer, nn.Conv2d) == is_ours(y)))
        for ours, exact in zip(self.ours(module), self.plain(network()), strict=True):
            assert error(ours, exact) < 1e-12
        assert kinds == [True] * 20

    def test_frozen_layers(self):
        modules = network(), network()
        for module in modules:
            module[0].requires_grad_(False)
            module[5].weight.requires_grad_(False)
        assert error(self.ours(modules[0])[1], self.plain(modules[1])[1]) < 1e-12

    @pytest.mark.parametrize("autocast", [False, True])
    def test_checkpointing(self, autocast):
        """Layers are computed again outside of the mode, by PyTorch's convolutions, and saved tensors are compared."""
        module = network()
        if autocast:
            module.float()
            self.x, self.weight = self.x.float(), self.weight.float()

        def score(x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for part in (module[:3], module[3:6], module[6:]):
                    x = checkpoint(part, x, use_reentrant=False)
            return oodkern.energy(x.float() if autocast else x)

        def stored(x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                x = module(x)
            return oodkern.energy(x.float() if autocast else x)

        for ours, expected in zip(self.ours(module, score), self.ours(module, stored), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_checkpointed_gradients(self):
        """A score that is a gradient itself, computed again."""
        layer = nn.Conv2d(3, 16, 3, padding=1).double()

        def score(x):
            (gradient,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
            return gradient.square().flatten(1).sum(1)

        def again(x):
            return checkpoint(score, x, use_reentrant=False)

        for ours, expected in zip(self.ours(layer, again), self.ours(layer, score), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_no_gradient_in_a_weight_is_formed_to_be_thrown_away(self):
        """Four layers: once backward in the inputs, and once through that and the forward pass."""
        module = network().eval()
        x = self.x.clone().requires_grad_()
        with TwiceDifferentiable():
            score = oodkern.energy(module(x))
        with Counted() as counted:
            input_gradient(score, x, "score", create_graph=True)
        assert counted.masks == [(True, False)] * 4
        with Counted() as counted:
            gradient_penalty(lambda x: oodkern.energy(module(x)), self.x[:1], self.weight[:1])
        # Second derivatives in the weights from the first layer to the last, then first ones, the images' apart.
        assert counted.masks == [(True, False)] * 4 + [(False, True)] * 4 + [(True, True)] * 3 + [(False, True)]

    def test_graphs_are_released(self):
        """No cycle keeps a chunk's activations until it is collected."""
        import gc
        import weakref

        module, kept = network(), []
        module[6].register_forward_hook(lambda _, inputs, y: kept.extend(map(weakref.ref, (*inputs, y))))
        gc.disable()
        try:
            gradient_penalty(lambda x: oodkern.energy(module(x)), self.x, self.weight)
            assert len(kept) == 2
            assert [one() for one in kept] == [None, None]
        finally:
            gc.enable()

    def test_compiled_part(self):
        """Compiled without being differentiated by the compiler."""
        torch._dynamo.reset()
        module = network()
        compiled = torch.compile(module, backend="eager")
        for ours, exact in zip(
            self.ours(module, lambda x: oodkern.energy(compiled(x))), self.plain(module), strict=True
        ):
            assert error(ours, exact) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Also where what is backward of it runs inside: of float32 layers nothing is rounded then."""

    def second(ours, enabled, order):
        x, w, b = leaves_of(dtype=torch.float32, size=16)
        torch.manual_seed(4)
        with TwiceDifferentiable() if ours else contextlib.nullcontext(), torch.autocast("cpu", dtype, enabled=enabled):
            y = F.conv2d(x, w, b)
        assert (is_ours(y), y.dtype) == (ours, dtype if enabled else torch.float32)
        g = like(y.detach()).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=order == "inside"):
            (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
            found = [
                y.detach(),
                gx.detach(),
                *torch.autograd.grad(gx, (g, w), like(gx)),
                *torch.autograd.grad(y, (x, w, b), like(y)),
            ]
        assert [one.dtype for one in found[1:]] == [torch.float32, g.dtype, *(torch.float32,) * 4]
        return found

    exact = second(False, False, "outside")
    for order in ("inside", "outside"):
        for ours, theirs, one in zip(second(True, True, order), second(False, True, order), exact, strict=True):
            assert error(ours, one.double()) <= 1.2 * error(theirs, one.double())
        for ours, one in zip(second(True, False, order), exact, strict=True):
            assert error(ours, one.double()) < 1e-6


def test_saves_what_pytorch_saves():
    """In number, order, shape and dtype, on which the recomputation of checkpointed layers relies."""

    def saved(ours):
        x, w, b = leaves_of(dtype=torch.float32, size=16)
        found = []

        def pack(tensor):
            found.append((tensor.shape, tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with TwiceDifferentiable() if ours else contextlib.nullcontext():
                y = F.conv2d(x, w, b)
                with torch.autocast("cpu", torch.bfloat16):
                    z = F.conv2d(x, w, b)
                assert is_ours(y) == is_ours(z) == ours
            torch.autograd.grad(y, x, like(y), create_graph=True)
        return found

    assert saved(True) == saved(False)
    assert len(saved(True)) == 7


def test_fake_tensors():
    """Memory is foretold of the same nodes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), TwiceDifferentiable():
        x, w, b = leaves_of()
        y = F.conv2d(x, w, b)
        assert is_ours(y)
        (gx,) = torch.autograd.grad(y, x, y.detach(), create_graph=True)
        assert torch.autograd.grad(gx, w, gx.detach())[0].shape == w.shape


def test_is_found_where_modules_call_it():
    """torch.nn's convolutions go through the functions that are replaced."""
    for dims, layer in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
        x = leaves_of(dims, dtype=torch.float32)[0]
        with TwiceDifferentiable():
            assert is_ours(layer(16, 8, 3)(x))
    assert issubclass(Convolution, torch.autograd.Function)
