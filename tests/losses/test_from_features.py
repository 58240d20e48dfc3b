"""Losses from features and a head are those of the logits that the two make."""

import pytest
import torch
import torch.nn.functional as F
from oracle import allocations, assert_two_sided, in_float64, like, value_and_gradients
from test_losses import CASES, K, M, N, compiler, costly, reductions

from oodkern.losses import ClassificationLoss, EDGELoss, EnergyLoss, OutlierExposureLoss

D = 5
REDUCTIONS = ("mean", "sum", "batchmean", "none")


@pytest.fixture(params=CASES)
def case(request):
    """A loss, and its formula of (logits_id, target, logits_ood)."""
    loss, formula, _ = CASES[request.param]
    yield loss, formula
    loss.reduction = "mean"


def batch(multi_label, dtype=torch.float64):
    """Features, a head whose logits are about as large as those of test_losses, and targets with repeated classes."""
    torch.manual_seed(5)
    features, weight, bias = torch.randn(N + M, D), torch.randn(K, D) * 2, torch.randn(K)
    if multi_label:
        target = torch.randint(0, 2, (N, K))
        target[2] = 0
    else:
        target = torch.randint(0, K, (N,))
    return [tensor.to(dtype) for tensor in (features, weight, bias)], target


def mixed(target):
    """An order of all rows, and the targets in it, outliers marked by -1."""
    order = torch.randperm(N + M, generator=torch.Generator().manual_seed(1))
    return order, torch.cat([target, target.new_full((M, *target.shape[1:]), -1)])[order]


