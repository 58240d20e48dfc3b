"""Room `distill`, beside its numbers: autograd, torch.func, torch.compile, layouts, memory, arguments."""

import itertools

import pytest
import torch
from oracle import allocations, like, value_and_gradients
from torch.autograd import gradcheck

import oodkern
from oodkern import reference

PAIRS = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]


def pair(shape, dtypes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype) for dtype in dtypes]


class TestAutograd:
    def test_gradcheck(self):
        for shape in ((3, 5), (2, 3, 4)):
            student, teacher = pair(shape, (torch.float64, torch.float64))
            for temperature in (1.0, 2.5):
                assert gradcheck(
                    lambda s, t=teacher, T=temperature: oodkern.distillation(s, t, T),
                    [student.clone().requires_grad_()],
                    check_batched_grad=True,
                )

    def test_reference_gradcheck(self):
        student, teacher = pair((3, 5), (torch.float64, torch.float64))
        assert torch.autograd.gradcheck(lambda s: reference.distillation(s, teacher, 1.7), student.requires_grad_())
        exact = 1.7**2 * torch.nn.functional.kl_div(
            (student / 1.7).log_softmax(-1), (teacher / 1.7).log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        torch.testing.assert_close(reference.distillation(student, teacher, 1.7), exact, rtol=1e-13, atol=1e-13)

    def test_second_derivative(self):
        student, teacher = pair((3, 5), (torch.float64, torch.float64))
        student.requires_grad_()
        (gradient,) = torch.autograd.grad(oodkern.distillation(student, teacher).sum(), student, create_graph=True)
        with pytest.raises(RuntimeError, match=r"oodkern\.distillation can be differentiated once"):
            gradient.sum().backward()
        with oodkern.backend("reference"):
            assert torch.autograd.gradgradcheck(lambda s: oodkern.distillation(s, teacher), student)

    def test_teacher_gets_no_gradient(self):
        student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        for backend in ("native", "reference"):
            with oodkern.backend(backend):
                with pytest.raises(ValueError, match="teacher_logits: expected a tensor that requires no gradient"):
                    oodkern.distillation(student, teacher)
                oodkern.distillation(student, teacher.detach()).sum().backward()
                with torch.no_grad():
                    oodkern.distillation(student, teacher)
        assert teacher.grad is None

    def test_func_grad_and_vmap(self):
        student, teacher = pair((4, 6, 5), (torch.float64, torch.float64))
        leaf = student.clone().requires_grad_()
        (expected,) = torch.autograd.grad(oodkern.distillation(leaf, teacher, 2.0).sum(), leaf)
        one = torch.func.grad(lambda s, t: oodkern.distillation(s, t, 2.0).sum())
        torch.testing.assert_close(one(student, teacher), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.func.vmap(one)(student, teacher), expected, rtol=0, atol=0)
        both = torch.func.vmap(one, in_dims=(1, 0), out_dims=1)(student, teacher.transpose(0, 1))
        torch.testing.assert_close(both, expected, rtol=0, atol=0)
        shared = torch.func.vmap(one, in_dims=(0, None))(student, teacher[0])
        leaf = student.clone().requires_grad_()
        value = oodkern.distillation(leaf, teacher[:1].expand(4, 6, 5), 2.0)
        torch.testing.assert_close(shared, torch.autograd.grad(value.sum(), leaf)[0], rtol=0, atol=0)

    def test_forward_mode_raises(self):
        student, teacher = torch.randn(2, 3), torch.randn(2, 3)
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            torch.func.jvp(lambda s: oodkern.distillation(s, teacher), (student,), (student,))

    def test_saved_tensor_hooks(self):
        student, teacher = pair((5, 9), (torch.float64, torch.float64))
        expected = value_and_gradients(lambda s: oodkern.distillation(s, teacher), [student])
        packed = []

        def pack(tensor):
            packed.append(tensor.shape)
            return tensor.clone().T.contiguous().T if tensor.dim() == 2 else tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
            again = value_and_gradients(lambda s: oodkern.distillation(s, teacher), [student])
        assert (5, 4) in packed
        for a, b in zip(again, expected, strict=True):
            assert torch.equal(a, b)

    def test_compile_fullgraph(self):
        torch._dynamo.reset()
        compiled = torch.compile(oodkern.distillation, fullgraph=True, dynamic=True)
        for dtypes, rows, temperature in (
            ((torch.float32, torch.float32), 6, 1.0),
            ((torch.bfloat16, torch.float32), 7, 2.0),
        ):
            student, teacher = pair((rows, 33), dtypes)
            results = [
                value_and_gradients(lambda s, f=f, t=teacher, T=temperature: f(s, t, T), [student])
                for f in (compiled, oodkern.distillation)
            ]
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)

    def test_autocast(self):
        weight = torch.eye(8, requires_grad=True)
        x, teacher = torch.randn(6, 8) * 3, torch.randn(6, 8)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                student = x @ weight
                value = oodkern.distillation(student, teacher, 2.0)
            assert student.dtype == dtype
            assert value.dtype == torch.float32
            exact = reference.distillation(student.detach().double(), teacher.double(), 2.0)
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
            (gradient,) = torch.autograd.grad(value, weight, like(value))
            assert gradient.dtype == torch.float32


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
class TestRows:
    def test_opcheck(self, dtypes):
        ops = torch.ops.oodkern
        for shape in ((5, 7), (0, 7), (1, 1), (2, 3, 4), (9,)):
            student, teacher = pair(shape, dtypes)
            views = [(student, teacher)]
            if len(shape) > 1:
                views.append((student.transpose(0, -1), teacher.transpose(0, -1)))
            for s, t in views:
                torch.library.opcheck(ops.distillation.default, (s, t, 2.0))
                value, shares = ops.distillation(s, t, 2.0)
                torch.library.opcheck(ops.distillation_backward.default, (like(value), s, t, shares, 2.0))

    def test_empty_and_single(self, dtypes):
        for shape in ((0, 5), (0, 0), (3, 0), (1, 1), (1, 5), (4, 0, 5), (5,), (1,)):
            student, teacher = pair(shape, dtypes)
            student.requires_grad_()
            value = oodkern.distillation(student, teacher)
            assert value.shape == shape[:-1]
            (gradient,) = torch.autograd.grad(value, student, like(value))
            assert gradient.shape == shape
            exact = reference.distillation(student.detach().double(), teacher.double())
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)

    def test_strides_are_seen(self, dtypes):
        """Views give bit for bit what dense copies give, also under upstreams with stride 0."""
        student, teacher = pair((6, 9, 34), dtypes)
        for cut in (
            lambda x: x[:, :, ::2],
            lambda x: x[::2],
            lambda x: x.transpose(0, 1),
            lambda x: x.transpose(1, 2),
            lambda x: x[1:, 2:, 3:],
            lambda x: x[:1].expand(5, 9, 34),
            lambda x: x[..., :1].expand(6, 9, 7),
        ):
            results = []
            for dense_student, dense_teacher in itertools.product((False, True), repeat=2):
                s, t = (
                    x.clone(memory_format=torch.contiguous_format) if dense else x
                    for x, dense in zip((cut(student), cut(teacher)), (dense_student, dense_teacher), strict=True)
                )
                leaf = s.detach().requires_grad_()
                value = oodkern.distillation(leaf, t, 1.3)
                upstream = like(value)
                gradients = [
                    torch.autograd.grad(value, leaf, g, retain_graph=True)[0]
                    for g in (upstream, upstream.transpose(0, 1).contiguous().transpose(0, 1))
                ]
                assert torch.equal(*gradients)
                one = upstream.sum()
                gradients += [
                    torch.autograd.grad(value, leaf, g, retain_graph=True)[0]
                    for g in (one.expand(value.shape), one.expand(value.shape).contiguous())
                ]
                assert torch.equal(*gradients[2:])
                results.append((value, *gradients[::2]))
            for other in results[1:]:
                assert all(map(torch.equal, other, results[0]))

    def test_nan_stays_in_its_row(self, dtypes):
        student, teacher = pair((5, 1500), dtypes)
        clean = value_and_gradients(lambda s: oodkern.distillation(s, teacher), [student])
        others = torch.tensor([0, 1, 3, 4])
        for which in (student, teacher):
            kept, which[2, 1400] = which[2, 1400].clone(), torch.nan
            dirty = value_and_gradients(lambda s: oodkern.distillation(s, teacher), [student])
            which[2, 1400] = kept
            assert dirty[0][2].isnan()
            for a, b in zip(dirty, clean, strict=True):
                assert torch.equal(a[others], b[others])

    def test_repeats_bit_for_bit_whatever_the_threads(self, dtypes):
        student, teacher = pair((257, 1000), dtypes)
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (threads, threads, 1, 3):
                torch.set_num_threads(count)
                results.append(value_and_gradients(lambda s: oodkern.distillation(s, teacher, 2.0), [student]))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))

    def test_no_temporary(self, dtypes):
        student, teacher = pair((512, 1000), dtypes)
        student.requires_grad_()
        oodkern.distillation(student, teacher)
        value = oodkern.distillation(student, teacher)
        forward = allocations(lambda: oodkern.distillation(student, teacher))
        assert sum(forward) <= 5 * value.numel() * value.element_size() + 64, forward
        upstream = like(value)
        torch.autograd.grad(value, student, upstream, retain_graph=True)
        backward = allocations(lambda: torch.autograd.grad(value, student, upstream, retain_graph=True))
        size = student.numel() * student.element_size()
        assert sum(backward) <= size + size // 64, f"allocated {backward} for {size}"


