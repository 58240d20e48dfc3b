"""Pascal VOC and COCO as their archives unpack, written here."""

import json

import numpy as np
import pytest
import torch
from formats import annotation, write_coco, write_image, write_voc

from oodkern.cli import main
from oodkern.config import load_config
from oodkern.data import ArraySet, DataConfig, DataError, build_split, open_source
from oodkern.data.multilabel import VOC_CLASSES, read_coco, read_voc
from oodkern.data.split import mixed_images

# Numbers with gaps, and not in the order of the file, as COCO's 1 to 90 have gaps.
CATEGORIES = {3: "car", 1: "person", 44: "bottle", 18: "dog"}


def pixels(name):
    return np.random.default_rng(list(str(name).encode())).integers(0, 256, (9, 12, 3), dtype=np.uint8)


def voc(folder, parts, seed=0):
    """Image sets of VOC, each of so many images with one to three objects: image i has class i % 20 among them."""
    generator = np.random.default_rng(seed)
    lists, objects = {}, {}
    for part, count in parts.items():
        lists[part] = [f"2008_{len(objects) + i:06}" for i in range(count)]
        for i, name in enumerate(lists[part]):
            others = generator.integers(0, 20, generator.integers(0, 3)).tolist()
            objects[name] = [(VOC_CLASSES[k], False) for k in [i % 20, *others]]
    write_voc(folder, lists, objects, pixels)
    return lists, objects


def names_of(images, row):
    return [images.classes[k] for k in images.labels[row].nonzero().flatten().tolist()]


def test_voc(tmp_path):
    lists, objects = voc(tmp_path, {"train": 5, "val": 4})
    objects[lists["train"][1]] = [("person", False), ("dog", True), ("person", False), ("tvmonitor", False)]
    objects[lists["train"][2]] = [("cat", True)]  # nothing but a difficult one
    write_voc(tmp_path, {}, objects, pixels)
    parts = read_voc(tmp_path, 3, 8)
    assert {part: len(images) for part, images in parts.items()} == {"train": 4, "test": 4}
    images = parts["train"]
    assert (images.classes, len(VOC_CLASSES), list(VOC_CLASSES)) == (VOC_CLASSES, 20, sorted(VOC_CLASSES))
    assert images.labels.dtype == torch.float32
    assert names_of(images, 1) == ["person", "tvmonitor"]
    for row, path in enumerate(images.paths):
        assert names_of(images, row) == sorted({name for name, difficult in objects[path.stem] if not difficult})
    assert [path.stem for path in parts["test"].paths] == lists["val"]
    assert images.images(torch.tensor([0])).shape == (1, 3, 8, 8)
    (tmp_path / "ImageSets" / "Main" / "train.txt").unlink()
    assert {part: len(images) for part, images in read_voc(tmp_path).items()} == {"all": 4}


def test_which_lists_of_voc_are_its_parts(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    counts = {"train": 3, "val": 4, "test": 6}
    lists, _ = voc(folder, counts)
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(lists["train"] + lists["val"]))
    # Lists of one class have a mark behind the name.
    (folder / "ImageSets" / "Main" / "dog_train.txt").write_text(f"{lists['train'][0]} -1\n")
    for root in (folder, folder.parent, tmp_path):
        assert {part: len(images) for part, images in read_voc(root).items()} == {"train": 7, "test": 6}
    for name in lists["test"][2:]:  # as VOC2012's, whose annotations are not published
        (folder / "Annotations" / f"{name}.xml").unlink()
    parts = read_voc(tmp_path)
    assert [[path.stem for path in parts[part].paths] for part in ("train", "test")] == [lists["train"], lists["val"]]
    voc(tmp_path / "VOCdevkit" / "VOC2012", {"train": 8, "val": 9}, seed=1)
    assert {part: len(images) for part, images in read_voc(tmp_path).items()} == {"train": 8, "test": 9}


