"""The parts of a data set: which images are where, and that none is in two places."""

import itertools

import numpy as np
import pytest
import torch
from formats import write_image, write_mnist

from oodkern.config import ConfigError, load_config
from oodkern.data import ArraySet, DataConfig, DataError, OODSplit, SampleSet, build_split
from oodkern.data.embedded import compose, read_digits
from oodkern.data.sources import with_more_ood
from oodkern.data.split import hold_out, split_classes, without_shared_images


def all_of(images):
    return images.images(torch.arange(len(images)))


def rows(images):
    return {tuple(image) for image in all_of(images).flatten(1).tolist()}


def parts_of(split):
    return {
        "train": split.train,
        "validation": split.validation,
        "test": split.test,
        "outliers": split.outliers,
        "outlier_validation": split.outlier_validation,
        **split.test_ood,
    }


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


def test_a_class_split_of_a_set_from_disk(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 10
    write_mnist(tmp_path / "set", generator.integers(0, 256, (200, 9, 9), dtype=np.uint8), labels)
    write_mnist(tmp_path / "set", generator.integers(0, 256, (50, 9, 9), dtype=np.uint8), np.arange(50) % 10, "t10k")
    split = build_split(DataConfig(name=f"idx:{tmp_path / 'set'}"))
    assert [len(part) for part in parts_of(split).values()] == [102, 18, 30, 34, 6, 10]  # near: of the test part
    assert split.augmentation == "crop"
    capped = build_split(DataConfig(name=f"idx:{tmp_path / 'set'}", limit=60))
    assert len(capped.train) + len(capped.validation) == 60
    with pytest.raises(ValueError, match=r"data\.classes: .* 10 classes there are, got \[8, 2, 2\]"):
        build_split(DataConfig(name=f"idx:{tmp_path / 'set'}", classes=[8, 2, 2]))


def test_other_sources_take_the_shape_of_the_id_set(tmp_path):
    generator = np.random.default_rng(0)
    write_mnist(tmp_path / "id", generator.integers(0, 256, (60, 12, 12), dtype=np.uint8), np.arange(60) % 3)
    write_mnist(tmp_path / "out", generator.integers(0, 256, (40, 7, 7), dtype=np.uint8), np.arange(40) % 2)
    for i in range(5):
        write_image(tmp_path / "ood" / f"{i}.png", generator.integers(0, 256, (30, 20, 3), dtype=np.uint8))
    split = build_split(
        DataConfig(
            name=f"idx:{tmp_path / 'id'}",
            outliers=f"idx:{tmp_path / 'out'}",
            ood={"textures": f"folder:{tmp_path / 'ood'}", "photos": "photos"},
        )
    )
    assert len(split.classes) == 3, "no class is held out where both other sources are given"
    assert {name: part.shape for name, part in parts_of(split).items()} == dict.fromkeys(parts_of(split), (1, 12, 12))
    assert set(split.test_ood) == {"textures", "photos"}


def test_outliers_that_are_the_id_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    for name in ("one", "other"):
        write_mnist(tmp_path / name, images, np.arange(60) % 3)
    with pytest.raises(
        DataError, match=r"one: expected outliers to train with, and there are none \(60 images were left out"
    ):
        build_split(
            DataConfig(name=f"idx:{tmp_path / 'one'}", outliers=f"idx:{tmp_path / 'other'}", ood={"far": "photos"})
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.name=cifar"], "data.name: expected digits, photos or KIND:PATH"),
        (["data.name=photos"], "data.name: photos are for the test"),
        (["data.outliers=folder:/a", "data.ood.near=folder:/a"], "data.ood.near: folder:/a is trained with"),
        (["data.outliers=digits"], "data.outliers: the ID images are digits; expected other images"),
        (["data.outliers=folder:/a", "data.ood.x=folder:/a/b/.."], "data.ood.x: folder:/a/b/.. is trained with"),
        (["data.name=folder:/a", "data.outliers=folder:/a/"], "data.outliers: folder:/a/ is the ID set"),
        (["data.name=folder:/a", "data.ood.x=folder:/a"], "data.ood.x: folder:/a is the ID set"),
        (["data.name=digits-multilabel", "data.ood.x=digits"], "data.ood.x: the ID images are digits"),
        (["data.name=digits-multilabel", "data.size=16"], "data.size, data.channels: digits-multilabel has its own"),
        (["data.size=1"], "data.size: expected 8 to 4096 pixels, or 0"),
        (["data.ood.id=photos"], "data.ood.id: expected a name of letters, digits"),
        (["data.ood.file=photos"], "data.ood.file: expected a name of letters, digits"),
        (["data.ood._x=photos"], "data.ood._x: expected a name of letters, digits"),
        (["data.validation=0.9"], "data.validation: expected a share from 0.01 to 0.5, got 0.9"),
        (["data.channels=2"], "data.channels: expected 1 or 3"),
        (["data.workers=-1"], "data.workers: expected a number from 0 to 256, got -1"),
        (["data.split=-1"], "data.split: expected a number from 0"),
        (["data.augmentation=crop+flop"], "data.augmentation: expected none, or one or more of crop, flip, vary"),
    ],
)
def test_mistakes_name_the_key(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)


