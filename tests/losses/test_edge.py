"""EDGE: its tail, its gap and where gradients go. What all losses of logits share: test_losses."""

import math

import pytest
import torch
from oracle import like, value_and_gradients
from test_from_features import batch as fused_batch
from test_from_features import calls
from test_losses import COUNTS, K, M, N, edge_formula, multi_label

import oodkern
from oodkern.losses import EDGELoss


def joint_energy(z):
    return torch.logaddexp(z, torch.zeros_like(z)).sum(-1)


def rows_of(scores):
    """Logits [N, 1] of the given JointEnergies."""
    return torch.tensor(scores, dtype=torch.float64).expm1().log()[:, None]


def test_defaults():
    loss = EDGELoss()
    assert (loss.alpha, loss.beta, loss.margin, loss.tail_fraction, loss.tail) == (1.0, 0.1, 0.0, 0.25, "energy")
    assert (loss.reduction, loss.multi_label, loss.class_counts) == ("mean", True, None)
    assert "beta=0.1, margin=0.0, tail_fraction=0.25, tail='energy'" in repr(loss)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("margin", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("tail_fraction", [0.01, 0.25, 0.6, 1.0])
def test_value_and_gradients_of_tails_and_margins(tail_fraction, margin, backend):
    zi, y, zo = multi_label()
    loss = EDGELoss(0.4, 1.7, margin, tail_fraction)
    with oodkern.backend(backend):
        ours = value_and_gradients(lambda i, o: loss(i, y, o), (zi, zo))
    expected = value_and_gradients(lambda i, o: edge_formula(i, y, o, 0.4, 1.7, margin, tail_fraction), (zi, zo))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_the_confidence_term_is_the_outliers_joint_energy():
    """mean of -log(1 - sigmoid z) = mean J / K."""
    zi, y, zo = multi_label()
    _, parts = EDGELoss()(zi, y, zo, return_parts=True)
    for form in (-torch.log(1 - zo.sigmoid()).mean(), joint_energy(zo).mean() / K):
        torch.testing.assert_close(parts["conf"], form, rtol=1e-12, atol=0)


def test_binary_cross_entropies_are_a_joint_energy_less_the_labels_logits():
    zi, y, zo = multi_label()
    _, parts = EDGELoss(reduction="sum")(zi, y, zo, return_parts=True)
    form = (joint_energy(zi) - (zi * y).sum(-1)).sum() / K
    plain = -(y * zi.sigmoid().log() + (1 - y) * (1 - zi.sigmoid()).log()).mean(-1).sum()
    torch.testing.assert_close(parts["bce"], form, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts["bce"], plain, rtol=1e-10, atol=0)


def test_the_gap_is_the_dense_hinge():
    zi, y, zo = multi_label()
    _, parts = EDGELoss(margin=2.0, tail_fraction=0.5)(zi, y, zo, return_parts=True)
    tail = joint_energy(zi).sort().values[: round(N / 2)]
    pairs = joint_energy(zo)[:, None] - tail + 2.0
    assert 0 < (pairs > 0).sum() < pairs.numel()
    torch.testing.assert_close(parts["gap"], pairs.relu().mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [
        (128, 0.25, 32),
        (10, 0.25, 2),
        (6, 0.25, 2),
        (14, 0.25, 4),
        (7, 0.25, 2),
        (1, 0.25, 1),
        (9, 1.0, 9),
        (3, 0.01, 1),
    ],
)
def test_rows_of_the_tail(rows, fraction, expected):
    """The nearest number (of two as near the even one), one at least."""
    tail = EDGELoss(tail_fraction=fraction).tail_of(torch.randn(rows), torch.zeros(rows, 2))
    assert tail.shape == (expected,)
    assert EDGELoss().tail_of(torch.zeros(0), torch.zeros(0, 2)).shape == (0,)


def test_the_tail_has_the_lowest_joint_energies():
    score = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0, 1.0, 0.5, 9.0])
    for fraction, expected in ((0.125, [6]), (0.25, [6, 1]), (0.375, [6, 1, 3]), (0.5, [6, 1, 3, 5])):
        tail = EDGELoss(tail_fraction=fraction).tail_of(score, torch.zeros(8, 2))
        assert tail.tolist() == expected  # equal ones by their index