def test_damaged_voc(tmp_path):
    with pytest.raises(DataError, match="expected VOC2007 or VOC2012 with Annotations"):
        read_voc(tmp_path)
    lists, _ = voc(tmp_path, {"train": 3, "val": 2})
    path = tmp_path / "Annotations" / f"{lists['train'][1]}.xml"
    bomb = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'
    for content, message in (
        (b"<annotation><object></annotation>", r"not readable XML \(ParseError: mismatched tag"),
        (b"", "not readable XML"),
        (b'<?xml version="1.0" encoding="nonsense"?><annotation/>', "not readable XML"),
        (b"<html/>", "expected <annotation>, got <html>"),
        (annotation("x", [("zebra", False)]).encode(), "expected an object of the 20 classes of VOC, got 'zebra'"),
        (b"<annotation><object/></annotation>", "expected an object of the 20 classes of VOC, got ''"),
        (bomb.encode(), "expected no document type"),
        (bomb.encode("utf-16"), "expected no document type"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{path.name}: {message}") as caught:
            read_voc(tmp_path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: no such file; 1 of 3 are missing"):
        read_voc(tmp_path)
    path.write_text(annotation("x", [("cat", False)]))
    for name in lists["val"]:
        (tmp_path / "JPEGImages" / f"{name}.jpg").unlink()
    with pytest.raises(DataError, match=rf"{lists['val'][0]}\.jpg: no such file; 2 of 2 are missing"):
        read_voc(tmp_path)
    for name in ("train", "val"):
        (tmp_path / "ImageSets" / "Main" / f"{name}.txt").unlink()
    with pytest.raises(DataError, match=r"expected train\.txt and val\.txt in ImageSets/Main"):
        read_voc(tmp_path)


def test_coco(tmp_path):
    train = {"a.jpg": [18, 1, 18], "b.jpg": [], "c.jpg": [44], "d.jpg": [3, 1]}
    write_coco(tmp_path, "train2017", train, CATEGORIES, pixels)
    assert {part: len(images) for part, images in read_coco(tmp_path).items()} == {"all": 3}
    write_coco(tmp_path, "val2017", {"e.jpg": [1]}, CATEGORIES, pixels)
    write_coco(tmp_path, "val2014", {"f.jpg": [1], "g.jpg": [3]}, CATEGORIES, pixels)
    parts = read_coco(tmp_path, 3, 8)
    assert {part: len(images) for part, images in parts.items()} == {"train": 3, "test": 1}
    images = parts["train"]
    assert images.classes == ("person", "car", "dog", "bottle"), "by number"
    assert [path.name for path in images.paths] == ["a.jpg", "c.jpg", "d.jpg"], "b.jpg shows nothing"
    assert images.labels.tolist() == [[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]
    assert images.labels.dtype == torch.float32
    assert images.images(torch.tensor([2])).shape == (1, 3, 8, 8)
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images" / "train2017")
    assert len(read_coco(tmp_path, 3, 8)["train"].images(torch.arange(3))) == 3
    for name in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{name}2017.json").unlink()
    assert {part: len(images) for part, images in read_coco(tmp_path).items()} == {"all": 2}


def test_damaged_coco(tmp_path):
    with pytest.raises(DataError, match=r"expected annotations/instances_train2017\.json .* found none"):
        read_coco(tmp_path)
    write_coco(tmp_path, "train2017", {"a.jpg": [1], "b.jpg": [3]}, CATEGORIES, pixels)
    path = tmp_path / "annotations" / "instances_train2017.json"
    good = json.loads(path.read_text())
    shape = "expected images, annotations and categories as COCO's instances have them"
    for content, message in (
        (path.read_text()[:-9], r"not readable JSON \(JSONDecodeError"),
        ("[" * 100_000, "not readable JSON"),
        (json.dumps([]), shape),
        (json.dumps({**good, "categories": [{"id": 1}]}), rf"{shape} \(KeyError: 'name'\)"),
        (json.dumps({**good, "annotations": [{"image_id": 5, "category_id": 1}]}), rf"{shape} \(KeyError: 5\)"),
        (json.dumps({**good, "annotations": []}), "expected images with labelled objects, found none"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=rf"instances_train2017\.json: {message}") as caught:
            read_coco(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(good))
    (tmp_path / "train2017" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"train2017/b\.jpg: no such file; 1 of 2 are missing"):
        read_coco(tmp_path)
    write_image(tmp_path / "train2017" / "b.jpg", pixels("b"))
    write_coco(tmp_path, "val2017", {"e.jpg": [1]}, {1: "person"}, pixels)
    with pytest.raises(DataError, match=r"instances_val2017\.json: expected the categories of .*train2017\.json"):
        read_coco(tmp_path)
    (tmp_path / "val2017" / "e.jpg").unlink()
    (tmp_path / "val2017").rmdir()
    write_coco(tmp_path / "x", "val2017", {}, CATEGORIES, pixels)
    (tmp_path / "x" / "annotations" / "instances_val2017.json").rename(path.with_name("instances_val2017.json"))
    with pytest.raises(DataError, match=r"instances_val2017\.json: expected images with labelled objects"):
        read_coco(tmp_path)


@pytest.mark.parametrize("number", [None, 3])
def test_classes_held_out_of_a_multi_label_set(tmp_path, number):
    _, objects = voc(tmp_path, {"train": 200, "val": 240})
    data = DataConfig(name=f"voc:{tmp_path}", size=8, split=number)
    split = build_split(data)
    assert split.multi_label
    assert load_config(None, [f"data.name=voc:{tmp_path}", "method=edge"]).multi_label
    assert len(split.classes) == 12, "a fifth of the classes each to train with as outliers and to test with"
    known = set(split.classes)
    for part in (split.train, split.validation, split.test):
        for row, path in enumerate(part.paths):
            assert names_of(part, row) == sorted({name for name, _ in objects[path.stem]})
    shown = {
        name: {frozenset(kind for kind, _ in objects[path.stem]) for path in images.paths}
        for name, images in {"outliers": split.outliers, "held": split.outlier_validation, **split.test_ood}.items()
    }
    outliers, ood = set().union(*shown["outliers"], *shown["held"]), set().union(*shown["near"])
    assert not known & (outliers | ood)
    assert not outliers & ood
    assert (len(outliers), len(ood)) == (4, 4)
    parts = [
        split.train,
        split.validation,
        split.test,
        split.outliers,
        split.outlier_validation,
        *[*split.test_ood.values()],
    ]
    assert all((images.labels == -1).all() for images in parts[3:])
    # Of train those that show OOD classes alone are in no part, and of val those of outliers alone: neither is mixed.
    groups = [known, outliers, ood]
    found = [{kind for kind, _ in kinds} for kinds in objects.values()]
    assert split.mixed == sum(not any(kinds <= group for group in groups) for kinds in found) > 20
    assert f"left out, showing known and held-out classes: {split.mixed}" in split.describe()


def test_mixed_images():
    labels = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]]).float()
    images = ArraySet(torch.zeros(5, 1, 2, 2), labels, "abcd")
    assert mixed_images(images, [(0, 1), (2,)]) == 2  # the second row, and the third, whose class 3 is in no group
    assert mixed_images(images, [(0, 1, 2, 3)]) == 0


def test_sources_of_several_labels_as_outliers(tmp_path):
    voc(tmp_path / "voc", {"train": 40, "val": 20})
    train = {f"{i}.jpg": [[1, 3, 44, 18][i % 4]] for i in range(24)}
    write_coco(tmp_path / "coco", "train2017", train, {**CATEGORIES, 44: "kite", 18: "zebra"}, pixels)
    data = DataConfig(name=f"voc:{tmp_path / 'voc'}", size=8, outliers=f"coco:{tmp_path / 'coco'}", ood={"x": "photos"})
    split = build_split(data)
    assert len(split.classes) == 20, "nothing is held out where both other sources are given"
    assert (len(split.train) + len(split.validation), len(split.test)) == (40, 20)
    # Cars and persons are classes of the ID set.
    assert len(split.outliers) + len(split.outlier_validation) == 12
    assert (split.shared_classes, split.namesake_images) == (("car", "person"), 12)
    assert (split.outliers.labels == -1).all()
    single = build_split(DataConfig(outliers=f"voc:{tmp_path / 'voc'}"))
    assert not single.multi_label
    assert (len(single.outliers) + len(single.outlier_validation), single.outliers.shape) == (40, (1, 8, 8))


@pytest.mark.parametrize("method", ["edge", "oe", "energy"])
def test_a_run(tmp_path, method, capsys):
    voc(tmp_path / "VOC2012", {"train": 100, "val": 60})
    done = main(
        ["train", f"method={method}", f"data.name=voc:{tmp_path}", "data.size=32", "epochs=1", "pretrain.epochs=1",
         "model.width=4", f"output={tmp_path / 'runs'}", "name=run", "threads=1", "data.classes=[8,6,6]"]
    )  # fmt: skip
    assert done == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    assert "mAP" in shown.out
    record = np.load(tmp_path / "runs" / "run" / "scores.npz")
    assert len(record["id"]) > 3
    assert np.isfinite(record["id"]).all()
    assert np.isfinite(record["near"]).all()
    assert open_source(f"voc:{tmp_path}", 3, 32)["test"].labels.shape[1] == 20
