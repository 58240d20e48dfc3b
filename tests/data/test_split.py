"""The parts of a data set: which images are where, and that none is in two places."""

import itertools

import numpy as np
import pytest
import torch
from formats import all_of, parts_of, rows

from oodkern.data import ArraySet, DataConfig, OODSplit, SampleSet, build_split
from oodkern.data.embedded import compose, read_digits
from oodkern.data.split import hold_out, split_classes, without_shared_images


def test_the_fixed_digits():
    split = build_split(DataConfig())
    assert split.classes == ("0", "1", "2", "3", "4", "5")
    assert len(split.train) + len(split.validation) + len(split.test) == 1083
    assert set(split.test_ood) == {"near", "far"}
    for part in (split.train, split.validation, split.test):
        assert sorted(part.labels.unique().tolist()) == list(range(6))
    for name, part in parts_of(split).items():
        images = all_of(part)
        assert images.shape[1:] == (1, 8, 8), name
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
    for part in (split.outliers, split.outlier_validation, *split.test_ood.values()):
        assert (part.labels == -1).all()
    assert "644 training, 114 validation and 325 test images of 6 classes" in split.describe()


@pytest.mark.parametrize("name", ["digits", "digits-multilabel"])
@pytest.mark.parametrize("number", [None, 0, 7])
def test_no_image_is_in_two_parts(name, number):
    split = build_split(DataConfig(name=name, split=number))
    for (one, images), (other, others) in itertools.combinations(parts_of(split).items(), 2):
        assert not rows(images) & rows(others), (one, other)


def test_labels_belong_to_the_images():
    digits = read_digits()
    label_of = {
        tuple(image): int(y) for image, y in zip(all_of(digits).flatten(1).tolist(), digits.labels, strict=True)
    }
    for number in (None, 3):
        split = build_split(DataConfig(split=number))
        for part in (split.train, split.validation, split.test):
            for image, label in zip(all_of(part), part.labels, strict=True):
                assert label_of[tuple(image.flatten().tolist())] == int(split.classes[label])
        outliers = {label_of[image] for image in rows(split.outliers) | rows(split.outlier_validation)}
        near = {label_of[image] for image in rows(split.test_ood["near"])}
        assert len(outliers) == len(near) == 2
        assert outliers | near | {int(name) for name in split.classes} == set(range(10))
        if number is None:
            assert (outliers, near) == ({6, 7}, {8, 9})


def test_random_splits_are_of_their_number_alone():
    one, again, other = (build_split(DataConfig(split=number)) for number in (4, 4, 5))
    for name, part in parts_of(one).items():
        assert torch.equal(all_of(part), all_of(parts_of(again)[name])), name
    assert rows(one.test) != rows(other.test)
    splits = {split_classes(10, (6, 2, 2), number) for number in range(30)}
    assert len(splits) > 25
    held = np.bincount([c for split in splits for c in split.outliers], minlength=10)
    assert held.min() >= 1, "a class that is never an outlier"


@pytest.mark.parametrize("sizes", [[6, 2], [1, 2, 2], [8, 2, 2], [6, -1, 2]])
def test_class_sizes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match=r"data\.classes: expected three numbers"):
        split_classes(10, sizes, None)


def test_the_multi_label_set():
    split = build_split(DataConfig(name="digits-multilabel"))
    assert split.multi_label
    assert split.train.shape == (1, 20, 20)
    assert split.train.labels.shape == (len(split.train), 6)
    share = split.train.labels.mean(0)
    assert (share.diff() < 0).all(), "a long tail falls"
    assert share[0] > 8 * share[-1]
    counts = split.train.labels.sum(1)
    assert counts.min() >= 1
    assert counts.max() == 4
    # Each cell holds one digit or nothing, and a label is 1 for what is there: empty cells bound the count.
    cells = all_of(split.train).view(-1, 2, 10, 2, 10).sum((2, 4)).gt(0).sum((1, 2))
    assert (counts <= cells).all()
    assert (counts == cells).float().mean() > 0.3
    assert all_of(split.test_ood["far"]).shape[1:] == (1, 20, 20)
    assert split.outliers.labels.shape == (len(split.outliers),)


