"""Files in the real formats, written here, and the real sets where they are."""

import pickle

import numpy as np
import pytest
import torch
from formats import (
    all_of,
    write_cifar10_python,
    write_cifar100_python,
    write_cifar_binary,
    write_idx,
    write_image,
    write_mnist,
)

from oodkern.data import DataConfig, DataError, build_split, open_source
from oodkern.data.readers import read_cifar, read_folder, read_idx, read_idx_folder

generator = np.random.default_rng(0)


def pixels(*shape):
    return generator.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx(tmp_path, ending):
    train, test = pixels(30, 5, 7), pixels(11, 5, 7)
    write_mnist(tmp_path, train, np.arange(30) % 3, "train", ending)
    write_mnist(tmp_path, test, np.arange(11) % 3, "t10k", ending)
    parts = read_idx_folder(tmp_path)
    assert set(parts) == {"train", "test"}
    torch.testing.assert_close(all_of(parts["train"]), torch.from_numpy(train).unsqueeze(1) / 255, rtol=0, atol=0)
    assert parts["test"].labels.tolist() == [i % 3 for i in range(11)]
    assert parts["test"].classes == ("0", "1", "2")


def test_emnist_is_transposed_and_its_labels_begin_at_one(tmp_path):
    images = pixels(4, 6, 6)
    write_mnist(tmp_path, images, np.array([1, 2, 2, 1]), "emnist-letters-test")
    parts = open_source(f"emnist:{tmp_path}", 1, 6)
    assert set(parts) == {"all"}, "a lone part is no test of what is trained on it"
    torch.testing.assert_close(all_of(parts["all"]), torch.from_numpy(images).transpose(1, 2).unsqueeze(1) / 255)
    assert parts["all"].labels.tolist() == [0, 1, 1, 0]
    assert parts["all"].classes == ("1", "2")


