"""GReg: its loss against the formula, and the weights of its penalty."""

import pytest
import torch
import torch.nn.functional as F
from oracle import like, value_and_gradients
from test_from_features import batch as fused_batch
from test_losses import K, M, N, energy_formula, mixed, multi_label, multi_label_energy_formula, single_label

import oodkern
from oodkern.losses import EnergyLoss, GRegLoss

OPTIONS = {
    False: {"alpha": 0.3, "beta": 0.7, "margin_in": -9.0, "margin_out": -6.0},
    True: {"alpha": 0.3, "beta": 0.7, "margin_in": -15.0, "margin_out": -10.0, "multi_label": True},
}


def formula(multi):
    energies = multi_label_energy_formula if multi else energy_formula
    return lambda zi, y, zo, penalty: energies(zi, y, zo, 0.3) + 0.7 * penalty


def test_defaults():
    loss = GRegLoss()
    assert (loss.alpha, loss.beta, loss.margin_in, loss.margin_out) == (0.1, 1.0, -25.0, -7.0)
    assert (loss.gradient_scale, loss.temperature, loss.reduction, loss.multi_label) == ("code", 1.0, "mean", False)
    assert "beta=1.0, gradient_scale='code', alpha=0.1" in repr(loss)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("multi", [False, True])
def test_value_and_gradients(multi, backend):
    batch = (multi_label if multi else single_label)()
    zi, y, zo = batch
    loss, penalty = GRegLoss(**OPTIONS[multi]), torch.tensor(1.3, dtype=torch.float64)
    with oodkern.backend(backend):
        ours = value_and_gradients(lambda i, o, p: loss(i, y, p, o), (zi, zo, penalty))
    expected = value_and_gradients(lambda i, o, p: formula(multi)(i, y, o, p), (zi, zo, penalty))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert all(gradient.abs().sum() > 0 for gradient in ours[1:])


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("multi", [False, True])
def test_styles_and_reductions(multi, reduction):
    """The reduction is of the rows' terms; the penalty is added to what it gives."""
    zi, y, zo = (multi_label if multi else single_label)()
    logits, labels, order = mixed(zi, y, zo)
    loss, penalty = GRegLoss(**OPTIONS[multi], reduction=reduction), torch.tensor(1.3)
    options = {name: value for name, value in OPTIONS[multi].items() if name != "beta"}
    rows = EnergyLoss(**options, reduction="none")(zi, y, zo)
    means = {"mean": rows[:N].mean() + rows[N:].mean(), "sum": rows.sum(), "batchmean": rows.mean()}
    styles = [((zi, y, penalty, zo), {}), ((logits, labels, penalty), {}), ((zi, y), {"logits_ood": zo})]
    if multi:
        styles.append(((logits, labels.clamp_min(0), penalty), {"is_ood": order >= N}))
    for arguments, keywords in styles:
        with_penalty = len(arguments) > 2
        value, parts = loss(*arguments, **keywords, return_parts=True)
        torch.testing.assert_close(value, means[reduction] + with_penalty * 0.7 * 1.3, rtol=1e-7, atol=0)
        assert list(parts)[:3] == ["bce" if multi else "ce", "energy_in", "energy_out"]
        assert parts.get("gradient") == (penalty if with_penalty else None)
        assert torch.equal(loss(*arguments, **keywords), value)


@pytest.mark.parametrize("n_id", [0, N, N + M, None])
@pytest.mark.parametrize("multi", [False, True])
def test_from_features(multi, n_id):
    (x, w, b), target = fused_batch(multi)
    target = target.repeat(3, *[1] * (target.dim() - 1))[: N + M if n_id is None else n_id]
    if n_id is None:
        target[::3] = -1
    loss, penalty = GRegLoss(**OPTIONS[multi]), torch.tensor(1.3, dtype=torch.float64)

    def full(x, w, b, p):
        z = F.linear(x, w, b)
        return loss(z, target, p) if n_id is None else loss(z[:n_id], target, p, z[n_id:])

    def fused(x, w, b, p):
        return loss.from_features(x, w, b, target, n_id, penalty=p)

    ours, expected = (value_and_gradients(function, (x, w, b, penalty)) for function in (fused, full))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    value, parts = loss.from_features(x, w, b, target, n_id, penalty=penalty, return_parts=True)
    assert torch.equal(value, ours[0])
    assert parts["gradient"] == penalty
    without = loss.from_features(x, w, b, target, n_id)
    torch.testing.assert_close(value - without, 0.7 * penalty)


@pytest.mark.parametrize("empty", ["no ID rows", "no outliers", "neither"])
def test_empty_parts_keep_the_graph(empty):
    zi, y, zo = single_label()
    zi, y = (zi, y) if empty == "no outliers" else (zi[:0], y[:0])
    zo = zo if empty == "no ID rows" else zo[:0]
    results = value_and_gradients(lambda i, o: GRegLoss(**OPTIONS[False])(i, y, None, o), (zi, zo))
    assert all(result.isfinite().all() for result in results)
    is_ood = torch.arange(len(zi) + len(zo)) >= len(zi)
    weight = GRegLoss().penalty_weight(torch.full((len(is_ood),), -10.0), is_ood)
    assert weight.shape == is_ood.shape
    assert weight.isfinite().all()


