from __future__ import annotations

import pytest
import torch
from judge import DEVICE, DTYPES, OPS, assert_gradients, gradients, in_small_waves, leaves, randn
from oracle import assert_two_sided

from oodkern import reference
from oodkern.triton_kernels import contrast

MODES = [
    (normalize, symmetric, labelled)
    for normalize in (True, False)
    for symmetric in (True, False)
    for labelled in (True, False)
]
SHAPES = [(37, 45, 37), (1, 7, 1), (32, 16, 32), (21, 33, 70), (50, 3, 18)]
# Symmetric: as many keys as queries.
CASES = [(shape, mode) for shape in SHAPES for mode in MODES if not mode[1] or shape[0] == shape[2]]


@pytest.fixture(params=[False, True], ids=["default waves", "small waves"])
def waves(request, monkeypatch):
    if request.param:
        in_small_waves(monkeypatch, contrast)
        monkeypatch.setattr(contrast, "COLUMN_PARTS", 1)


def randint(high: int, *shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def positives_of(N: int, M: int, labelled: bool) -> tuple:
    """target, query labels, key labels: several queries of one target; labels of which some have no other side."""
    if not labelled:
        return randint(M, N), None, None
    labels = max(M // 4, 1)
    return None, randint(labels + 2, N) * 2**40, randint(labels, M, seed=6) * 2**40


def loss_of(function, positives, normalize, symmetric):
    target, *labels = positives

    def losses(queries, keys, temperature):
        return [
            function(queries, keys, target, temperature, normalize, symmetric, None if labels[0] is None else labels)
        ]

    return losses


def in_same_dtype(queries, keys, target, temperature, normalize, symmetric, positives):
    """What a user writes with PyTorch: every tensor in the dtype of the inputs."""
    if normalize:
        queries, keys = reference.unit(queries), reference.unit(keys)
    s = queries @ keys.T / temperature.to(queries.dtype)

    def direction(s, own):
        count = own.sum(-1)
        positive = torch.where(own, s, 0.0).sum(-1) / count.clamp_min(1)
        return torch.where(count > 0, s.logsumexp(-1) - positive, 0.0)

    if positives is None:
        picked = s.gather(1, target[:, None]).squeeze(1)
        rows = s.logsumexp(1) - picked
        return (rows + s.logsumexp(0)[target] - picked) / 2 if symmetric else rows
    own = positives[0][:, None] == positives[1][None, :]
    rows = direction(s, own)
    return (rows + direction(s.T, own.T)) / 2 if symmetric else rows


def sizes_of_terms(s, units, positives, upstream, symmetric):
    """What would be the gradients in the rows of `units` if all terms of G had one sign: how large roundings are."""
    target, *labels = positives
    columns = torch.arange(s.shape[1], device=s.device)
    own = target[:, None] == columns if labels[0] is None else labels[0][:, None] == labels[1]
    share = upstream.double().abs()
    terms = share[:, None] * (s.softmax(1) + own / own.sum(1, keepdim=True).clamp_min(1))
    if symmetric:
        weight = own.double().T @ share if labels[0] is None else share
        terms += weight * (s.softmax(0) + own / own.sum(0).clamp_min(1))
    return terms @ units[1].abs(), terms.T @ units[0].abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "mode"), CASES, ids=str)
