import itertools

import numpy as np
import pytest
import torch

from oodkern.data import load_digits, stream, vary


def rows(images):
    return {tuple(image) for image in images.flatten(1).tolist()}


def test_digits_have_the_parts_of_the_design():
    split = load_digits(seed=3)
    assert split.num_classes == 6
    assert len(split.train_images) + len(split.test_images) == 1083
    assert sorted(split.train_labels.unique().tolist()) == sorted(split.test_labels.unique().tolist()) == list(range(6))
    assert set(split.test_ood) == {"near", "far"}
    for images in (split.train_images, split.test_images, split.outliers, *split.test_ood.values()):
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
    assert "758 training and 325 test images of 6 classes" in split.describe()


def test_no_image_is_in_two_parts():
    split = load_digits(seed=0)
    parts = [
        rows(images) for images in (split.train_images, split.test_images, split.outliers, *split.test_ood.values())
    ]
    for one, other in itertools.combinations(parts, 2):
        assert not one & other


def test_the_split_depends_on_the_seed_alone():
    assert torch.equal(load_digits(1).train_images, load_digits(1).train_images)
    assert torch.equal(load_digits(1).test_ood["far"], load_digits(1).test_ood["far"])
    assert rows(load_digits(1).test_images) != rows(load_digits(2).test_images)


def test_labels_belong_to_the_images():
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    label_of = {
        tuple((image / 16).astype(np.float32).ravel().tolist()): label
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    split = load_digits(5)
    for image, label in zip(split.train_images, split.train_labels, strict=True):
        assert label_of[tuple(image.flatten().tolist())] == label
    assert {label_of[image] for image in rows(split.outliers)} == {6, 7}
    assert {label_of[image] for image in rows(split.test_ood["near"])} == {8, 9}


def test_stream_sees_each_sample_once_a_pass():
    batches = stream(10, 4, seed=0)
    indices = torch.cat([next(batches) for _ in range(15)])  # six passes
    for one in indices.view(6, 10):
        assert sorted(one.tolist()) == list(range(10))
    assert len({tuple(one.tolist()) for one in indices.view(6, 10)}) > 1, "not shuffled anew"
    again = stream(10, 4, seed=0)
    assert torch.equal(torch.cat([next(again) for _ in range(15)]), indices)


def test_a_batch_may_be_larger_than_the_set():
    batch = next(stream(3, 8, seed=1))
    assert len(batch) == 8
    assert torch.bincount(batch).min() >= 2


def test_stream_rejects():
    with pytest.raises(ValueError, match="expected positive integers, got 0 and 4"):
        next(stream(0, 4, 0))


def test_vary_never_makes_a_half_turn():
    """A half turn of a six is a nine, which is a test image's class."""
    image = torch.rand(1, 1, 8, 8)
    varied = vary(image.expand(4000, 1, 8, 8), torch.Generator().manual_seed(0))
    assert varied.shape == (4000, 1, 8, 8)
    assert varied.min() >= 0
    assert varied.max() <= 1

    def share(other):
        centred = varied.flatten(1) - varied.flatten(1).mean(1, keepdim=True)
        reference = other.flatten() - other.mean()
        cosine = (centred @ reference) / (centred.norm(dim=1) * reference.norm()).clamp_min(1e-9)
        return float((cosine.abs() > 0.999).float().mean())

    assert share(image) > 0.25
    assert share(image.rot90(1, (2, 3))) > 0.25
    assert share(image.rot90(-1, (2, 3))) > 0.25
    assert share(image.rot90(2, (2, 3))) == 0
