import numpy as np
import pytest
import torch

from oodkern.data.arrays import read_array
from oodkern.data.images import DataError


def saved(path, array):
    np.save(path, array)
    return path


@pytest.mark.parametrize("shape", [(5, 4, 6, 3), (5, 4, 6, 1), (5, 4, 6)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pixels_are_those_of_the_file(tmp_path, shape, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), order=order)
    images = read_array(saved(tmp_path / "images.npy", array))["all"]
    assert len(images) == 5
    assert images.shape == (shape[3] if len(shape) == 4 else 1, 4, 6)
    assert images.labels.tolist() == [-1] * 5
    assert images.classes == ()
    expected = torch.from_numpy(array.reshape(5, 4, 6, -1).transpose(0, 3, 1, 2).copy()) / 255
    assert torch.equal(images.images(torch.tensor([3, 0])), expected[[3, 0]])
    chosen = images.select(torch.tensor([4, 1]))
    assert torch.equal(chosen.images(torch.arange(2)), expected[[4, 1]])


def test_the_file_stays_as_it_is(tmp_path):
    path = saved(tmp_path / "images.npy", np.full((3, 2, 2, 3), 7, np.uint8))
    before = path.read_bytes()
    images = read_array(path)["all"]
    images.array[0] = 0
    assert path.read_bytes() == before
    assert read_array(path)["all"].array[0].eq(7).all()


def test_a_file_is_mapped_and_not_read(tmp_path):
    """Of 3 GB, a hole in a file, nothing is read before images are taken."""
    path = tmp_path / "large.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(1_000_000, 32, 32, 3)).flush()
    images = read_array(path)["all"]
    assert len(images) == 1_000_000
    assert images.images(torch.tensor([999_999])).eq(0).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "expected uint8, got float32"),
        (np.zeros((2, 3, 4, 4), np.uint8), "expected images [N, H, W, 3], [N, H, W, 1] or [N, H, W], got [2, 3, 4, 4]"),
        (np.zeros((4, 4), np.uint8), "got [4, 4]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "got [0, 4, 4, 3]"),
        (np.array([{}, {}], object), "not a readable .npy file of numbers"),
    ],
)
def test_other_arrays_are_one_line(tmp_path, array, message):
    path = saved(tmp_path / "images.npy", array)
    check_refused(path, message)


def check_refused(path, message):
    with pytest.raises(DataError) as caught:
        read_array(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_one_line(tmp_path):
    check_refused(tmp_path / "none.npy", "No such file or directory")
    path = saved(tmp_path / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:60], b"", b"PK\x03\x04" + whole, whole[:12] + b"((((" + whole[16:]):
        path.write_bytes(content)
        check_refused(path, "not a readable .npy file of numbers")