def test_damaged_idx_files_are_named(tmp_path):
    path = tmp_path / "x-images-idx3-ubyte"
    for content, message in (
        (b"\0\0\x0d\x03", "begins 00 00 08, got 00000d03"),
        (b"\0\0\x08\x03\0\0", "ends within its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"expected 5 bytes for \(5,\), got 3"),
        (b"", "begins 00 00 08"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"x-images-idx3-ubyte: .*{message}"):
            read_idx(path)
    zipped = tmp_path / "y.gz"
    write_idx(zipped, pixels(50, 9, 9))
    whole = zipped.read_bytes()
    for content in (whole[:-40], whole[:30] + bytes(40) + whole[70:], b"no gzip"):
        zipped.write_bytes(content)
        with pytest.raises(DataError, match=r"y\.gz: damaged gzip"):
            read_idx(zipped)
    with pytest.raises(DataError, match="nothing: No such file"):
        read_idx(tmp_path / "nothing")


def test_files_unpacked_beside_their_archives(tmp_path):
    """As torchvision leaves them."""
    images = pixels(12, 5, 5)
    for ending in ("", ".gz"):
        write_mnist(tmp_path, images, np.arange(12) % 3, "train", ending)
        write_mnist(tmp_path, images[:6], np.arange(6) % 3, "t10k", ending)
    assert {part: len(one) for part, one in read_idx_folder(tmp_path).items()} == {"train": 12, "test": 6}
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()  # its archive is there still
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    assert {part: len(one) for part, one in read_idx_folder(tmp_path).items()} == {"train": 12, "test": 6}


def test_idx_folders_that_are_not_whole(tmp_path):
    with pytest.raises(DataError, match="expected files such as train-images-idx3-ubyte"):
        read_idx_folder(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", pixels(4, 5, 5))
    with pytest.raises(DataError, match="its labels, train-labels-idx1-ubyte, are not there"):
        read_idx_folder(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", pixels(3))
    with pytest.raises(DataError, match=r"expected \[N, H, W\] with labels \[N\]"):
        read_idx_folder(tmp_path)


def cifar(count, kind):
    return pixels(count, 3072), generator.integers(0, kind, count)


def check_cifar(images, pixels, labels):
    torch.testing.assert_close(all_of(images), torch.from_numpy(pixels).view(-1, 3, 32, 32) / 255, rtol=0, atol=0)
    assert images.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_cifar10_python(tmp_path, inside):
    batches, test = [cifar(3, 10) for _ in range(5)], cifar(4, 10)
    write_cifar10_python(tmp_path / inside, batches, test, [f"c{i}" for i in range(10)])
    parts = read_cifar(tmp_path, 10)
    check_cifar(parts["train"], np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches]))
    check_cifar(parts["test"], *test)
    assert parts["train"].classes[3] == "c3"


def test_cifar10_binary(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    batches, test = [cifar(3, 10) for _ in range(5)], cifar(4, 10)
    for i, batch in enumerate(batches, 1):
        write_cifar_binary(folder / f"data_batch_{i}.bin", *batch)
    write_cifar_binary(folder / "test_batch.bin", *test)
    (folder / "batches.meta.txt").write_text("\n".join(f"c{i}" for i in range(10)) + "\n\n")
    parts = read_cifar(tmp_path, 10)
    check_cifar(parts["train"], np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches]))
    check_cifar(parts["test"], *test)
    (folder / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"test_batch\.bin: expected records of 3073 bytes, got 100"):
        read_cifar(tmp_path, 10)


def test_cifar100(tmp_path):
    train, test, names = cifar(7, 100), cifar(5, 100), [f"c{i}" for i in range(100)]
    write_cifar100_python(tmp_path / "p" / "cifar-100-python", train, test, names)
    for part, expected in read_cifar(tmp_path / "p", 100).items():
        check_cifar(expected, *{"train": train, "test": test}[part])
    coarse = np.zeros(7), np.full(5, 19)
    write_cifar_binary(tmp_path / "b" / "train.bin", train[0], coarse[0], train[1])
    write_cifar_binary(tmp_path / "b" / "test.bin", test[0], coarse[1], test[1])
    parts = read_cifar(tmp_path / "b", 100)
    check_cifar(parts["train"], *train)
    check_cifar(parts["test"], *test)
    with pytest.raises(DataError, match=r"expected cifar-100 as test .* found neither"):
        read_cifar(tmp_path, 100)


def test_a_pickle_cannot_run_programs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    write_cifar10_python(tmp_path, [cifar(2, 10)] * 5, cifar(2, 10), ["c"] * 10)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_3: a CIFAR file holds arrays and lists alone; .* _?io\.open"):
        read_cifar(tmp_path, 10)
    assert not (tmp_path / "written").exists()
    (tmp_path / "data_batch_3").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match="data_batch_3: not a readable pickle"):
        read_cifar(tmp_path, 10)


def test_folders(tmp_path):
    grey, colour = pixels(9, 9), pixels(12, 10, 3)
    for part in ("train", "val"):
        write_image(tmp_path / part / "cat" / "1.png", grey)
        write_image(tmp_path / part / "dog" / "deep" / "1.png", colour)
        write_image(tmp_path / part / "dog" / "2.PNG", colour)
        (tmp_path / part / "dog" / "notes.txt").write_text("no image")
    parts = read_folder(tmp_path, channels=3, size=9)
    assert set(parts) == {"train", "test"}
    assert parts["train"].classes == ("cat", "dog")
    assert sorted(parts["test"].labels.tolist()) == [0, 1, 1]
    cat = parts["train"].images(torch.tensor([0]))
    torch.testing.assert_close(cat[0], torch.from_numpy(grey).expand(3, 9, 9) / 255, rtol=0, atol=0)
    assert parts["train"].images(torch.tensor([1, 2])).shape == (2, 3, 9, 9)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_names_of_the_test_part(tmp_path, name):
    for part in ("train", name):
        for kind in ("a", "b"):
            write_image(tmp_path / part / kind / "1.png", pixels(8, 8))
    assert {part: one.classes for part, one in read_folder(tmp_path).items()} == dict.fromkeys(
        ("train", "test"), ("a", "b")
    )


