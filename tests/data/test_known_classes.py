"""Outliers and OOD sets are cleared of classes that the ID set has; how image files are resized reaches all parts."""

import numpy as np
import pytest
import torch
from formats import parts_of, write_image, write_mnist

from oodkern.config import ConfigError, load_config
from oodkern.data import ArraySet, DataConfig, DataError, FolderSet, build_split
from oodkern.data.candidates import open_candidates
from oodkern.data.options import KINDS
from oodkern.data.sources import SUITABLE, conform, with_more_ood
from oodkern.data.split import without_known_classes

generator = np.random.default_rng(0)


def folders(root, classes, each=6):
    for name in classes:
        for i in range(each):
            write_image(root / name / f"{i}.png", generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return f"folder:{root}"


def labelled(names, labels):
    return ArraySet(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels), names)


def test_classes_of_the_same_name():
    images = labelled(["Dining_Table", "3", "cat", "n01440764"], [0, 1, 2, 3, 0, -1])
    others, names = without_known_classes(images, ["diningtable", "3", "n01440764", "caterpillar"])
    assert names == ("Dining_Table", "n01440764")
    assert others.array.flatten().tolist() == [1, 2, 5]
    assert others.labels.tolist() == [1, 2, -1]
    several = labelled(["cat", "dog"], [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    others, names = without_known_classes(several, ["dog"])
    assert (names, others.array.flatten().tolist()) == (("dog",), [0])
    for unchanged in (labelled(["1", "2"], [0, 1]), labelled([], [-1, -1]), labelled(["-1", "2.5"], [0, 1])):
        assert without_known_classes(unchanged, ["1", "2", "-1", "2.5", "..."]) == (unchanged, ())


def test_wnids_of_outliers_and_ood_sets(tmp_path):
    known = ["n01440764", "n01443537", "n01484850"]
    data = DataConfig(
        name=folders(tmp_path / "id", known),
        size=8,
        outliers=folders(tmp_path / "out", ["n01440764", "n02", "n03"]),
        ood={"far": folders(tmp_path / "far", ["n01440764", "n01484850", "n04"]), "photos": "photos"},
    )
    split = build_split(data)
    outliers = [*split.outliers.paths, *split.outlier_validation.paths]
    assert {path.parent.name for path in outliers} == {"n02", "n03"}
    assert {path.parent.name for path in split.test_ood["far"].paths} == {"n04"}
    assert (split.shared_classes, split.namesake_images, split.dropped) == (("n01440764", "n01484850"), 18, 0)
    assert split.describe().endswith("; left out, of 2 classes that the ID set has too: 18")

    more = with_more_ood(split, {"more": folders(tmp_path / "more", ["n01443537", "n05"], 4)}, None)
    assert {path.parent.name for path in more.test_ood["more"].paths} == {"n05"}
    assert (len(more.shared_classes), more.namesake_images) == (3, 22)

    opened = open_candidates({"one": f"{data.outliers}"}, split, None)
    images, left_out = opened["one"]
    assert ({path.parent.name for path in images.paths}, left_out) == ({"n02", "n03"}, 6)

    data.outliers = folders(tmp_path / "same", known)
    message = r"expected outliers to train with, and there are none \(30 images were left out, of 3 classes that the"
    with pytest.raises(DataError, match=message):
        build_split(data)


def test_numbers_are_no_names(tmp_path):
    for name in ("id", "out"):
        images = generator.integers(0, 256, (60, 9, 9), dtype=np.uint8)
        write_mnist(tmp_path / name, images, np.arange(60) % 3)
    split = build_split(
        DataConfig(name=f"idx:{tmp_path / 'id'}", outliers=f"idx:{tmp_path / 'out'}", ood={"far": "photos"})
    )
    assert len(split.outliers) + len(split.outlier_validation) == 60
    assert (split.shared_classes, split.namesake_images) == ((), 0)


def test_nothing_left_of_images_of_another_shape():
    images, names = without_known_classes(labelled(["a"], [0, 0]), ["A"])
    assert (len(images), names) == (0, ("a",))
    assert conform(images, 3, 8).array.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("resize", ["stretch", "center-crop"])
def test_all_parts_are_resized_alike(tmp_path, resize):
    data = DataConfig(
        name=folders(tmp_path / "id", ["a", "b"]),
        size=8,
        outliers=folders(tmp_path / "out", ["c"]),
        ood={"far": folders(tmp_path / "far", ["d"])},
        resize=resize,
    )
    split = with_more_ood(build_split(data), {"more": folders(tmp_path / "more", ["e"])}, None)
    assert {"far", "more"} == set(split.test_ood)
    candidates, _ = open_candidates({"one": f"{tmp_path / 'more'}"}, split, None)["one"]
    for images in (*parts_of(split).values(), candidates):
        assert isinstance(images, FolderSet)
        assert images.resize == resize


def test_every_kind_is_told_and_has_what_suits_it():
    assert set(KINDS) <= set(SUITABLE)
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.name=cifar:x"])
    for kind in KINDS:
        assert kind in DataConfig.__doc__.splitlines()[0]
        assert kind in str(caught.value)
    with pytest.raises(ConfigError, match=r"data\.resize: expected one of stretch, center-crop, got 'crop'"):
        load_config(None, ["data.resize=crop"])
