"""The choice of an outlier set: spectra and distances against NumPy, and a case whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

from oodkern.classifier import Classifier
from oodkern.data import ArraySet, DataConfig, build_split
from oodkern.models import SmallCNN
from oodkern.outlier_sets import (
    batch_spectra,
    dilation_distance,
    distance_error,
    mean_spectrum,
    rank_outlier_sets,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def batches_of(shape, count=4, seed=0, dtype=torch.float32):
    draws = [torch.randn(shape, generator=generator(seed + i), dtype=torch.float64) for i in range(count)]
    return [(draw * 10 ** -torch.linspace(0, 3, shape[1], dtype=torch.float64) + 0.5).to(dtype) for draw in draws]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 512), (64, 20), (16, 16), (1, 5), (5, 1)])
def test_mean_spectrum_is_that_of_numpy(shape, dtype):
    batches = batches_of(shape, dtype=dtype)
    expected = np.mean([np.linalg.svd(one.double().numpy(), compute_uv=False) for one in batches], axis=0)
    found = mean_spectrum(iter(batches))
    assert found.dtype == torch.float64
    assert found.shape == (shape[0],)
    largest = min(shape)
    # What the docstring says: eps s_1^2 / (2 s_i), of which a few.
    bound = 1e-14 * expected[0] + 4 * np.finfo(np.float64).eps * expected[0] ** 2 / expected
    assert (np.abs(found[:largest].numpy() - expected) <= bound).all()
    assert (found[largest:] == 0).all()


def test_autocast_rounds_nothing():
    batches = batches_of((16, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mean_spectrum(batches)
    assert torch.equal(found, mean_spectrum(batches))


def test_spectra_have_no_graph():
    assert not mean_spectrum([torch.randn(4, 6, requires_grad=True)]).requires_grad


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches: expected one at least, got none"),
        ([torch.ones(4, 6), torch.ones(3, 6)], ValueError, r"expected each \[4, 6\], as the first is, got \[3, 6\]"),
        ([torch.ones(4, 6), torch.ones(4, 5)], ValueError, r"expected each \[4, 6\], as the first is, got \[4, 5\]"),
        ([torch.ones(4)], ValueError, r"expected each \[b, D\] with b, D >= 1, got \[4\]"),
        ([torch.ones(0, 4)], ValueError, r"expected each \[b, D\] with b, D >= 1, got \[0, 4\]"),
        ([torch.ones(4, 6).long()], TypeError, "batches: expected one of .*float32.*, got int64"),
        ([torch.full((4, 6), torch.inf)], ValueError, "batches: expected finite features"),
        ([torch.full((4, 6), torch.nan)], ValueError, "batches: expected finite features"),
    ],
)
def test_batches_that_are_none(batches, error, message):
    with pytest.raises(error, match=message):
        mean_spectrum(batches)


@pytest.mark.parametrize("top", [1, 5, 32, 64])
def test_dilation_distance_is_the_norm_of_the_first(top):
    known, unknown = (mean_spectrum(batches_of((64, 80), seed=seed)) for seed in (0, 10))
    expected = np.linalg.norm(np.diag(known.numpy()[:top]) - np.diag(unknown.numpy()[:top]), "fro")
    assert dilation_distance(known, unknown, top) == pytest.approx(expected, rel=1e-13)
    assert dilation_distance(unknown.float(), known, top) == pytest.approx(expected, rel=1e-4)
    assert dilation_distance(known, known, top) == 0


def test_dilation_distance_compares_32_by_default():
    known = torch.zeros(64)
    unknown = torch.arange(64.0)
    assert dilation_distance(known, unknown) == pytest.approx(float(np.sqrt((np.arange(32) ** 2).sum())))


@pytest.mark.parametrize(
    ("known", "unknown", "top", "error", "message"),
    [
        (torch.ones(4), torch.ones(5), 2, ValueError, r"unknown: expected \[b\].* got \[4\] and \[5\]"),
        (torch.ones(4, 2), torch.ones(4), 2, ValueError, r"known: expected \[b\].* got \[4, 2\] and \[4\]"),
        (torch.ones(4), torch.ones(4), 5, ValueError, "top: expected at most 4, the singular values of a batch, got 5"),
        (torch.ones(4), torch.ones(4), 0, ValueError, "top: expected 1 or more, got 0"),
        (torch.ones(4), torch.ones(4), 2.0, TypeError, "top: expected an integer, got float"),
        (torch.ones(4), [1.0], 1, TypeError, r"unknown: expected a torch.Tensor, got list"),
    ],
)
def test_distances_of_what_is_no_spectrum(known, unknown, top, error, message):
    with pytest.raises(error, match=message):
        dilation_distance(known, unknown, top)


def test_the_standard_error_is_how_much_distances_vary():
    """Of 2,000 draws of 16 batches each: the deviation of the distances beside the mean of their standard errors."""
    spread = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    draws = torch.randn(2000, 2, 16, 3, generator=generator(0), dtype=torch.float64) * spread
    draws[:, 0, :, :] += torch.tensor([9.0, 6.0, 3.0], dtype=torch.float64)
    draws[..., 2] *= 100  # which is not compared
    distances = [dilation_distance(known.mean(0), unknown.mean(0), 2) for known, unknown in draws]
    errors = [distance_error(known, unknown, 2) for known, unknown in draws]
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.06)


def test_the_standard_error_of_one_batch_or_of_no_distance():
    assert np.isnan(distance_error(torch.ones(1, 4), torch.zeros(1, 4), 2))
    same = torch.rand(5, 4, generator=generator(0), dtype=torch.float64)
    assert distance_error(same, same, 4) == 0


class Flat(nn.Module):
    """Features are the pixels; the head is what a Classifier looks for."""

    def __init__(self, pixels):
        super().__init__()
        self.norm = nn.BatchNorm1d(pixels)
        self.frozen = nn.Dropout(0.5).eval()
        self.fc = nn.Linear(pixels, 2)

    def forward(self, images):
        return self.fc(self.frozen(self.norm(images.flatten(1))))


def images_of(rank, count=200, seed=0, scale=1.0):
    """Images [count, 1, 8, 8] of a subspace of `rank` dimensions, each direction with the same spread."""
    basis = torch.linalg.qr(torch.randn(64, rank, generator=generator(99)))[0]
    pixels = scale * torch.randn(count, rank, generator=generator(seed)) @ basis.T
    return ArraySet(pixels.view(count, 1, 8, 8), torch.full((count,), -1))


def test_the_closest_set_is_known():
    classifier = Classifier(Flat(64))
    known = images_of(10)
    candidates = {
        "louder": images_of(10, seed=1, scale=4.0),
        "alike": images_of(10, seed=2, scale=1.02),
        "broader": images_of(24, seed=3),
        "far": images_of(40, seed=4, scale=3.0),
    }
    ranked = rank_outlier_sets(classifier, known, candidates, batch_size=32, top=16)
    assert [one.name for one in ranked] == ["alike", "broader", "louder", "far"]
    assert [one.distance for one in ranked] == sorted(one.distance for one in ranked)
    assert {one.batches for one in ranked} == {6}
    alike, broader, *_ = ranked
    assert alike.told_apart(broader)
    assert not alike.told_apart(alike)


def test_numbers_are_those_of_the_images_drawn():
    classifier = Classifier(Flat(64)).eval()
    known, other = images_of(10, 100), images_of(20, 70, seed=1)
    (found,) = rank_outlier_sets(classifier, known, {"x": other}, batch_size=16, top=7, seed=5)
    spectra = []
    for one in (known, other):
        order = torch.randperm(len(one), generator=generator(5))[:64]
        features = classifier.outputs(one.images(order)).features.detach().double().numpy()
        spectra.append([np.linalg.svd(batch, compute_uv=False) for batch in features.reshape(4, 16, 64)])
    inside, outside = np.mean(spectra, axis=1)
    assert found.spectrum.numpy() == pytest.approx(outside, rel=1e-6, abs=1e-6)
    assert found.known_spectrum.numpy() == pytest.approx(inside, rel=1e-6, abs=1e-6)
    assert found.distance == pytest.approx(np.linalg.norm((inside - outside)[:7]), rel=1e-6)
    assert found.standard_error == pytest.approx(distance_error(*torch.tensor(np.array(spectra)), 7), rel=1e-6)
    assert (found.name, found.images, found.batches) == ("x", 70, 4)


def test_the_draw_follows_the_seed_alone():
    classifier = Classifier(Flat(64))
    known, one, other = images_of(10), images_of(12, seed=1), images_of(14, seed=2)

    def distances(candidates, **options):
        state = torch.get_rng_state()
        ranked = rank_outlier_sets(classifier, known, candidates, batch_size=32, batches=3, **options)
        assert torch.equal(torch.get_rng_state(), state)
        return {one.name: one.distance for one in ranked}

    both = distances({"one": one, "other": other})
    torch.manual_seed(17)
    assert distances({"other": other, "one": one}) == both
    assert distances({"one": one}) == {"one": both["one"]}
    assert distances({"one": one}, seed=1)["one"] != both["one"]


def test_the_number_of_batches_is_the_same_for_all_and_at_most_what_is_asked():
    classifier = Classifier(Flat(64))
    candidates = {"many": images_of(10, 300, seed=1), "few": images_of(10, 70, seed=2)}

    def batches(**options):
        return {one.batches for one in rank_outlier_sets(classifier, images_of(10), candidates, 32, top=8, **options)}

    assert batches() == {2}
    assert batches(batches=1) == {1}
    assert batches(batches=5) == {2}


def test_evaluation_mode_and_each_module_as_it_was():
    model = Flat(64)
    classifier = Classifier(model)
    classifier.train()
    model.frozen.eval()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    modes = [module.training for module in classifier.modules()]
    candidates = {"x": images_of(10, seed=1, scale=3.0)}
    (found,) = rank_outlier_sets(classifier, images_of(10), candidates, batch_size=32)
    assert [module.training for module in classifier.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())
    classifier.eval()
    (again,) = rank_outlier_sets(classifier, images_of(10), candidates, batch_size=32)
    assert again.distance == found.distance > 1  # in training mode BatchNorm would take the scale away
    broken = images_of(10)
    broken.array[:] = torch.nan
    classifier.train()
    with pytest.raises(ValueError, match=r"candidates\['x'\]: batches: expected finite features"):
        rank_outlier_sets(classifier, images_of(10), {"x": broken}, batch_size=32)
    assert classifier.training


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"candidates": {}}, ValueError, "candidates: expected one set at least, got none"),
        ({"batch_size": 0}, ValueError, "batch_size: expected 1 or more, got 0"),
        ({"batches": 0}, ValueError, "batches: expected 1 or more, got 0"),
        ({"top": 33}, ValueError, "top: expected at most 32, the singular values of a batch, got 33"),
        ({"seed": -1}, ValueError, "seed: expected 0 or more, got -1"),
        ({"seed": 2**63}, ValueError, r"seed: expected less than 2\^63"),
        ({"classifier": nn.Linear(3, 2)}, TypeError, "classifier: expected an oodkern.classifier.Classifier, got Lin"),
        ({"known": images_of(3, 20)}, ValueError, "known: expected 32 images at least, which make a batch, got 20"),
        ({"candidates": {"few": images_of(3, 31)}}, ValueError, r"candidates\['few'\]: expected 32 images at least"),
        (
            {"candidates": {"big": ArraySet(torch.zeros(40, 1, 9, 9), torch.zeros(40))}},
            ValueError,
            r"candidates\['big'\]: expected images of shape \(1, 8, 8\), as known are, got \(1, 9, 9\)",
        ),
    ],
)
def test_mistakes_name_the_argument(changed, error, message):
    given = {"classifier": Classifier(Flat(64)), "known": images_of(3), "candidates": {"x": images_of(3)}}
    with pytest.raises(error, match=message):
        rank_outlier_sets(**{**given, "batch_size": 32, **changed})


def test_features_of_a_model_that_speaks_the_protocol():
    classifier = Classifier(SmallCNN(1, 3, width=4))
    images = build_split(DataConfig())
    ranked = rank_outlier_sets(classifier, images.train, {"far": images.test_ood["far"]}, top=32)
    assert ranked[0].spectrum[8:].eq(0).all()  # eight features
    assert ranked[0].distance > 0


def test_batch_spectra_keep_the_order_of_the_batches():
    one, other = batches_of((6, 9), count=2)
    assert torch.equal(batch_spectra([one, other]), torch.stack([mean_spectrum([one]), mean_spectrum([other])]))