def test_compiles():
    zi, y, zo = single_label(torch.float32)
    loss = GRegLoss(**OPTIONS[False])
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # by inductor: EnergyLoss, in test_losses
    torch.testing.assert_close(compiled(zi, y, None, zo), loss(zi, y, None, zo))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_has_a_hinge_or_a_weight(dtype):
    """Never both and never neither, also of scores at a margin and one step from it, where margins are no float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    margin_in, margin_out = -7.3, -2.1
    near = torch.tensor([margin_in, margin_out], dtype=wide)
    steps = [near, torch.nextafter(near, near - 1), torch.nextafter(near, near + 1)]
    energies = torch.cat([*steps, like(torch.empty(50, dtype=wide)) * 5 - 4])
    logits = -energies[:, None]
    if dtype != wide:  # 16-bit logits: what the loss sees of them
        logits = logits.to(dtype)
    score = oodkern.energy(logits)
    loss = GRegLoss(1.0, 1.0, margin_in, margin_out, "paper")
    rows = EnergyLoss(1.0, margin_in, margin_out, reduction="none")
    labels = torch.zeros(len(logits), dtype=torch.long)
    hinge = torch.stack([rows(logits, labels, logits[:0]), rows(logits[:0], labels[:0], logits)])  # CE of a class: 0
    for outliers, found in enumerate(hinge):
        weight = loss.penalty_weight(score, torch.full((len(score),), bool(outliers)))
        assert ((found > 0) ^ (weight > 0)).all()
        assert (weight > 0).any()
        assert (found > 0).any()


@pytest.mark.parametrize("scale", ["code", "paper"])
def test_weights(scale):
    score = torch.tensor([-30.0, -25.0, -24.0, -3.0, -7.0, -8.0, -6.0, torch.nan])
    is_ood = torch.tensor([False, False, False, False, True, True, True, True])
    n = 8.0 if scale == "code" else 1.0
    expected = torch.tensor([1 / 4, 1 / 4, 0, 0, 1 / 4, 0, 1 / 4, 0]) / n
    loss = GRegLoss(gradient_scale=scale)
    assert torch.equal(loss.penalty_weight(score, is_ood), expected)
    assert torch.equal(loss.penalty_weight(score.double(), is_ood), expected.double())
    assert not loss.penalty_weight(score.requires_grad_(), is_ood).requires_grad
    # A part of a larger batch: its shares are of the whole.
    parts = [loss.penalty_weight(score[i::2], is_ood[i::2], (4, 4)) for i in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(), expected)
    other = loss.penalty_weight(score, is_ood, (100, 10))
    n = 110.0 if scale == "code" else 1.0
    torch.testing.assert_close(other[[0, 4]], torch.tensor([1 / 100, 1 / 10]) / n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bit_scores_are_float32(dtype):
    is_ood = torch.arange(192) >= 64
    score = torch.where(is_ood, -3.0, -30.0).to(dtype)
    weight = GRegLoss().penalty_weight(score, is_ood)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), 1 / torch.where(is_ood, 128 * 192.0, 64 * 192.0).double())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1}, ValueError, "alpha: expected a finite number that is not negative, got -1"),
        ({"beta": -1}, ValueError, "beta: expected a finite number that is not negative, got -1"),
        ({"margin_in": -5, "margin_out": -5}, ValueError, "margin_in < margin_out"),
        ({"gradient_scale": "sum"}, ValueError, "gradient_scale: expected one of code, paper, got 'sum'"),
        ({"temperature": 0}, ValueError, "temperature: expected a positive number"),
        ({"temperature": 2.0, "multi_label": True}, ValueError, "temperature: JointEnergy has none"),
        ({"reduction": "none"}, ValueError, "reduction: expected one of mean, sum, batchmean, got 'none'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        GRegLoss(**options)


def test_arguments_are_checked():
    zi, y, zo = single_label()
    loss, (tensors, target) = GRegLoss(), fused_batch(False)
    for penalty, error, message in [
        (1.0, TypeError, r"penalty: expected a torch\.Tensor, got float"),
        (torch.ones((), dtype=torch.int64), TypeError, "penalty: expected one of float64, .*, got int64"),
        (zo, ValueError, r"penalty: expected a scalar, such as of oodkern\.gradient_penalty, got \[14, 7\]"),
    ]:
        with pytest.raises(error, match=message):
            loss(zi, y, penalty)
        with pytest.raises(error, match=message):
            loss.from_features(*tensors, target, N, penalty=penalty)
    score, is_ood = torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    expected = r"score, is_ood: expected \[N\] and bool \[N\], got "
    for arguments, error, message in [
        ((score.long(), is_ood), TypeError, "score: expected one of float64"),
        ((score, is_ood.long()), ValueError, expected + r"\[4\] and torch\.int64 \[4\]"),
        ((score, is_ood[:3]), ValueError, expected + r"\[4\] and torch\.bool \[3\]"),
        ((score[None], is_ood[None]), ValueError, expected + r"\[1, 4\]"),
        ((score, [True]), TypeError, r"is_ood: expected a torch\.Tensor, got list"),
    ]:
        with pytest.raises(error, match=message):
            loss.penalty_weight(*arguments)
    with pytest.raises(ValueError, match=r"target: expected classes in 0\.\.6, got 7"):
        loss(zi, y.clone().fill_(K), None, zo)
