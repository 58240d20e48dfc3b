"""From the names of a configuration to the parts of a data set, and what is wrong with some of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from formats import parts_of, rows, write_image, write_mnist

from oodkern.config import ConfigError, load_config
from oodkern.data import DataConfig, DataError, build_split
from oodkern.data.readers import read_folder
from oodkern.data.sources import ready, with_more_ood
from oodkern.data.split import digests


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
        (["data.outliers=python:x"], "data.outliers: expected digits or KIND:PATH, got 'python:x'"),
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
    with pytest.raises(ValueError, match=r"data\.ood\.near: there is an OOD set of that name"):
        build_split(DataConfig(ood={"near": "photos"}))
    with pytest.raises(ValueError, match=r"data\.ood\.far: there is an OOD set of that name"):
        build_split(DataConfig(ood={"far": "photos"}))
    with pytest.raises(ValueError, match=r"data\.ood\.near: there is an OOD set of that name"):
        with_more_ood(build_split(DataConfig()), {"near": "photos"}, None)


def test_the_configuration_decides_the_augmentation():
    split = build_split(DataConfig())
    assert (split.augmentation, split.outlier_augmentation) == ("none", "vary")
    split = build_split(DataConfig(augmentation="crop", outlier_augmentation="none"))
    assert (split.augmentation, split.outlier_augmentation) == ("crop", "none")
    again = ready(split, DataConfig(augmentation="auto", outlier_augmentation="flip"))
    assert (again.augmentation, again.outlier_augmentation) == ("crop", "flip")


def test_cifar_10_and_100_may_share_a_folder(tmp_path):
    overrides = [f"data.name=cifar10:{tmp_path}", f"data.outliers=cifar100:{tmp_path}", "data.ood.far=photos"]
    assert load_config(None, overrides).data.outliers == f"cifar100:{tmp_path}"
    with pytest.raises(ConfigError, match="is the ID set"):
        load_config(None, [overrides[0], f"data.outliers=cifar10:{tmp_path}/."])


def test_a_split_that_training_cannot_take():
    split = build_split(DataConfig())
    nothing = split.outliers.select(torch.arange(0))
    for changed, message in (
        ({"outliers": nothing}, "expected outliers to train with, and there are none"),
        ({"outlier_validation": nothing}, "expected outliers to validate with, and there are none"),
        ({"test_ood": {}}, "expected one OOD set to test with at least"),
        ({"outliers": split.test_ood["near"]}, r"expected outliers to train with.* \(354 images were left out"),
    ):
        with pytest.raises(DataError, match=message):
            ready(replace(split, **changed), DataConfig())
    with pytest.raises(ValueError, match=r"data\.ood\.id: expected a name"):
        ready(replace(split, test_ood={"id": split.test}), DataConfig())


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


def test_files_are_the_same_through_links(tmp_path):
    for i in range(3):
        write_image(tmp_path / "real" / f"{i}.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "files").mkdir()
    for i in range(3):
        (tmp_path / "files" / f"other{i}.png").symlink_to(tmp_path / "real" / f"{i}.png")
    found = [set(digests(read_folder(tmp_path / name)["all"])) for name in ("real", "folder", "files")]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3


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
    half = np.random.default_rng(1).integers(0, 256, (60, 9, 9), dtype=np.uint8)[:30]
    write_mnist(tmp_path / "half", np.concatenate([half, 255 - half]), np.arange(60) % 3)
    more = with_more_ood(split, {"half": f"idx:{tmp_path / 'half'}"}, None)
    assert (len(more.test_ood["half"]), more.dropped) == (30, 30)
    with pytest.raises(DataError, match="expected OOD images of 'copy', and there are none"):
        with_more_ood(split, {"copy": f"idx:{tmp_path / 'copy'}"}, None)


def test_parts_without_images_are_named(tmp_path):
    write_mnist(tmp_path, np.random.default_rng(0).integers(0, 256, (400, 9, 9), dtype=np.uint8), np.arange(400) % 4)
    data = DataConfig(name=f"idx:{tmp_path}", outliers="digits", ood={"far": "photos"}, limit=1)
    with pytest.raises(DataError, match="expected ID images to validate with, and there are none"):
        build_split(data)


def test_a_source_that_is_not_there():
    with pytest.raises(DataError, match="idx:/none/here: expected a folder, and /none/here is none"):
        build_split(DataConfig(name="idx:/none/here"))


def test_too_few_images(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / "train" / name / "1.png", np.zeros((8, 8), np.uint8))
        write_image(tmp_path / "test" / name / "1.png", np.zeros((8, 8), np.uint8))
    data = DataConfig(name=f"folder:{tmp_path}", outliers="digits", ood={"far": "photos"})
    with pytest.raises(DataError, match="expected two images of each class at least"):
        build_split(data)