def test_a_class_of_trains(tmp_path):
    for kind in ("bus", "car", "train"):
        write_image(tmp_path / kind / "1.png", pixels(8, 8))
    parts = read_folder(tmp_path)
    assert parts["all"].classes == ("bus", "car", "train")


def test_only_a_training_part_links_and_hidden_folders(tmp_path):
    write_image(tmp_path / "elsewhere" / "1.png", pixels(8, 8))
    for kind in ("a", "b", ".ipynb_checkpoints"):
        write_image(tmp_path / "set" / "train" / kind / "1.png", pixels(8, 8))
    write_image(tmp_path / "set" / "train" / "a" / ".thumbnail.png", pixels(8, 8))
    (tmp_path / "set" / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    parts = read_folder(tmp_path / "set", size=8)
    assert set(parts) == {"all"}
    assert parts["all"].classes == ("a", "b", "linked")
    assert len(parts["all"]) == 3


def test_cifar_files_that_are_not_whole(tmp_path):
    names = [f"c{i}" for i in range(10)]
    write_cifar10_python(tmp_path, [cifar(2, 10)] * 5, cifar(2, 10), names)
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))  # text, as Python 3 writes it
    assert read_cifar(tmp_path, 10)["train"].classes == tuple(names)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}))
    with pytest.raises(DataError, match="data_batch_2: expected an entry 'labels', got data"):
        read_cifar(tmp_path, 10)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": np.zeros((2, 7), np.uint8), b"labels": [0, 1]}))
    with pytest.raises(DataError, match=r"expected pixels \[N, 3072\] and integer labels"):
        read_cifar(tmp_path, 10)
    (tmp_path / "data_batch_2").unlink()
    with pytest.raises(DataError, match="data_batch_2: No such file"):
        read_cifar(tmp_path, 10)


def test_a_folder_without_parts_or_classes(tmp_path):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", pixels(8, 8))
    parts = read_folder(tmp_path, channels=1, size=8)
    assert set(parts) == {"all"}
    assert parts["all"].labels.tolist() == [-1, -1, -1]
    with pytest.raises(DataError, match="two classes at least"):
        build_split(DataConfig(name=f"folder:{tmp_path}"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing: expected images, found none"):
        read_folder(tmp_path / "nothing")


def test_real_fashion_mnist_with_letters(real_data):
    data = DataConfig(
        name=f"idx:{real_data / 'fashion_mnist'}",
        outliers=f"emnist:{real_data / 'emnist_letters'}",
        ood={"mnist": f"idx:{real_data / 'mnist'}"},
    )
    split = build_split(data)
    assert (len(split.train), len(split.validation), len(split.test)) == (51_000, 9_000, 10_000)
    assert len(split.outliers) + len(split.outlier_validation) == 20_800
    assert len(split.test_ood["mnist"]) == 10_000
    assert set(split.test_ood) == {"mnist"}
    # Letters stand upright: most of an I, in its middle rows, is in the middle columns.
    letters = open_source(f"emnist:{real_data / 'emnist_letters'}", 1, 28)["all"]
    i = letters.images((letters.labels == 8).nonzero().flatten()).mean(0)[0]
    assert i[8:20].sum(0).argmax() in range(11, 17)
    assert i[:, 11:17].sum() > 1.5 * i[11:17].sum()


def test_real_cifar_folders(real_data, tmp_path):
    import subprocess
    import sys

    done = subprocess.run([sys.executable, real_data / "unpack.py", tmp_path, "cifar10", "dtd"], capture_output=True)
    assert done.returncode == 0, done.stderr
    data = DataConfig(name=f"folder:{tmp_path / 'cifar10'}", ood={"dtd": f"folder:{tmp_path / 'ood' / 'dtd'}"})
    split = build_split(data)
    assert len(split.classes) == 8  # two of ten are outliers, since no other source is given
    assert len(split.train) + len(split.validation) == 40_000
    assert len(split.outliers) + len(split.outlier_validation) == 10_000
    assert split.train.shape == (3, 32, 32)
    assert len(split.test_ood["dtd"]) == 1200