def test_the_tail_has_the_rarest_labels():
    score = torch.tensor([3.0, 1.0, 2.0, 7.0, -5.0, 2.0, 0.0])
    target = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0]])
    loss = EDGELoss(tail="frequency", class_counts=torch.tensor([90, 5, 40]), tail_fraction=1.0)
    # By the count of the rarest label (5: rows 1, 2, 3, 5; 40: row 0; 90: row 6), then by J; no labels: last.
    for labels in (target, target.float(), target.bool()):
        assert loss.tail_of(score, labels).tolist() == [1, 2, 5, 3, 0, 6, 4]
    assert EDGELoss(tail_fraction=1.0).tail_of(score, target).tolist() == [4, 6, 1, 2, 5, 0, 3]


def test_the_gap_reaches_the_tail_and_the_outliers_alone():
    """Of a known count: J of the ID rows 1, 2, 3, 4, of the outliers 0.5, 1.5, 2.5; the tail is 1 and 2."""
    zi, zo = (rows_of(scores).requires_grad_() for scores in ([4.0, 1.0, 3.0, 2.0], [0.5, 1.5, 2.5]))
    loss = EDGELoss(alpha=0.0, beta=6.0, tail_fraction=0.5)
    value, parts = loss(zi, torch.zeros(4, 1), zo, return_parts=True)
    torch.testing.assert_close(parts["gap"], torch.tensor((0.5 + 1.5 + 0.5) / 6).double())
    bce = value.detach() - 6 * parts["gap"]
    torch.testing.assert_close(bce, parts["bce"])
    gradients = torch.autograd.grad(value - loss_without_gap(zi), (zi, zo))
    # d J / d z = sigmoid(z); 6 / (pairs = 6) times the active pairs of a row, ID rows downwards.
    active = torch.tensor([0.0, -2.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 2.0])
    for found, leaf, count in zip(gradients, (zi, zo), active, strict=True):
        torch.testing.assert_close(found, leaf.sigmoid().detach() * count.double()[:, None], rtol=1e-12, atol=1e-15)


def loss_without_gap(zi):
    return joint_energy(zi).mean()