def test_other_devices_take_the_reference():
    student, teacher = (torch.empty(5, 7, dtype=torch.bfloat16, device="meta") for _ in range(2))
    value = oodkern.distillation(student.requires_grad_(), teacher)
    assert (value.shape, value.dtype, value.device.type) == ((5,), torch.float32, "meta")
    assert torch.autograd.grad(value.sum(), student)[0].dtype == torch.bfloat16


def test_rejects_what_it_cannot_compute():
    z = torch.randn(4, 5)
    with pytest.raises(TypeError, match=r"student_logits: expected a torch\.Tensor, got list"):
        oodkern.distillation([1.0], z)
    with pytest.raises(TypeError, match=r"teacher_logits: expected one of .* got int64"):
        oodkern.distillation(z, z.long())
    with pytest.raises(ValueError, match=r"teacher_logits: expected \[4, 5\] as student_logits are, got \[4, 4\]"):
        oodkern.distillation(z, z[:, :4])
    with pytest.raises(TypeError, match="teacher_logits: expected float32 as student_logits are, got float64"):
        oodkern.distillation(z, z.double())
    with pytest.raises(ValueError, match=r"student_logits: .* without dimensions"):
        oodkern.distillation(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="teacher_logits: expected on cpu, where student_logits are, got meta"):
        oodkern.distillation(z, z.to("meta"))
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        oodkern.distillation(z, z, 0)


def test_raw_ops_guard_their_memory():
    ops, z = torch.ops.oodkern, torch.randn(4, 5)
    shares = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="teacher_logits: expected the shape"):
        ops.distillation(z, z[:3], 1.0)
    with pytest.raises(RuntimeError, match=r"teacher_logits: expected the shape .* and float64"):
        ops.distillation(z, z.double(), 1.0)
    with pytest.raises(RuntimeError, match="grad: expected one number per row"):
        ops.distillation_backward(torch.ones(3), z, z, shares, 1.0)
    for wrong in (torch.ones(4, 3), torch.ones(4, 4, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="shares: expected four numbers per row"):
            ops.distillation_backward(torch.ones(4), z, z, wrong, 1.0)