def test_info_nce(shape, mode, dtype, waves):
    N, D, M = shape
    normalize, symmetric, labelled = mode
    queries, keys = randn(N, D, dtype=dtype), randn(M, D, dtype=dtype, seed=1)
    temperature = torch.tensor(0.2 if normalize else 2.0, device=DEVICE)
    positives = positives_of(N, M, labelled)
    loss, query_lse, key_lse = OPS.info_nce(queries, keys, *positives, temperature, normalize, symmetric)
    exact_loss = loss_of(reference.info_nce, positives, normalize, symmetric)
    wide = [queries.double(), keys.double()]
    unit = [reference.unit(t) for t in wide] if normalize else wide
    s = unit[0] @ unit[1].T / temperature.double()
    largest = s.abs().amax()
    eager = exact_loss(queries, keys, temperature)[0]
    assert_two_sided(loss, exact_loss(*wide, temperature.double())[0], eager, "loss", size=largest)
    assert_two_sided(query_lse, s.logsumexp(1), s.logsumexp(1).float(), "query_lse", size=largest)
    assert_two_sided(
        key_lse,
        *((s.logsumexp(0), s.logsumexp(0).float()) if symmetric else 2 * (s.new_empty(0),)),
        "key_lse",
        size=largest,
    )
    upstream = randn(N, seed=2)
    *ours, slope = OPS.info_nce_backward(
        upstream, queries, keys, *positives, temperature, query_lse, key_lse, normalize, symmetric, True, True
    )
    # An error of eps in s, whose rounding is eps |s|, is one of eps |s| in a softmax.
    condition = 2 * float(largest)

    def of(function):
        fixed = loss_of(function, positives, normalize, symmetric)
        return lambda queries, keys: fixed(queries, keys, temperature.to(queries.dtype))

    sizes = [
        size / (temperature * (tensor.norm(dim=-1, keepdim=True) if normalize else 1.0))
        for size, tensor in zip(sizes_of_terms(s, unit, positives, upstream, symmetric), wide, strict=True)
    ]
    assert_gradients(
        *(ours, of(reference.info_nce), of(in_same_dtype), [queries, keys], [upstream], f"info_nce {shape} {mode}"),
        condition=condition,
        sizes=sizes,
    )
    exact_slope = gradients(exact_loss, leaves([*wide, temperature], torch.float64), [upstream])[2]
    # Terms G s / T, each no larger than this, cancel.
    size = 2 * upstream.double().abs().sum() * largest / temperature
    assert slope.shape == ()
    assert slope.dtype == torch.float32
    assert_two_sided(slope, exact_slope, exact_slope, "temperature", size=size, condition=condition)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_zero_rows(mode, waves):
    normalize, symmetric, labelled = mode
    queries, keys = randn(20, 24), randn(20, 24, seed=1)
    queries[3], keys[18] = 0.0, 0.0
    positives = positives_of(20, 20, labelled)
    temperature = torch.tensor(0.5, device=DEVICE)
    loss, *lse = OPS.info_nce(queries, keys, *positives, temperature, normalize, symmetric)
    expected = loss_of(reference.info_nce, positives, normalize, symmetric)(queries, keys, temperature)[0]
    torch.testing.assert_close(loss, expected)
    dq, dk, _ = OPS.info_nce_backward(
        randn(20, seed=2), queries, keys, *positives, temperature, *lse, normalize, symmetric, True, True
    )
    assert dq.isfinite().all()
    assert dk.isfinite().all()
    assert bool(dq[3].any()) == (not normalize and (not labelled or bool(loss[3])))
    assert bool(dk[18].any()) == (not normalize)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_not_asked_for(wants, mode):
    normalize, symmetric, labelled = mode
    queries, keys, upstream = randn(20, 24), randn(20, 24, seed=1), randn(20, seed=2)
    temperature = torch.tensor(0.5, device=DEVICE)
    arguments = (*positives_of(20, 20, labelled), temperature)
    _, *lse = OPS.info_nce(queries, keys, *arguments, normalize, symmetric)
    arguments = (upstream, queries, keys, *arguments, *lse, normalize, symmetric)
    full, some = OPS.info_nce_backward(*arguments, True, True), OPS.info_nce_backward(*arguments, *wants)
    for gradient, same, wanted in zip(some, full, (*wants, True), strict=True):
        assert torch.equal(gradient, same) if wanted else gradient.shape == (0,)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_small_and_uneven_upstreams_in_float16(mode):
    """A mean over rows of which some count a thousand times less; gradients are large since features are small."""
    normalize, symmetric, labelled = mode
    N, D = 40, 24
    scale = 1e-3 if normalize else 1.0
    queries, keys = (randn(N, D, dtype=torch.float16, seed=n, scale=scale) for n in (0, 1))
    temperature = torch.tensor(0.5 if normalize else 8.0, device=DEVICE)
    positives = positives_of(N, N, labelled)
    upstream = randn(N, seed=2, scale=1e-4 if normalize else 2e-3)
    upstream[::3] *= 1e-3
    losses = loss_of(reference.info_nce, positives, normalize, symmetric)
    exact = gradients(losses, leaves([queries, keys, temperature], torch.float64), [upstream])
    _, *lse = OPS.info_nce(queries, keys, *positives, temperature, normalize, symmetric)
    ours = OPS.info_nce_backward(
        upstream, queries, keys, *positives, temperature, *lse, normalize, symmetric, True, True
    )
    for our, oracle in zip(ours[:2], exact[:2], strict=True):
        error = (our.double() - oracle).abs().amax(-1)
        assert bool((error <= 3 * 2.0**-10 * oracle.abs().amax(-1) + 2.0**-24).all())


