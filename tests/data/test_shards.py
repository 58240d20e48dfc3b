"""WebDataset shards, written as tar files and by webdataset itself."""

import gc
import json
import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from formats import encoded, sample, write_shards, write_tar
from torch.utils.data import DataLoader

from oodkern.data import DataConfig, DataError, build_split
from oodkern.data.shards import OPEN_FILES, expanded, part_of_name, read_shards
from oodkern.data.split import unseen
from oodkern.data.tar_index import read_index

generator = np.random.default_rng(0)


def pixels(side=8):
    return generator.integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_images_and_labels(tmp_path):
    labels = [7, 3, 3, 900, 7, 3, 7]
    images = write_shards(tmp_path, labels)
    found = read_shards(str(tmp_path), 3, 8)
    assert list(found) == ["all"]
    chosen = torch.tensor([6, 0, 3, 3, 5])
    assert torch.equal(found["all"].images(chosen), images[chosen])
    assert found["all"].classes == ("3", "7", "900")
    assert found["all"].labels.tolist() == [1, 0, 0, 2, 1, 0, 1]
    some = found["all"].select(torch.tensor([5, 3])).relabelled(torch.tensor([0, 1]), ("a", "b"))
    assert torch.equal(some.images(torch.tensor([1, 0])), images[[3, 5]])
    assert (some.shape, some.classes, some[1][1].item()) == ((3, 8, 8), ("a", "b"), 1)
    assert some.name(0) == f"{tmp_path}/images-0001.tar at byte {int(some.places[1][0]):,}"
    grey = read_shards(str(tmp_path), 1, 4)["all"]
    assert grey.images(torch.arange(2)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_layouts_of_tars_and_names(tmp_path, layout):
    """Long names, folders, members of other kinds, and endings in capitals."""
    deep = "d" * 90
    image = pixels()
    files = [
        ("__meta__/info.json", b"{}"),
        ("README", b"no sample"),
        *sample(f"{deep}/{'k' * 80}", 4, image),
        ("b.PNG", encoded(image)),
        ("b.seg.png", b"a mask"),
        ("b.json", json.dumps({"label": 9}).encode()),
        ("only.cls", b"3"),
        *sample("c", -1),
    ]
    write_tar(tmp_path / "a.tar", files, layout=layout)
    found = read_shards(str(tmp_path / "a.tar"), 3, 8)["all"]
    assert found.labels.tolist() == [0, 1, -1]
    assert found.classes == ("4", "9")
    expected = torch.from_numpy(image).permute(2, 0, 1) / 255
    assert torch.equal(found.images(torch.arange(2)), expected.expand(2, 3, 8, 8))


def test_wnids_are_classes_where_every_sample_has_one(tmp_path):
    one = (
        sample("n02119789_1", 0) + sample("000_n01440764_7", 5) + sample("x", filename="n02119789/val_3.JPEG", label=1)
    )
    write_tar(tmp_path / "a.tar", one)
    found = read_shards(str(tmp_path / "a.tar"))["all"]
    assert found.classes == ("n01440764", "n02119789")
    assert found.labels.tolist() == [1, 0, 1]
    write_tar(tmp_path / "b.tar", sample("n014407641_1", 8))  # of nine digits: no wnid
    both = read_shards(f"{tmp_path}/a.tar::{tmp_path}/b.tar")["all"]
    assert both.classes == ("0", "1", "5", "8")
    assert both.labels.tolist() == [0, 2, 1, 3]


def test_braces_globs_and_joined_patterns(tmp_path):
    write_shards(tmp_path, list(range(10)), each=1)
    for pattern, labels in (
        ("images-{0002..0004}.tar", ["2", "3", "4"]),
        ("images-000[13].tar", ["1", "3"]),
        ("images-{0001,0007}.tar", ["1", "7"]),
    ):
        assert list(read_shards(f"{tmp_path}/{pattern}")["all"].classes) == labels
    joined = read_shards(f"{tmp_path}/images-0005.tar::{tmp_path}/images-{{0004..0005}}.tar")["all"]
    assert joined.classes == ("4", "5")
    assert len(joined) == 2, "a shard is read once"
    assert expanded("{a,b}-{8..11}") == [f"{one}-{number}" for one in "ab" for number in (8, 9, 10, 11)]
    assert expanded("{098..101}") == ["098", "099", "100", "101"]
    for pattern, reason in (
        ("images-{0008..0011}.tar", r"images-0010\.tar: no such file"),
        ("nothing-*.tar", r"nothing-\*\.tar: expected tar files, found none"),
        ("images-{x}.tar", r"expected braces such as \{0000\.\.0099\} or \{a,b\}, got \{x\}"),
    ):
        with pytest.raises(DataError, match=reason):
            read_shards(f"{tmp_path}/{pattern}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: expected tar files, found none"):
        read_shards(str(tmp_path / "empty"))


def test_parts_of_a_folder(tmp_path):
    """The test part is the labelled one of test and val."""
    write_shards(tmp_path, [1, 2, 2], "imagenet1k-train-{:04d}.tar")
    assert list(read_shards(str(tmp_path))) == ["all"]
    write_shards(tmp_path, [2, 1], "imagenet1k-validation-{:02d}.tar")
    write_shards(tmp_path, [None] * 4, "imagenet1k-test-{:02d}.tar")
    found = read_shards(str(tmp_path))
    assert {part: one.labels.tolist() for part, one in found.items()} == {"train": [0, 1, 1], "test": [1, 0]}
    assert found["test"].classes == ("1", "2")
    write_tar(tmp_path / "more.tar", sample("a", 1))
    with pytest.raises(DataError, match=r"expected train, val or test in the name of every shard.* got more\.tar"):
        read_shards(str(tmp_path))
    names = ("val/000.tar", "imagenet_val_2.tar", "valley.tar", "training-1.tar", "contest.tar", "x-test.tar")
    assert [part_of_name(name) for name in names] == ["validation", "validation", "", "train", "", "test"]


def opened(folder):
    return read_shards(folder)["all"].labels.tolist()


def test_processes_make_the_same_index_at_once(tmp_path):
    write_shards(tmp_path, list(range(14)), each=2)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(opened, [str(tmp_path)] * 8)
    assert found == [list(range(14))] * 8
    assert len(list(tmp_path.iterdir())) == 14  # 7 tars with an index each


def test_few_files_are_open(tmp_path):
    """Also after a fork, whose children read with descriptors that they inherit."""
    count = OPEN_FILES + 8
    images = write_shards(tmp_path, list(range(count)), each=1)
    found = read_shards(str(tmp_path), 3, 8)["all"]
    before = len(os.listdir("/proc/self/fd"))
    assert torch.equal(found.images(torch.arange(count)), images)
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES
    loader = DataLoader(found, batch_size=9, num_workers=2)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), images)
    other = pickle.loads(pickle.dumps(found))
    assert torch.equal(other.images(torch.tensor([3])), images[3:4])
    del other, found, loader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_many_indices_are_made_by_many_processes(tmp_path):
    """In the order of the shards; of a damaged one the error is as of one alone, and the others are kept."""
    write_shards(tmp_path, list(range(20)), each=1)
    assert opened(str(tmp_path)) == list(range(20))
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    (tmp_path / "images-0013.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"^/[^\n]*images-0013\.tar: not a readable uncompressed tar file [^\n]*$"):
        read_shards(str(tmp_path))
    assert (tmp_path / "images-0012.tar.index.npz").is_file()


def test_a_shard_that_shrinks_is_named(tmp_path):
    write_shards(tmp_path, [0])
    found = read_shards(str(tmp_path))["all"]
    os.truncate(tmp_path / "images-0000.tar", 1030)
    with pytest.raises(DataError, match=r"images-0000\.tar: expected [\d,]+ bytes at 1,536, got 0"):
        found.content(0)


def test_shards_are_told_apart_by_place(tmp_path):
    """A link to a folder holds the same images; an image that another tar holds too is another."""
    write_shards(tmp_path / "a", list(range(6)))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    known = read_shards(str(tmp_path / "a"))["all"].select(torch.tensor([0, 4]))
    others = read_shards(str(tmp_path / "b"))["all"]
    assert unseen(others, set(known.identities())).labels.tolist() == [1, 2, 3, 5]
    assert unseen(others, {"/another/file.png"}) is others


def test_a_split_of_shards(tmp_path):
    write_shards(tmp_path / "id", [0, 1, 2, 3] * 12, "x-train-{:03d}.tar", 5)
    write_shards(tmp_path / "id", [0, 1, 2, 3] * 3, "x-val-{:03d}.tar", 5)
    write_shards(tmp_path / "out", [None] * 20)
    config = DataConfig(
        f"wds:{tmp_path}/id", f"wds:{tmp_path}/out/images-{{0000..0006}}.tar", classes=[3, 0, 1], size=8
    )
    split = build_split(config)
    assert (len(split.train) + len(split.validation), len(split.test)) == (36, 9)
    assert (len(split.outliers) + len(split.outlier_validation), len(split.test_ood["near"])) == (20, 3)
    assert split.classes == ("0", "1", "2")
    assert split.train.damage is split.validation.damage


def test_what_webdataset_writes_and_reads(tmp_path):
    """Keys, labels and bytes as webdataset itself gives them."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{tmp_path}/set-%04d.tar", maxcount=4, verbose=0) as writer:
        for i in range(10):
            image = encoded(pixels(), "jpg")
            writer.write({"__key__": f"n{i % 3:08d}_{i}", "jpg": image, "cls": i % 3, "json": {"label": i % 3}})
    pattern = f"{tmp_path}/set-{{0000..0002}}.tar"
    theirs = list(webdataset.WebDataset(pattern, shardshuffle=False))
    ours = read_shards(pattern, 3, 8)["all"]
    assert len(ours) == len(theirs) == 10
    assert ours.classes == ("n00000000", "n00000001", "n00000002")
    for i, one in enumerate(theirs):
        assert ours.content(i) == one["jpg"]
        assert ours.labels[i] == int(one["cls"])
        assert ours.classes[int(ours.labels[i])] == one["__key__"].split("_")[0]
    assert read_index(tmp_path / "set-0000.tar").integers.tolist() == [0, 1, 2, 0]
