"""A head whose classes are spread over processes gives the loss and the gradients of the whole head."""

import itertools

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import allocations, assert_two_sided, like
from test_import import run as run_program
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from oodkern.losses import (
    ClassificationLoss,
    EDGELoss,
    EnergyLoss,
    GRegLoss,
    OutlierExposureLoss,
    SeparationLoss,
)
from oodkern.losses.parallel import Share

N, M, D = 9, 7, 5
HINGES = {"alpha": 0.7, "margin_in": -6.0, "margin_out": -3.0}
JOINT_HINGES = {"alpha": 0.7, "margin_in": -20.0, "margin_out": -5.0, "multi_label": True}
LOSSES = {
    "classification": lambda: ClassificationLoss(),
    "classification multi": lambda: ClassificationLoss(multi_label=True),
    "exposure": lambda: OutlierExposureLoss(),
    "exposure multi": lambda: OutlierExposureLoss(multi_label=True),
    "energy": lambda: EnergyLoss(temperature=2.0, **HINGES),
    "energy multi": lambda: EnergyLoss(**JOINT_HINGES),
    "greg": lambda: GRegLoss(**HINGES),
    "edge": lambda: EDGELoss(beta=0.5, margin=1.0),
    "edge frequency": lambda: EDGELoss(beta=0.5, tail="frequency", class_counts=torch.arange(10) % 4),
    "separation": lambda: SeparationLoss(alpha=0.8, beta=0.6, sep_reduction="mean"),
    "separation sum": lambda: SeparationLoss(sep_reduction="sum", outlier_loss=EnergyLoss(temperature=2.0, **HINGES)),
}
# Processes -> numbers of classes: 5 + 5, 4 + 3, 1 + 0; 4 + 4 + 2, 2 + 2 + 0, 1 + 0 + 0.
CLASSES = {2: (10, 7, 1), 3: (10, 4, 1)}


def batch(K, multi_label, dtype):
    generator = torch.Generator().manual_seed(5)
    x, w, b = (torch.randn(*shape, generator=generator) for shape in ((N + M, D), (K, D), (K,)))
    target = torch.randint(0, 2, (N, K), generator=generator)
    if not multi_label:
        target = torch.randint(0, K, (N,), generator=generator)
        target[:2] = torch.tensor([0, K - 1])
    return [tensor.to(dtype) for tensor in (x, 2 * w, b)], target


def arguments(style, tensors, target):
    """Of from_features: tensors and options."""
    (x, w, b), order = tensors, torch.randperm(N + M, generator=torch.Generator().manual_seed(1))
    labels = torch.cat([target, target.new_full((M, *target.shape[1:]), -1)])[order]
    if style == "split":
        return (x, w, b, target, N), {}
    if style == "part":  # of a larger batch
        return (x, w, b, target, N), {"counts": (40, 50)}
    if style == "known alone":
        return (x[:N], w, b, target, N), {}
    if style == "mixed":
        return (x[order], w, b, labels), {}
    return (x[order], w, b, labels.clamp_min(0)), {"is_ood": order >= N}


def cases(Ks, dtype=torch.float64):
    """Losses, and all ways to call them; every combination at the first number of classes."""
    for K, name in itertools.product(Ks, LOSSES):
        loss, first = LOSSES[name](), Ks.index(K) == 0
        if name == "edge frequency" and K != 10:
            continue
        styles = ["split", "mixed"] + ["marked"] * loss.multi_label
        for style, with_bias in itertools.product(styles, (True, False) if first else (True,)):
            yield name, K, style, "mean", with_bias, dtype
        if not first:
            continue
        coupled = isinstance(loss, EDGELoss | GRegLoss)
        for reduction in ("sum", "batchmean", *(() if coupled else ("none",))):
            yield name, K, "split", reduction, True, dtype
            yield name, K, "mixed", reduction, True, dtype
        yield name, K, "known alone", "mean", True, dtype
        if loss.separable:
            yield name, K, "part", "mean", True, dtype


def result(case, mesh=None, autocast=None):
    """Value, parts and gradients: of the whole head, or of this process's part of it, gathered."""
    name, K, style, reduction, with_bias, dtype = case
    loss = LOSSES[name]()
    loss.reduction = reduction
    tensors, target = batch(K, loss.multi_label, dtype)
    x, *head = tensors if with_bias else tensors[:2]
    x.requires_grad_()
    head = [nn.Parameter(one if mesh is None else distribute_tensor(one, mesh, [Shard(0)])) for one in head]
    given, options = arguments(style, (x, *head, None)[:3], target)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        value, parts = loss.from_features(*given, return_parts=True, **options)
    assert not any(part.requires_grad for part in parts.values())
    value.backward(like(value))
    gradients = [x.grad, *(one.grad for one in head)]
    if mesh is not None:
        for one in head:
            assert isinstance(one.grad, DTensor)
            assert one.grad.placements == (Shard(0),)
            assert one.grad.shape == one.shape
            assert one.grad.to_local().shape == one.to_local().shape
        gradients[1:] = [gradient.full_tensor() for gradient in gradients[1:]]
        total = x.grad.to(torch.promote_types(dtype, torch.float32))
        dist.all_reduce(total)
        gradients[0] = total
    return {"value": value.detach(), **parts}, gradients