def test_canvases_show_their_labels():
    """A canvas with one digit shows an image of that class, and of its own part."""
    split = build_split(DataConfig(name="digits-multilabel"))
    digits = build_split(DataConfig())
    known = {
        tuple(image): int(y)
        for image, y in zip(all_of(digits.test).flatten(1).tolist(), digits.test.labels, strict=True)
    }
    found = 0
    for image, labels in zip(all_of(split.test)[:, 0], split.test.labels, strict=True):
        cells = image.view(2, 10, 2, 10).permute(0, 2, 1, 3).reshape(4, 10, 10)
        full = [cell for cell in cells if cell.sum() > 0]
        if len(full) != 1:
            continue
        windows = full[0].unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 64)
        seen = {known[tuple(w)] for w in windows.tolist() if tuple(w) in known}
        assert seen == set(labels.nonzero().flatten().tolist())
        found += 1
    assert found > 100


def shared_split(**parts):
    one = ArraySet(
        torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64), ("a", "b")
    )
    default = dict.fromkeys(("train", "validation", "test"), one)
    outliers = {name: parts.get(name, one.select(torch.arange(0))) for name in ("outliers", "outlier_validation")}
    return one, OODSplit("x", **default, **outliers, test_ood={"near": parts["near"]}, classes=("a", "b"))


def test_shared_images_are_dropped():
    fresh = ArraySet(torch.full((4, 1, 2, 2), 200, dtype=torch.uint8), torch.full((4,), -1))
    one, _ = shared_split(near=fresh)

    def mixed(*known):
        return ArraySet(
            torch.cat([one.array[list(known)], fresh.array[:1] + len(known)]), torch.full((len(known) + 1,), -1)
        )

    _, split = shared_split(near=mixed(3, 4), outliers=mixed(5, 6, 7), outlier_validation=mixed(3, 4))
    cleaned = without_shared_images(split)
    # Of outlier_validation the remaining image is near's remaining one too.
    assert [len(part) for part in (cleaned.test_ood["near"], cleaned.outliers, cleaned.outlier_validation)] == [1, 1, 0]
    assert cleaned.dropped == 2 + 3 + 3
    assert "left out, being in two parts: 8" in cleaned.describe()


def test_the_number_of_a_split_decides_its_images_too():
    """Not the classes alone: a class that two splits know has other images in their tests."""
    one, other = (build_split(DataConfig(split=number)) for number in (3, 4))
    common = set(one.classes) & set(other.classes)
    assert common
    for name in common:
        tests = [
            rows(s.test.select((s.test.labels == s.classes.index(name)).nonzero().flatten())) for s in (one, other)
        ]
        assert tests[0] != tests[1]


def test_canvases_of_a_class_without_digits():
    """The columns of the labels stay where they are."""
    digits = read_digits()
    some = digits.select((digits.labels != 1).nonzero().flatten()[:200])
    canvases = compose(some, True, np.random.default_rng(0))
    assert canvases.labels.shape == (400, 10)
    assert canvases.labels[:, 1].sum() == 0
    assert (canvases.labels.sum(0) > 0).sum() == 9


def test_held_out_of_each_class():
    labels = torch.tensor([0] * 20 + [1] * 3 + [2])
    images = ArraySet(torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1), labels)
    kept, held = hold_out(images, 0.15, np.random.default_rng(0))
    assert torch.bincount(held.labels).tolist() == [3, 1]
    assert torch.bincount(kept.labels).tolist() == [17, 2, 1]
    assert sorted([*kept.array.flatten().tolist(), *held.array.flatten().tolist()]) == list(range(24))


def test_any_data_set_of_samples():
    class Squares(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            if i >= 6:
                raise IndexError
            return torch.full((1, 4, 4), i / 10), i % 2

    images = SampleSet(Squares(), ("even", "odd"))
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert images.shape == (1, 4, 4)
    chosen = images.select(torch.tensor([5, 2]))
    assert all_of(chosen)[:, 0, 0, 0].tolist() == pytest.approx([0.5, 0.2])
    assert chosen.labels.tolist() == [1, 0]
    assert chosen.select(torch.tensor([1])).images(torch.tensor([0]))[0, 0, 0, 0] == pytest.approx(0.2)
    image, label = images[3]
    assert image.shape == (1, 4, 4)
    assert label == 1
    assert images.as_outliers().labels.tolist() == [-1] * 6