@pytest.mark.parametrize("sides", ["no ID rows", "no outliers", "neither"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_no_pairs_no_gap(sides, reduction):
    zi, y, zo = multi_label()
    zi, y = (zi, y) if sides == "no outliers" else (zi[:0], y[:0])
    zo = zo if sides == "no ID rows" else zo[:0]
    leaves = [zi.requires_grad_(), zo.requires_grad_()]
    value, parts = EDGELoss(reduction=reduction)(leaves[0], y, leaves[1], return_parts=True)
    assert parts["gap"] == 0
    rest = EDGELoss(beta=0.0, reduction=reduction)(zi, y, zo)
    torch.testing.assert_close(value, rest)
    for one, other in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(rest, leaves), strict=True):
        torch.testing.assert_close(one, other)
    labels = torch.cat([y, y.new_full((len(zo), K), -1)])
    torch.testing.assert_close(EDGELoss(reduction=reduction)(torch.cat([zi, zo]), labels), value)


def test_without_a_gap_the_parts_may_be_formed_apart():
    zi, y, zo = multi_label()
    loss = EDGELoss()
    for beta, reduction in ((0.1, "mean"), (0.0, "batchmean"), (0.0, "mean"), (0.0, "sum")):
        loss.beta, loss.reduction = beta, reduction
        whole, parts = loss(zi, y, zo, return_parts=True)
        apart = loss(zi, y, zo[:0]) + loss(zi[:0], y[:0], zo)
        assert loss.separable == (beta == 0 and reduction != "batchmean") == torch.allclose(apart, whole)
        assert ("gap" in parts) == (beta > 0)


@pytest.mark.parametrize(("beta", "products"), [(0.0, 3), (0.1, 1)])
@pytest.mark.parametrize("style", ["split", "mixed"])
def test_gradients_are_formed_with_the_scores(style, beta, products):
    """From features: where no gap makes slopes depend on other rows."""
    tensors, target = fused_batch(True, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    before = torch.ops.oodkern.multiplications()
    value = calls(EDGELoss(beta=beta), target)[style][0](*leaves)
    size = (N + M) * K * tensors[0].shape[1]
    assert torch.ops.oodkern.multiplications() - before == products * size
    torch.autograd.grad(0.3 * value, leaves)
    assert torch.ops.oodkern.multiplications() - before == 3 * size


def test_rows_of_zeros_as_targets_are_in_distribution():
    zi, y, zo = multi_label()
    loss = EDGELoss(0.7, 0.3)
    torch.testing.assert_close(loss(zi, y * 0, zo), loss(torch.cat([zi, zo]), torch.cat([y * 0, -torch.ones(M, K)])))


@pytest.mark.slow
def test_compiles():
    zi, y, zo = multi_label(torch.float32)
    loss = EDGELoss(0.7, 0.3, 1.5)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    found, expected = (value_and_gradients(lambda i, o, f=f: f(i, y, o), (zi, zo)) for f in (compiled, loss))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_counts_go_where_the_module_goes_and_not_into_checkpoints():
    loss = EDGELoss(tail="frequency", class_counts=COUNTS)
    assert not loss.state_dict()
    assert loss.to("meta").class_counts.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1}, ValueError, "alpha: expected a finite number that is not negative, got -1"),
        ({"beta": math.inf}, ValueError, "beta: expected a finite number that is not negative, got inf"),
        ({"beta": "1"}, TypeError, "beta: expected a number, got str"),
        ({"margin": math.nan}, ValueError, "margin: expected a finite number"),
        ({"margin": None}, TypeError, "margin: expected a number, got NoneType"),
        ({"tail_fraction": 0}, ValueError, r"tail_fraction: expected a share in \(0, 1\], got 0"),
        ({"tail_fraction": 1.5}, ValueError, r"tail_fraction: expected a share in \(0, 1\], got 1\.5"),
        ({"tail_fraction": -0.5}, ValueError, "tail_fraction: expected a finite number that is not negative"),
        ({"tail": "rare"}, ValueError, "tail: expected one of energy, frequency, got 'rare'"),
        ({"tail": "frequency"}, ValueError, "class_counts: expected with tail='frequency' alone, got NoneType"),
        ({"class_counts": COUNTS}, ValueError, "class_counts: expected with tail='frequency' alone, got Tensor"),
        ({"tail": "frequency", "class_counts": [1]}, TypeError, r"class_counts: expected a torch\.Tensor, got list"),
        (
            {"tail": "frequency", "class_counts": COUNTS[None]},
            ValueError,
            r"class_counts: expected \[K\], got \[1, 7\]",
        ),
        ({"reduction": "none"}, ValueError, "reduction: expected one of mean, sum, batchmean, got 'none'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        EDGELoss(**options)


def test_arguments_are_checked():
    zi, y, zo = multi_label()
    with pytest.raises(ValueError, match="class_counts: expected 7, one for each class, got 3"):
        EDGELoss(tail="frequency", class_counts=COUNTS[:3])(zi, y, zo)
    with pytest.raises(ValueError, match=r"target: expected \[9, 7\], got \[9\]"):
        EDGELoss()(zi, y[:, 0], zo)
    with pytest.raises(ValueError, match="is_ood: goes with the mixed style"):
        EDGELoss()(zi, y, zo, is_ood=torch.zeros(N, dtype=torch.bool))


def test_scaled_upstream():
    """A loss is a term of a larger one: its gradients are linear in what comes from there."""
    zi, y, zo = multi_label()
    leaf = zi.requires_grad_()
    value = EDGELoss(margin=2.0)(leaf, y, zo)
    once, often = (
        torch.autograd.grad(value, leaf, g, retain_graph=True)[0] for g in (like(value) * 0 + 1, like(value))
    )
    torch.testing.assert_close(often, once * like(value))