def in_a_process(every):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [result(case, mesh) for case in every]


@pytest.mark.slow
@pytest.mark.parametrize("count", CLASSES)
def test_value_parts_and_gradients(count):
    every = list(cases(CLASSES[count]))
    found = processes.run(in_a_process, count, every)
    for case, *results in zip(every, *found, strict=True):
        values, gradients = results[0]
        expected, expected_gradients = result(case)
        for others, _ in results[1:]:  # the same on every process, to the last bit
            assert all(torch.equal(values[name], others[name]) for name in values), case
        assert values.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(values[name], expected[name], rtol=1e-10, atol=1e-12, msg=f"{case} {name}")
        for one, other in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=f"{case}")
            assert other.abs().sum() > 0 or case[1] == 1, case


def of_logits(case, dtype):
    """Value and gradients of the loss of logits that are formed, of the case's tensors in another dtype."""
    name, K, _, _, _, own = case
    loss = LOSSES[name]()
    tensors, target = batch(K, loss.multi_label, own)
    x, w, b = leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    z = F.linear(x, w, b)
    if isinstance(loss, SeparationLoss):
        value = loss(x[:N], w, z[:N], target, x[N:], z[N:])
    else:
        value = loss(z[:N], target, logits_ood=z[N:])
    score = torch.float64 if dtype == torch.float64 else torch.float32
    return value.detach(), torch.autograd.grad(value, leaves, like(value.to(score).float()).to(value.dtype))


def test_two_sided():
    """Against float64 of the rounded inputs; the features' gradient is a sum of parts, each rounded once."""
    every = [(name, 10, "split", "mean", True, dtype) for name in LOSSES for dtype in (torch.float32, torch.bfloat16)]
    found = processes.run(in_a_process, 2, every)
    for case, (values, gradients), (_, others) in zip(every, *found, strict=True):
        dtype = case[-1]
        exact, exact_gradients = of_logits(case, torch.float64)
        eager, eager_gradients = of_logits(case, dtype)
        assert values["value"].dtype == torch.float32
        assert_two_sided(values["value"], exact, eager, str(case), size=torch.tensor(30.0))
        assert all(torch.equal(*pair) for pair in zip(gradients, others, strict=True))
        for name, one, truth, theirs in zip("xwb", gradients, exact_gradients, eager_gradients, strict=True):
            assert one.dtype == (torch.float32 if name == "x" else dtype)
            rounded = torch.finfo(dtype).eps * truth.abs().max() if dtype != torch.float32 else 0.0
            size = truth.abs().max()
            assert_two_sided(one, truth, theirs + rounded, f"{case} {name}", rows=True, size=size, condition=30.0)


def autocast_is_a_cast():
    mesh = init_device_mesh("cpu", (2,))
    for name in LOSSES:
        case = (name, 10, "split", "mean", True)
        values, gradients = result((*case, torch.float32), mesh, torch.bfloat16)
        expected, expected_gradients = result((*case, torch.bfloat16), mesh)
        assert all(torch.equal(values[name], expected[name]) for name in expected)
        for one, other in zip(gradients, expected_gradients, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other.float())


