"""OpenOOD's image lists, in its layout."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from formats import all_of, write_image

from oodkern.config import ConfigError, load_config
from oodkern.data import DataConfig, DataError, build_split, open_source
from oodkern.data.lists import list_and_root, read_image_list
from oodkern.data.readers import read_folder

KINDS = ("airplane", "bird", "cat", "deer")


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def openood(root, images="images_classic"):
    """CIFAR-10 as OpenOOD lays it out, with 12 images to train and 4 to test, and 3 OOD images."""
    lists = root / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    for part, count in (("train", 12), ("test", 4)):
        named = {f"cifar10/{part}/{KINDS[i % 4]}/{i:04}.png": i % 4 for i in range(count)}
        for i, name in enumerate(named):
            write_image(root / images / name, pixels([i, count]))
        lines = "".join(f"{name} {label}\n" for name, label in named.items())
        (lists / f"{part}_cifar10.txt").write_text(lines)
    for i in range(3):
        write_image(root / images / "texture" / f"a {i}.png", pixels(50 + i))
    (lists / "test_texture.txt").write_text("\n".join(f"texture/a {i}.png -1" for i in range(3)) + "\n\n")
    return lists


@pytest.mark.parametrize("images", ["", "images_classic", "images_largescale"])
def test_the_layout_of_openood(tmp_path, images):
    lists = openood(tmp_path, images)
    parts = read_image_list(str(lists / "train_cifar10.txt"), 3, 8)
    assert {part: len(one) for part, one in parts.items()} == {"train": 12, "test": 4}
    assert parts["train"].classes == parts["test"].classes == KINDS
    assert parts["train"].labels.tolist() == [i % 4 for i in range(12)]
    expected = torch.stack([torch.from_numpy(pixels([i, 4])).permute(2, 0, 1) / 255 for i in range(4)])
    torch.testing.assert_close(all_of(parts["test"]), expected, rtol=0, atol=0)
    far = open_source(f"imglist:{lists / 'test_texture.txt'}", 3, 8)
    assert set(far) == {"all"}
    assert far["all"].classes == ()
    assert far["all"].labels.tolist() == [-1, -1, -1]
    assert [path.name for path in far["all"].paths] == ["a 0.png", "a 1.png", "a 2.png"]


def test_a_root_of_ones_own(tmp_path):
    lists = openood(tmp_path / "data@home", "elsewhere")
    name = f"{lists / 'train_cifar10.txt'}"
    with pytest.raises(
        DataError, match=r"its first image, cifar10/train/airplane/0000\.png, is neither below .*FILE@ROOT"
    ):
        read_image_list(name)
    (tmp_path / "home").symlink_to(tmp_path / "data@home")
    parts = read_image_list(f"{name}@{tmp_path / 'home' / 'elsewhere'}", 3, 8)
    assert len(parts["train"]) == 12
    assert list_and_root(name) == (lists / "train_cifar10.txt", None), "an @ in a folder's name"


def test_classes_are_numbers_where_folders_do_not_tell_them(tmp_path):
    def read(lines):
        for line in lines:
            write_image(tmp_path / line.split()[0], pixels(0))
        (tmp_path / "list.txt").write_text("\n".join(lines))
        return read_image_list(str(tmp_path / "list.txt"))["all"]

    flat = read(["val/1.png 7", "val/2.png 3", "val/3.png 7", "val/4.png -1"])
    assert (flat.classes, flat.labels.tolist()) == (("3", "7"), [1, 0, 1, -1])
    assert read(["a/1.png 0", "b/2.png 1", "b/3.png 0"]).classes == ("0", "1"), "two labels in one folder"
    assert read(["a/1.png 0", "b/2.png 0", "c/3.png 1"]).classes == ("0", "1"), "a label in two folders"
    assert read(["a/1.png 0", "a/2.png 0"]).classes == ("0",), "one folder says nothing"
    assert read(["n01/1.png 5", "n02/2.png 2"]).classes == ("n02", "n01")


def test_names_of_a_test_part_that_lies_flat(tmp_path):
    """As the validation images of ImageNet do. Where the two parts contradict each other names are numbers."""
    for name in ("train/n01/1.png", "train/n02/2.png", "val/1.png", "val/2.png", "val/n01/1.png", "val/n02/2.png"):
        write_image(tmp_path / name, pixels(0))
    (tmp_path / "train_x.txt").write_text("train/n01/1.png 0\ntrain/n02/2.png 1\n")
    for test, classes in (
        ("val/1.png 1\nval/2.png 0\n", ("n01", "n02")),
        ("val/n01/1.png 0\nval/n02/2.png 1\n", ("n01", "n02")),
        ("val/n01/1.png 1\nval/n02/2.png 0\n", ("0", "1")),
    ):
        (tmp_path / "test_x.txt").write_text(test)
        assert {one.classes for one in read_image_list(str(tmp_path / "train_x.txt")).values()} == {classes}


def test_missing_images_are_counted(tmp_path):
    lists = openood(tmp_path)
    for i in (5, 7):
        (tmp_path / "images_classic" / "cifar10" / "train" / KINDS[i % 4] / f"{i:04}.png").unlink()
    with pytest.raises(DataError, match=r"bird/0005\.png: no such image; 2 of the 12 of .*train_cifar10\.txt are"):
        read_image_list(str(lists / "train_cifar10.txt"))
    with pytest.raises(DataError, match=r"0000\.png: no such image; 12 of the 12 of"):
        read_image_list(f"{lists / 'train_cifar10.txt'}@{tmp_path / 'nowhere'}")


def test_lists_that_are_damaged(tmp_path):
    path = tmp_path / "list.txt"
    for content, message in (
        (b"a.png 0\n\nb.png\n", "line 3: expected `path label`, got 'b.png'"),
        (b"a.png zero\n", "line 1: expected `path label`, got 'a.png zero'"),
        (b"a.png -2\n", r"line 1: expected a label from -1 \(OOD\) on, got -2"),
        (b"\n \n", "expected `path label` lines, found none"),
        (b"\xff\xfe\x00a", "expected text in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"list\.txt: {message}"):
            read_image_list(str(path))
    with pytest.raises(DataError, match="nothing: No such file"):
        read_image_list(str(tmp_path / "nothing"))
    write_image(tmp_path / "a.png", pixels(0))
    path.write_text("a.png -1")
    with pytest.raises(DataError, match=r"expected images of two classes at least$"):
        build_split(DataConfig(name=f"imglist:{path}"))


def test_lists_as_sources(tmp_path):
    lists = openood(tmp_path)
    train, texture = f"imglist:{lists / 'train_cifar10.txt'}", f"imglist:{lists / 'test_texture.txt'}"
    split = build_split(DataConfig(name=train, size=8, outliers="digits", ood={"texture": texture}))
    assert (split.classes, len(split.test), len(split.test_ood["texture"])) == (KINDS, 4, 3)
    with pytest.raises(ConfigError, match=r"data\.ood\.x: .* is the ID set"):
        load_config(None, [f"data.name={train}", f"data.ood.x={train}@{tmp_path}"])
    named = load_config(None, [f"data.name={train}@/some/images", f"data.outliers={texture}"])
    assert named.folder.name == "train_cifar10.txt-energy-seed0"


def test_real_cifar_by_lists(real_data, tmp_path):
    """The same images as by the reader of folders, and none is lost or gets another label."""
    command = [sys.executable, real_data / "unpack.py", tmp_path / "images_classic", "cifar10", "dtd"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    root, lists = tmp_path / "images_classic", tmp_path / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    folders = read_folder(root / "cifar10")
    for part, images in folders.items():
        found = zip(images.paths, images.labels.tolist(), strict=True)
        lines = [f"{path.relative_to(root)} {label}" for path, label in found]
        (lists / f"{part}_cifar10.txt").write_text("\n".join(lines))
    textures = sorted((root / "ood" / "dtd").rglob("*.jpg"))
    (lists / "test_dtd.txt").write_text("".join(f"{path.relative_to(root)} -1\n" for path in textures))
    parts = read_image_list(str(lists / "train_cifar10.txt"))
    for part, images in folders.items():
        assert (parts[part].paths, parts[part].classes) == (images.paths, images.classes)
        assert torch.equal(parts[part].labels, images.labels)
    data = DataConfig(name=f"imglist:{lists / 'train_cifar10.txt'}", ood={"dtd": f"imglist:{lists / 'test_dtd.txt'}"})
    split = build_split(data)
    assert (len(split.classes), len(split.train) + len(split.validation), len(split.test)) == (8, 40_000, 8_000)
    assert len(split.test_ood["dtd"]) == 1200
