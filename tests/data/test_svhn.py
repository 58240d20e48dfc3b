"""SVHN in its own files, written here."""

import numpy as np
import pytest
import torch
from formats import all_of, write_svhn

from oodkern.data import DataConfig, DataError, build_split
from oodkern.data.svhn import read_svhn

generator = np.random.default_rng(0)


def digits(count):
    return generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10


def test_svhn(tmp_path):
    written = {"train": digits(20), "test": digits(7)}
    for part, (images, labels) in written.items():
        write_svhn(tmp_path, images, labels, part)
    write_svhn(tmp_path, *digits(30), "extra")
    parts = read_svhn(tmp_path)
    assert set(parts) == {"train", "test"}
    for part, (images, labels) in written.items():
        expected = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(all_of(parts[part]), expected, rtol=0, atol=0)
        assert parts[part].labels.tolist() == labels.tolist()
    assert parts["test"].classes == tuple("0123456789")
    (tmp_path / "train_32x32.mat").unlink()
    assert {part: len(images) for part, images in read_svhn(tmp_path).items()} == {"all": 7}


def test_svhn_as_the_id_set_and_as_outliers(tmp_path):
    write_svhn(tmp_path, *digits(100), "train")
    write_svhn(tmp_path, *digits(40), "test")
    split = build_split(DataConfig(name=f"svhn:{tmp_path}"))
    assert split.classes == tuple("012345")
    assert (len(split.train) + len(split.validation), len(split.test), len(split.test_ood["near"])) == (60, 24, 8)
    assert "flip" not in split.augmentation
    split = build_split(DataConfig(outliers=f"svhn:{tmp_path}"))
    assert (len(split.outliers) + len(split.outlier_validation), split.outliers.shape) == (100, (1, 8, 8))
    assert split.shared_classes == (), "digits that are numbers are no names"


def test_svhn_files_that_are_damaged(tmp_path):
    from scipy.io import savemat

    with pytest.raises(DataError, match=r"expected train_32x32\.mat and test_32x32\.mat, found neither"):
        read_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    write_svhn(tmp_path, *digits(12))
    whole = path.read_bytes()
    damaged = whole[: len(whole) // 2], b"", b"no MATLAB file" * 40, whole[:300] + bytes(200) + whole[500:]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train_32x32\.mat: not a readable MATLAB 5 file") as caught:
            read_svhn(tmp_path)
        assert "\n" not in str(caught.value)
    X, y = np.zeros((32, 32, 3, 4), np.uint8), np.ones((4, 1), np.uint8)
    for content, message in (
        ({"X": X}, "expected the variables X and y, found no y"),
        ({"y": y}, "expected the variables X and y, found no X"),
        ({"X": X[:30], "y": y}, r"expected X \[32, 32, 3, N\] of uint8, got \[30, 32, 3, 4\] of uint8"),
        ({"X": X.astype(float), "y": y}, r"expected X .* of float64"),
        ({"X": X, "y": y[:3]}, r"expected y \[4, 1\], a label for each image, got 3"),
        ({"X": X, "y": 11 * y}, "expected labels 1 to 10"),
        ({"X": X, "y": y * 1.5}, "expected labels 1 to 10"),
        ({"X": X, "y": np.array(["a", "b", "c", "d"])}, "expected labels 1 to 10"),
    ):
        savemat(path, content)
        with pytest.raises(DataError, match=rf"train_32x32\.mat: {message}"):
            read_svhn(tmp_path)
