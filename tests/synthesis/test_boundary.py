"""Outliers at the edges of classes, against NumPy with sorted distances and the same draws."""

import numpy as np
import pytest
import torch
from oracle import memory_events

from oodkern.synthesis import boundary, boundary_outliers


def clusters(sizes=(20, 35, 7), D=12, spread=0.3, dtype=torch.float32):
    """Around orthogonal centers, of several lengths, shuffled; and some rows that are nobody's."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.cat([torch.full((n,), 2 * c) for c, n in enumerate(sizes)] + [torch.full((3,), -1)])
    centers = torch.eye(D)[torch.arange(len(sizes))]
    rows = torch.cat([centers[labels[:-3] // 2], torch.ones(3, D)])
    rows = rows + spread * torch.randn(rows.shape, generator=generator)
    rows = rows * (torch.rand(len(rows), 1, generator=generator) * 4 + 1)
    order = torch.randperm(len(rows), generator=generator)
    return rows[order].to(dtype), labels[order]


def by_sorting(features, labels, generator, neighbour, share, draws, keep, sigma, rounds):
    """Euclidean distances of all pairs, sorted; the same numbers from the generator."""
    found, classes = [], []
    x = features.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for label in sorted(set(labels.tolist()) - {-1}):
        members = x[labels.numpy() == label]
        n = len(members)
        k, edge = (min(n, max(1, int(np.floor(part * n + 0.5)))) for part in (neighbour, share))

        def distance(points, members=members, k=k):
            pairs = np.linalg.norm(points[:, None] - members[None], axis=2)
            return np.sort(pairs, axis=1)[:, k - 1]

        farthest = np.argsort(-distance(members, k=max(k, min(n, 2))), kind="stable")[:edge]
        around = [i for _ in range(rounds) for i in farthest]
        group = max(boundary.NUMBERS // (draws * x.shape[1]), 1)
        for some in (around[start : start + group] for start in range(0, len(around), group)):
            drawn = torch.randn(len(some), draws, x.shape[1], generator=generator).double().numpy()
            for i, noise in zip(some, drawn, strict=True):
                made = members[i] + sigma * noise
                made /= np.linalg.norm(made, axis=1, keepdims=True)
                found.append(made[np.argsort(-distance(made), kind="stable")[:keep]])
                classes += [label] * keep
    return np.concatenate(found), classes


OPTIONS = {
    "released": {},
    "wide": {"neighbour": 0.3, "boundary": 0.5, "draws": 60, "keep": 5, "sigma": 0.5, "rounds": 3},
    "nearest": {"neighbour": 0.01, "boundary": 1.0, "draws": 40, "keep": 40},
    "farthest": {"neighbour": 1.0, "boundary": 0.01, "draws": 17, "keep": 1},
}
DEFAULTS = {"neighbour": 0.6, "boundary": 0.1, "draws": 1500, "keep": 2, "sigma": 0.07, "rounds": 1}


@pytest.mark.parametrize("numbers", [boundary.NUMBERS, 1500 * 12 * 3], ids=["at once", "in groups"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_sorted_distances(options, dtype, numbers, monkeypatch):
    monkeypatch.setattr(boundary, "NUMBERS", numbers)
    features, labels = clusters(dtype=dtype)
    latents, of = boundary_outliers(features, labels, torch.Generator().manual_seed(5), **options)
    used = DEFAULTS | options
    used["share"] = used.pop("boundary")
    expected, classes = by_sorting(features, labels, torch.Generator().manual_seed(5), **used)
    assert latents.dtype == torch.float32
    assert of.dtype == torch.int64
    assert of.tolist() == classes
    np.testing.assert_allclose(latents.numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(latents.norm(dim=1).numpy(), 1.0, atol=1e-6)


def test_the_generator_alone_decides():
    features, labels = clusters()
    one, again, other = (
        boundary_outliers(features, labels, torch.Generator().manual_seed(seed), draws=50) for seed in (1, 1, 2)
    )
    assert torch.equal(one.latents, again.latents)
    assert not torch.equal(one.latents, other.latents)
    generator = torch.Generator().manual_seed(1)
    first = boundary_outliers(features, labels, generator, draws=50)
    second = boundary_outliers(features, labels, generator, draws=50)
    assert torch.equal(first.latents, one.latents)
    assert not torch.equal(second.latents, first.latents)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_how_many_are_judged_at_once_changes_nothing(monkeypatch, rows):
    features, labels = clusters()
    whole = boundary_outliers(features, labels, torch.Generator().manual_seed(1), draws=300, keep=9)
    monkeypatch.setattr(boundary, "TEMPORARY", 8 * 35 * rows)
    parts = boundary_outliers(features, labels, torch.Generator().manual_seed(1), draws=300, keep=9)
    assert torch.equal(parts.latents, whole.latents)


def test_no_temporary_passes_64_mib():
    features, labels = torch.randn(9000, 8), torch.zeros(9000, dtype=torch.int64)
    largest = max(memory_events(lambda: boundary_outliers(features, labels, torch.Generator(), boundary=1e-4)))
    assert 30 << 20 < largest <= 64 << 20


def test_members_at_the_edge_are_judged_together(monkeypatch):
    """The products of a class are as many as its groups of draws, beside the one of its members."""
    features, labels = clusters((200,))
    sizes, farness = [], boundary.farness

    def counted(points, members, k):
        sizes.append(len(points))
        return farness(points, members, k)

    monkeypatch.setattr(boundary, "farness", counted)
    options = {"boundary": 0.5, "draws": 30, "rounds": 2}
    boundary_outliers(features, labels, torch.Generator(), **options)
    assert sizes == [200, 200 * 30]
    monkeypatch.setattr(boundary, "NUMBERS", 80 * 30 * 12 + 11)
    boundary_outliers(features, labels, torch.Generator(), **options)
    assert sizes[2:] == [200, 80 * 30, 80 * 30, 40 * 30]


def test_draws_in_several_blocks(monkeypatch):
    """What is kept of blocks is what sorting all draws would keep."""
    features, labels = clusters((20,))
    generator = torch.Generator().manual_seed(1)
    monkeypatch.setattr(boundary, "NUMBERS", 32 * 12 + 5)
    latents, _ = boundary_outliers(features, labels, generator, draws=100, keep=11, boundary=0.05)
    generator = torch.Generator().manual_seed(1)
    members = torch.nn.functional.normalize(features[labels == 0])
    far = boundary.farness(members, members, 12)
    center = members[far.argmax()]
    noise = torch.cat([torch.randn(size, 12, generator=generator) for size in (32, 32, 32, 4)])
    made = torch.nn.functional.normalize(center + 0.07 * noise)
    expected = made[boundary.farness(made, members, 12).argsort(descending=True)[:11]]
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)


def test_kept_draws_are_farther_than_dropped_ones():
    features, labels = clusters()
    options = {"draws": 200, "boundary": 0.01}
    every = boundary_outliers(features, labels, torch.Generator().manual_seed(1), keep=200, **options)
    kept = boundary_outliers(features, labels, torch.Generator().manual_seed(1), keep=6, **options)
    for label, n in ((0, 20), (2, 35), (4, 7)):
        members = torch.nn.functional.normalize(features[labels == label])
        k = int(0.6 * n + 0.5)
        far = boundary.farness(every.latents[every.labels == label], members, k)
        ours = boundary.farness(kept.latents[kept.labels == label], members, k)
        torch.testing.assert_close(ours, far.sort(descending=True).values[:6])
        assert ours.min() > far.median()


def test_outliers_leave_their_class_and_enter_no_other():
    """Farther from their own class than nine tenths of its members, and farther still from the others."""
    features, labels = clusters(spread=0.1)
    latents, of = boundary_outliers(features, labels, torch.Generator().manual_seed(1))
    for label, n in ((0, 20), (2, 35), (4, 7)):
        members = torch.nn.functional.normalize(features[labels == label])
        k = int(0.6 * n + 0.5)
        own, others = (boundary.farness(latents[rows], members, k) for rows in (of == label, of != label))
        assert own.min() > boundary.farness(members, members, k).quantile(0.9)
        assert others.min() > own.max()


@pytest.mark.parametrize("n", [1, 2])
def test_small_classes(n):
    features = torch.eye(4)[:n] * 3
    latents, labels = boundary_outliers(features, torch.full((n,), 7), torch.Generator().manual_seed(1), draws=100)
    assert labels.tolist() == [7, 7]
    near = (latents @ torch.eye(4)[:n].T).amax(1)
    assert (near > 0.9).all()
    assert (near < 0.9999).all()


def test_none():
    for features, labels in ((torch.empty(0, 5), torch.empty(0).long()), (torch.ones(2, 5), torch.tensor([-1, -1]))):
        latents, of = boundary_outliers(features, labels, torch.Generator())
        assert latents.shape == (0, 5)
        assert of.shape == (0,)


def test_autocast_rounds_nothing():
    features, labels = clusters()
    plain = boundary_outliers(features, labels, torch.Generator().manual_seed(1), draws=50)
    with torch.autocast("cpu", torch.bfloat16):
        again = boundary_outliers(features, labels, torch.Generator().manual_seed(1), draws=50)
    assert torch.equal(again.latents, plain.latents)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.ones(4)}, ValueError, r"features: expected \[N, D\], got \[4\]"),
        ({"labels": torch.ones(3, dtype=torch.int64)}, ValueError, r"labels: expected \[62\], one a row of features"),
        ({"labels": torch.ones(62)}, TypeError, "labels: expected integers, got float32"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator, got int"),
        ({"neighbour": 0.0}, ValueError, "neighbour: expected a share of the class, above 0 and up to 1, got 0.0"),
        ({"boundary": 1.5}, ValueError, "boundary: expected a share of the class, above 0 and up to 1, got 1.5"),
        ({"draws": 0}, ValueError, "draws: expected 1 or more, got 0"),
        ({"keep": 1501}, ValueError, "keep: expected 1500 or fewer, as many as draws, got 1501"),
        ({"sigma": -0.1}, ValueError, "sigma: expected a finite number that is not negative"),
        ({"rounds": True}, TypeError, "rounds: expected an integer, got bool"),
    ],
)
def test_arguments_are_checked(change, error, message):
    features, labels = clusters(sizes=(20, 35, 4))
    with pytest.raises(error, match=message):
        boundary_outliers(**{"features": features, "labels": labels, "generator": torch.Generator()} | change)


def test_rows_of_outliers_are_left_out_whatever_they_hold():
    features, labels = clusters()
    plain = boundary_outliers(features, labels, torch.Generator().manual_seed(1), draws=50)
    features[labels < 0] = torch.tensor([[float("nan")], [float("inf")], [0.0]])
    again = boundary_outliers(features, labels, torch.Generator().manual_seed(1), draws=50)
    assert torch.equal(again.latents, plain.latents)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e60])
def test_features_that_are_not_finite_are_named(value):
    features, labels = clusters(dtype=torch.float64)
    row = int((labels == 4).nonzero()[2])
    features[row] = value
    with pytest.raises(ValueError, match=f"got 1 that are not, the first of them row {row}, of class 4"):
        boundary_outliers(features, labels, torch.Generator())


@pytest.mark.parametrize("value", [0.0, 1e-60])
def test_rows_of_zeros_are_left_out(value):
    features, labels = clusters(dtype=torch.float64)
    dead = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.3
    features[dead] = value
    latents, of = boundary_outliers(features, labels, torch.Generator().manual_seed(1), draws=50)
    expected = boundary_outliers(features[~dead], labels[~dead], torch.Generator().manual_seed(1), draws=50)
    assert torch.equal(latents, expected.latents)
    assert torch.equal(of, expected.labels)


def test_classes_of_zeros_alone_are_named():
    features, labels = clusters()
    for expected, of in (("2", labels == 2), ("2, 4", labels >= 2)):
        features[of] = 0
        with pytest.raises(ValueError, match=rf"features: .* got zeros alone of class {expected}$"):
            boundary_outliers(features, labels, torch.Generator())


@pytest.mark.gpu
def test_cuda_repeats_and_agrees_with_the_cpu():
    """With a generator on the CPU the draws are the same; which are kept may differ where two are equally far."""
    features, labels = clusters()
    expected = boundary_outliers(features, labels, torch.Generator().manual_seed(1), draws=200, keep=5)
    first, again = (
        boundary_outliers(features.cuda(), labels.cuda(), torch.Generator().manual_seed(1), draws=200, keep=5)
        for _ in range(2)
    )
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.labels.cpu(), expected.labels)
    close = (first.latents.cpu() - expected.latents).abs().amax(1) < 1e-5
    assert close.float().mean() > 0.9