def memory():
    """What is large of what a step allocates: the gradient of the own classes' weight, and nothing of [N, K]."""
    mesh = init_device_mesh("cpu", (2,))
    rows, classes, width = 512, 20_000, 512
    for kind, multi in itertools.product((ClassificationLoss, EnergyLoss, OutlierExposureLoss), (False, True)):
        loss = kind(multi_label=multi)
        own = [torch.randn(classes // 2, width) / 20, torch.randn(classes // 2)]
        head = [DTensor.from_local(one, mesh, [Shard(0)]).requires_grad_() for one in own]
        leaves = [torch.randn(rows, width, requires_grad=True), *head]
        target = torch.randint(0, 2, (rows // 2, classes)) if multi else torch.randint(0, classes, (rows // 2,))
        made = allocations(
            lambda loss=loss, leaves=leaves, target=target: torch.autograd.grad(
                loss.from_features(*leaves, target, rows // 2), leaves
            )
        )
        assert [size for size in made if size > 17 * 2**20] == [classes // 2 * width * 4], (loss, made)


def refusals():
    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    (x, w, b), target = batch(10, False, torch.float64)
    sharded, sharded_bias = (distribute_tensor(one, mesh, [Shard(0)]) for one in (w, b))
    loss = OutlierExposureLoss()
    whole = distribute_tensor(w, mesh, [Replicate()])
    for weight, bias, words in (
        (whole, None, r"head_weight: expected the placement Shard\(0\) on a mesh of one dimension, got \(Replicate"),
        (distribute_tensor(w, mesh, [Shard(1)]), None, r"head_weight: expected the placement Shard\(0\)"),
        (distribute_tensor(w, square, [Shard(0), Replicate()]), None, "head_weight: .* on a mesh of one dimension"),
        (sharded, b, "head_bias: expected a DTensor of .*, as head_weight is, got a tensor plain"),
        (sharded, distribute_tensor(b, mesh, [Replicate()]), r"head_bias: expected the placement Shard\(0\)"),
        (sharded, distribute_tensor(b, square, [Shard(0), Replicate()]), "head_bias: expected a DTensor of"),
        (
            DTensor.from_local(w[: 2 + 6 * dist.get_rank()], mesh, [Shard(0)], shape=w.shape, stride=w.stride()),
            None,
            r"head_weight: expected 5 of 10 classes on process \d of 2, .*, got (2|8)",
        ),
        (sharded, sharded_bias[:4], "head_bias: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            loss.from_features(x, weight, bias, target, N)
    for given, words in (
        ((whole, sharded, None, target, N), "features: expected a plain tensor, the same on every process"),
        ((x, w, sharded_bias, target, N), "head_bias: expected a plain tensor"),
        ((x, sharded, None, distribute_tensor(target, mesh, [Replicate()]), N), "target: expected a plain tensor"),
        ((x, sharded.to(torch.bfloat16), None, target, N), "head_weight: expected float64 as features are"),
    ):
        with pytest.raises(TypeError, match=words):
            loss.from_features(*given)
    with pytest.raises(ValueError, match=r"target: expected classes in 0\.\.9, got 10"):
        loss.from_features(x, sharded, None, target + 1, N)
    with pytest.raises(ValueError, match="separation: expected 'cosine' with a head_weight that is a DTensor"):
        SeparationLoss(separation="projection", rank=3).from_features(x, sharded, None, target, N)
    SeparationLoss(separation="projection", rank=3, beta=0.0).from_features(x, sharded, None, target, N)
    x.requires_grad_()
    for once, labels in ((loss, target), (ClassificationLoss(multi_label=True), F.one_hot(target, 10))):
        value = once.from_features(x, sharded, sharded_bias, labels, N)
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"head_weight: .* differentiated once"):
            torch.autograd.grad(gradient.square().sum(), x)


def in_two_processes():
    autocast_is_a_cast()
    memory()
    refusals()


def test_autocast_memory_and_refusals():
    processes.run(in_two_processes, 2)


def test_rows_of_a_shard():
    rows, mine = Share(slice(200, 500), 900, None).rows(torch.tensor([199, 200, 499, 500, 900, -1]))
    assert rows.tolist() == [0, 0, 299, 0, 700, 0]  # 700 is out of range, as 900 is
    assert mine.tolist() == [False, True, True, False, True, False]
    rows, mine = Share(slice(200, 500), 900, None).rows(torch.tensor([3, 255], dtype=torch.uint8))
    assert (rows.tolist(), mine.tolist()) == ([0, 55], [False, True])


def fails_in_the_second():
    if dist.get_rank() == 1:
        raise ArithmeticError("of process 1")
    dist.barrier()


def hangs_in_the_second():
    while dist.get_rank() == 1:
        pass
    dist.barrier()


def test_what_fails_in_a_process_fails_here():
    with pytest.raises(AssertionError, match=r"^process 1 raised:[^$]*fails_in_the_second[^$]*of process 1"):
        processes.run(fails_in_the_second, 2)
    with pytest.raises(AssertionError, match=r"process 1 was not done in time[^$]*hangs_in_the_second"):
        processes.run(hangs_in_the_second, 2, patience=2.0)


def test_plain_heads_do_without_the_distributed_package():
    run_program("""
import sys, torch
before = set(sys.modules)
from oodkern.losses import OutlierExposureLoss
x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
OutlierExposureLoss().from_features(x, w, None, torch.tensor([0, 1]), 2).backward()
new = set(sys.modules) - before
assert not [name for name in new if name.startswith("torch.distributed.tensor") or name == "oodkern.losses.parallel"]
""")