def calls(loss, target):
    """The same loss by style: of features and a head, and of their logits."""
    order, labels = mixed(target)
    is_ood = order >= N
    styles = {
        "split": (
            lambda x, w, b=None, **o: loss.from_features(x, w, b, target, N, **o),
            lambda z, **o: loss(z[:N], target, z[N:], **o),
        ),
        "mixed": (
            lambda x, w, b=None, **o: loss.from_features(x[order], w, b, labels, **o),
            lambda z, **o: loss(z[order], labels, **o),
        ),
    }
    if loss.multi_label:
        marked = labels.clamp_min(0)
        styles["marked"] = (
            lambda x, w, b=None, **o: loss.from_features(x[order], w, b, marked, is_ood=is_ood, **o),
            lambda z, **o: loss(z[order], marked, is_ood=is_ood, **o),
        )
    return styles


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_parts_and_gradients(case, reduction, with_bias):
    loss, _ = case
    if reduction not in reductions(loss):
        pytest.skip("a loss that couples rows")
    loss.reduction = reduction
    tensors, target = batch(loss.multi_label)
    tensors = tensors if with_bias else tensors[:2]
    for style, (fused, full) in calls(loss, target).items():
        results = []
        for function in (fused, lambda *a, full=full, **o: full(F.linear(*a), **o)):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            value, parts = function(*leaves, return_parts=True)
            assert not any(part.requires_grad for part in parts.values())
            results.append(({"value": value, **parts}, torch.autograd.grad(value, leaves, like(value))))
        (ours, our_gradients), (expected, gradients) = results
        assert ours.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12, msg=f"{style} {name}")
        for one, other in zip(our_gradients, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=style)
        assert all(gradient.abs().sum() > 0 for gradient in our_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_sided(case, dtype):
    """Against the formula in float64 of the rounded inputs; eager PyTorch rounds 16-bit logits, and this does not."""
    loss, formula = case
    tensors, target = batch(loss.multi_label, dtype)
    fused, full = calls(loss, target)["split"]
    assert fused(*tensors).dtype == torch.float32

    def oracle(x, w, b):
        z = F.linear(x, w, b)
        return formula(z[:N], target, z[N:])

    ours, eager = value_and_gradients(fused, tensors), value_and_gradients(lambda *a: full(F.linear(*a)), tensors)
    exact = in_float64(oracle, tensors)
    # Differences of numbers as large as the logits, here up to 30, and hinges, squares of such differences.
    assert_two_sided(ours[0], exact[0], eager[0], size=torch.tensor(30.0))
    for name, one, truth, theirs in zip(("features", "weight", "bias"), ours[1:], exact[1:], eager[1:], strict=True):
        assert one.dtype == dtype
        # A 16-bit gradient of the weight or bias is rounded twice: as that of the energy, and as the sum.
        rounded = torch.finfo(dtype).eps * truth.abs().max() if dtype != torch.float32 else 0.0
        assert_two_sided(one, truth, theirs + rounded, name, rows=True, size=truth.abs().max(), condition=30.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_a_cast(case, dtype):
    """Of the arguments, before anything is formed of them; nothing else is rounded to 16 bits."""
    loss, _ = case
    tensors, target = batch(loss.multi_label, torch.float32)
    for fused, _ in calls(loss, target).values():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with torch.autocast("cpu", dtype):
            value = fused(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        cast = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        expected = fused(*cast)
        assert torch.equal(value, expected)
        for one, other in zip(gradients, torch.autograd.grad(expected, cast), strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other.float())


def test_bits_repeat(case):
    loss, _ = case
    tensors, target = batch(loss.multi_label, torch.float32)
    for fused, _ in calls(loss, target).values():
        first, second = value_and_gradients(fused, tensors), value_and_gradients(fused, tensors)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_differentiable_twice(case):
    loss, _ = case
    tensors, target = batch(loss.multi_label)
    for fused, full in calls(loss, target).values():
        ours = value_and_gradients(fused, tensors, order=2)
        expected = value_and_gradients(lambda *a, full=full: full(F.linear(*a)), tensors, order=2)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_only_some_of_the_gradients(case):
    """A frozen head, or features that come from nowhere."""
    loss, _ = case
    tensors, target = batch(loss.multi_label)
    for fused, _ in calls(loss, target).values():
        every = value_and_gradients(fused, tensors)[1:]
        for wanted in range(3):
            leaves = [tensor.clone().requires_grad_(i == wanted) for i, tensor in enumerate(tensors)]
            value = fused(*leaves)
            (found,) = torch.autograd.grad(value, leaves[wanted], like(value))
            torch.testing.assert_close(found, every[wanted], rtol=1e-12, atol=1e-13)


def test_compiles(case):
    loss, _ = case
    if costly(loss):
        return
    tensors, target = batch(loss.multi_label, torch.float32)
    for style, (fused, _) in calls(loss, target).items():
        torch._dynamo.reset()
        expected = value_and_gradients(fused, tensors)
        # Where a mixed batch's outliers are counted the graph breaks.
        whole = style == "split" or not (isinstance(loss, EDGELoss) and loss.beta)
        compiled = torch.compile(fused, fullgraph=whole, backend=compiler(loss))
        for one, other in zip(value_and_gradients(compiled, tensors), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_function_transforms(case):
    """torch.func.grad, and vmap over heads: an ensemble."""
    loss, _ = case
    (x, w, b), target = batch(loss.multi_label)
    for fused, _ in calls(loss, target).values():
        heads = torch.stack([w, w * 0.5]), torch.stack([b, -b])
        gradients = torch.func.vmap(torch.func.grad(fused, argnums=(1, 2)), in_dims=(None, 0, 0))(x, *heads)
        for i in range(2):
            leaves = [head[i].clone().requires_grad_() for head in heads]
            expected = torch.autograd.grad(fused(x, *leaves), leaves)
            for one, other in zip(gradients, expected, strict=True):
                torch.testing.assert_close(one[i], other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n_id", [0, N, N + M, None])
@pytest.mark.parametrize("rows", [0, N + M])
def test_empty_parts_keep_the_graph(case, n_id, rows):
    loss, _ = case
    (x, w, b), target = batch(loss.multi_label)
    n_id = n_id if n_id is None else min(n_id, rows)
    labels = target.repeat(3, *[1] * (target.dim() - 1))[: rows if n_id is None else n_id]
    leaves = [tensor.clone().requires_grad_() for tensor in (x[:rows], w, b)]
    value, parts = loss.from_features(*leaves, labels, n_id, return_parts=True)
    z = F.linear(x[:rows], w, b)
    expected = loss(z, labels) if n_id is None else loss(z[:n_id], labels, z[n_id:])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert value.isfinite()
    assert all(part.isfinite() for part in parts.values())
    value.backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_other_rows_do_not_reach_a_part(case):
    """A NaN outlier poisons the OOD part alone."""
    loss, _ = case
    (x, w, b), target = batch(loss.multi_label)
    x[N + 3, 1] = torch.nan
    for fused, _ in calls(loss, target).values():
        _, parts = fused(x, w, b, return_parts=True)
        assert parts["bce" if loss.multi_label else "ce"].isfinite()


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("kind", [ClassificationLoss, EnergyLoss, OutlierExposureLoss])
def test_memory(kind, multi):
    """Nothing of [N, K], and of [K, D] one: the gradient of the weight."""
    rows, classes, width = 512, 20_000, 512
    loss = kind(multi_label=multi)
    x, w, b = torch.randn(rows, width), torch.randn(classes, width) / 20, torch.randn(classes)
    target = torch.randint(0, 2, (rows // 2, classes)) if multi else torch.randint(0, classes, (rows // 2,))
    leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
    made = allocations(lambda: torch.autograd.grad(loss.from_features(*leaves, target, rows // 2), leaves))
    large = [size for size in made if size > 17 * 2**20]
    assert large == [classes * width * 4]