@pytest.mark.parametrize(("N", "M", "symmetric"), [(0, 5, False), (0, 0, True), (0, 0, False), (4, 0, False)])
def test_nothing(N, M, symmetric):
    queries, keys = randn(N, 8), randn(M, 8)
    temperature = torch.tensor(0.5, device=DEVICE)
    labels = (None, randint(2, N), randint(2, M))
    loss, query_lse, key_lse = OPS.info_nce(queries, keys, *labels, temperature, True, symmetric)
    assert torch.equal(loss, torch.zeros(N, device=DEVICE))
    assert query_lse.shape == (N,)
    assert key_lse.shape == (M if symmetric else 0,)
    dq, dk, slope = OPS.info_nce_backward(
        randn(N), queries, keys, *labels, temperature, query_lse, key_lse, True, symmetric, True, True
    )
    for gradient, shape in ((dq, (N, 8)), (dk, (M, 8)), (slope, ())):
        assert gradient.shape == shape
        assert not gradient.any()


def test_one_key_is_no_contrast():
    for normalize in (True, False):
        loss = OPS.info_nce(
            randn(20, 24),
            randn(1, 24, seed=1),
            randint(1, 20),
            None,
            None,
            torch.tensor(0.01, device=DEVICE),
            normalize,
            False,
        )[0]
        assert not loss.any()


def test_a_target_that_is_no_key_gives_nan_for_its_row():
    target = randint(20, 30)
    target[4], target[17] = -1, 20
    arguments = (target, None, None, torch.tensor(0.5, device=DEVICE), True, False)
    loss = OPS.info_nce(randn(30, 24), randn(20, 24, seed=1), *arguments)[0]
    assert loss.isnan().nonzero().flatten().tolist() == [4, 17]


def test_nan_stays_in_its_row():
    queries, keys, target = randn(40, 24), randn(30, 24, seed=1), randint(30, 40)
    queries[7, 3] = torch.nan
    temperature = torch.tensor(0.5, device=DEVICE)
    loss, *lse = OPS.info_nce(queries, keys, target, None, None, temperature, True, False)
    dq = OPS.info_nce_backward(
        randn(40, seed=2), queries, keys, target, None, None, temperature, *lse, True, False, True, False
    )[0]
    for result in (loss, lse[0], dq.sum(-1)):
        assert result.isnan().nonzero().flatten().tolist() == [7]


def test_infinite_scores():
    """A key so far away that its score is -inf in float32, as it is not in float64."""
    queries, keys = randn(20, 4).abs(), randn(20, 4, seed=1).abs()
    keys[2] = -3e38
    target = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    temperature = torch.tensor(0.1, device=DEVICE)
    loss, lse, _ = OPS.info_nce(queries * 4, keys, target, None, None, temperature, False, False)
    others = torch.arange(20, device=DEVICE) != 2
    s = (queries * 4).double() @ keys[others].double().T / temperature.double()
    torch.testing.assert_close(lse.double(), s.logsumexp(1), rtol=1e-5, atol=1e-5)
    assert loss.isfinite().all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_strided_inputs(mode):
    normalize, symmetric, labelled = mode
    queries, keys = randn(40, 64)[::2, 3:36], randn(33, 20, seed=1).T
    positives = [None if p is None else torch.stack((p, p), 1)[:, 0] for p in positives_of(20, 20, labelled)]
    temperature, upstream = torch.tensor(0.5, device=DEVICE), randn(1, seed=3).expand(20)

    def results(given):
        forward = OPS.info_nce(*given(queries, keys, *positives), temperature, normalize, symmetric)
        tensors = given(upstream, queries, keys, *positives)
        return *forward, *OPS.info_nce_backward(*tensors, temperature, *forward[1:], normalize, symmetric, True, True)

    dense = results(lambda *tensors: [t if t is None else t.contiguous() for t in tensors])
    for result, same in zip(results(lambda *tensors: tensors), dense, strict=True):
        torch.testing.assert_close(result, same, rtol=1e-5, atol=1e-6)