def test_other_sources_do_not_take_the_place_of_the_held_out_classes():
    assert set(build_split(DataConfig(ood={"patches": "photos"})).test_ood) == {"near", "far", "patches"}
    with pytest.raises(ValueError, match=r"data\.ood\.near: the held-out classes have that name"):
        build_split(DataConfig(ood={"near": "photos"}))


def test_a_lone_part_is_split_and_not_tested_on_itself(tmp_path):
    write_mnist(
        tmp_path, np.random.default_rng(0).integers(0, 256, (90, 9, 9), dtype=np.uint8), np.arange(90) % 3, "t10k"
    )
    split = build_split(DataConfig(name=f"idx:{tmp_path}", outliers="digits", ood={"far": "photos"}))
    assert not rows(split.test) & (rows(split.train) | rows(split.validation))
    assert len(split.test) == 27


def test_files_in_two_folders_of_the_same_path(tmp_path):
    """A folder within another one: its images are ID images, whatever it is given as."""
    generator = np.random.default_rng(0)
    for i in range(40):
        write_image(tmp_path / "set" / "abcd"[i % 4] / f"{i}.png", generator.integers(0, 256, (8, 8), dtype=np.uint8))
    for i in range(10):
        write_image(tmp_path / "out" / "x" / f"{i}.png", generator.integers(0, 256, (8, 8), dtype=np.uint8))
    data = DataConfig(name=f"folder:{tmp_path / 'set'}", outliers=f"folder:{tmp_path / 'out'}", ood={"far": "photos"})
    assert build_split(data).dropped == 0
    data.ood["inside"] = f"folder:{tmp_path / 'set' / 'a'}"
    with pytest.raises(
        DataError, match=r"expected OOD images of 'inside', and there are none \(10 images were left out"
    ):
        build_split(data)
    data.ood["inside"] = f"folder:{tmp_path}"
    with pytest.raises(DataError, match="expected outliers to train with, and there are none"):
        build_split(data)  # those of out are tested with, and are then no outliers


def test_further_sets_are_cleared_of_what_was_trained_with(tmp_path):
    for name, seed in (("id", 0), ("out", 1), ("copy", 1), ("new", 2)):
        images = np.random.default_rng(seed).integers(0, 256, (60, 9, 9), dtype=np.uint8)
        write_mnist(tmp_path / name, images, np.arange(60) % 3)
    split = build_split(
        DataConfig(name=f"idx:{tmp_path / 'id'}", outliers=f"idx:{tmp_path / 'out'}", ood={"far": "photos"})
    )
    more = with_more_ood(split, {"new": f"idx:{tmp_path / 'new'}"}, None)
    assert {name: len(one) for name, one in more.test_ood.items()} == {"far": 360, "new": 60}
    assert len(more.outliers) == len(split.outliers)
    with pytest.raises(DataError, match="expected OOD images of 'copy', and there are none"):
        with_more_ood(split, {"copy": f"idx:{tmp_path / 'copy'}"}, None)


def test_parts_without_images_are_named(tmp_path):
    write_mnist(tmp_path, np.random.default_rng(0).integers(0, 256, (400, 9, 9), dtype=np.uint8), np.arange(400) % 4)
    data = DataConfig(name=f"idx:{tmp_path}", outliers="digits", ood={"far": "photos"}, limit=1)
    with pytest.raises(DataError, match="expected ID images to validate with, and there are none"):
        build_split(data)


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


def test_a_source_that_is_not_there():
    with pytest.raises(DataError, match="idx:/none/here: expected a folder, and /none/here is none"):
        build_split(DataConfig(name="idx:/none/here"))


def test_held_out_of_each_class():
    labels = torch.tensor([0] * 20 + [1] * 3 + [2])
    images = ArraySet(torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1), labels)
    kept, held = hold_out(images, 0.15, np.random.default_rng(0))
    assert torch.bincount(held.labels).tolist() == [3, 1]
    assert torch.bincount(kept.labels).tolist() == [17, 2, 1]
    assert sorted([*kept.array.flatten().tolist(), *held.array.flatten().tolist()]) == list(range(24))


def test_too_few_images(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / "train" / name / "1.png", np.zeros((8, 8), np.uint8))
        write_image(tmp_path / "test" / name / "1.png", np.zeros((8, 8), np.uint8))
    data = DataConfig(name=f"folder:{tmp_path}", outliers="digits", ood={"far": "photos"})
    with pytest.raises(DataError, match="expected two images of each class at least"):
        build_split(data)


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
