"""Image files that cannot be read: what training reads instead, what is counted, and when it is too much."""

import itertools
import threading
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from formats import encoded, write_tar

from oodkern.data import Batches, DataError, FolderSet, augmentation, stream
from oodkern.data.damage import Damage, damage_lines
from oodkern.data.shards import read_shards
from oodkern.processes import Processes

NO_IMAGE = b"\xff\xd8\xff no image"


def contents(count, damaged):
    """Bytes of images of one grey each, which is their number; and of damaged ones."""
    return [NO_IMAGE if i in damaged else encoded(np.full((8, 8, 3), i % 256, dtype=np.uint8)) for i in range(count)]


def folder_of(folder, count, damaged):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.png" for i in range(count)]
    for path, content in zip(paths, contents(count, damaged), strict=True):
        path.write_bytes(content)
    return FolderSet(paths, torch.arange(count), size=8)


def shards_of(folder, count, damaged):
    files = [
        (f"{i:05d}.{suffix}", content)
        for i, image in enumerate(contents(count, damaged))
        for suffix, content in (("cls", str(i).encode()), ("png", image))
    ]
    half = count // 2 * 2
    write_tar(folder / "a.tar", files[:half])
    write_tar(folder / "b.tar", files[half:])
    return read_shards(str(folder), 3, 8)["all"]


KINDS = pytest.mark.parametrize("make", [folder_of, shards_of])


def numbers(images):
    return (images[:, 0, 0, 0] * 255).round().long().tolist()


@KINDS
def test_the_next_image_stands_in(tmp_path, make):
    """With its own label, also past the end of the set; of a part it is the next of the part."""
    images = make(tmp_path, 12, {4, 11})
    images.damage.limit = 2
    seen, indices = images.read(torch.tensor([3, 4, 11, 0]))
    assert indices.tolist() == [3, 5, 0, 0]
    assert numbers(seen) == [3, 5, 0, 0]
    assert numbers(images.images(torch.tensor([4]))) == [5]
    assert images[4][1] == 5
    part = images.select(torch.tensor([9, 4, 7])).relabelled(torch.tensor([0, 1, 2]), ("a", "b", "c"))
    seen, indices = part.read(torch.tensor([1]))
    assert (numbers(seen), indices.tolist()) == ([7], [2])
    assert images.damage.found == part.damage.found == [4, 11]


@KINDS
def test_an_evaluation_has_none_of_them(tmp_path, make):
    images = make(tmp_path, 6, {2})
    seen, indices = images.readable(torch.tensor([5, 2, 1]))
    assert (numbers(seen), indices.tolist()) == ([5, 1], [5, 1])
    seen, indices = images.readable(torch.tensor([2]))
    assert (seen.shape, len(indices)) == ((0, 3, 8, 8), 0)


def test_the_shape_is_known_of_a_set_that_begins_with_one(tmp_path):
    assert folder_of(tmp_path, 3, {0}).shape == (3, 8, 8)


def test_past_the_limit(tmp_path):
    """Of fewer than 2,000 files one may be unreadable, of 2,000 two; each is counted once."""
    images = folder_of(tmp_path, 20, {1, 2, 15, 16, 17})
    for _ in range(3):
        images.readable(torch.tensor([0, 1]))
    with pytest.raises(DataError) as caught:
        images.images(torch.tensor([1]))
    start, names = str(caught.value).split(": ")
    assert start == "2 of 20 image files cannot be read, and more than 1 (one in 1,000) are an error"
    assert names == f"{images.paths[1]}, {images.paths[2]}"
    with pytest.raises(DataError, match=r"5 of 20 .*00001\.png, .*00002\.png, .*00015\.png, \.\.\."):
        images.damage.note(15, 16, 17)
    assert [Damage(count, str, str).limit for count in (1, 1999, 2000, 13_000_000)] == [1, 1, 2, 13_000]


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_whoever_reads(tmp_path, make, workers):
    """Images and labels, from any batch on; what workers find out this process knows and tells once."""
    images = make(tmp_path, 13, {0, 6})
    images.damage.limit = 2
    batches = Batches(images, 5, seed=3, stream=1, augmentation=augmentation("flip"))
    expected = [Batches(make(tmp_path / "same", 13, {0}), 5, seed=3, stream=1).indices(i).tolist() for i in range(9)]
    replaced = [[{0: 1, 6: 7}.get(i, i) for i in batch] for batch in expected]
    for start in (0, 4):
        for i, (seen, labels, indices) in enumerate(
            itertools.islice(stream(batches, start, workers, indices=True), 5), start
        ):
            assert indices.tolist() == numbers(seen) == labels.tolist() == replaced[i]
    lines = damage_lines([images, images.select(torch.arange(3))])
    assert [
        line.startswith(f"left out, {images.name(i)}: not a readable image")
        for line, i in zip(lines, (0, 6), strict=True)
    ] == [
        True,
        True,
    ]
    assert damage_lines([images]) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_past_the_limit_whoever_reads(tmp_path, workers):
    images = folder_of(tmp_path, 6, {1, 2, 3})
    with pytest.raises(DataError, match=r"^[23] of 6 image files cannot be read.*: /[^\n]*\.png$"):
        list(itertools.islice(stream(Batches(images, 6), workers=workers), 2))


def test_where_no_image_can_be_read(tmp_path):
    images = folder_of(tmp_path, 3, {0, 1, 2})
    images.damage.limit = 3
    with pytest.raises(DataError, match=r"00001\.png: not a readable image"):
        images.read(torch.tensor([1]))


def test_one_that_can_be_read_again(tmp_path):
    images = folder_of(tmp_path, 4, {2})
    images.readable(torch.arange(4))
    images.paths[2].write_bytes(contents(4, set())[2])
    assert damage_lines([images]) == [f"left out, {images.paths[2]}: could not be read, and now can"]


def read_together(folder):
    of = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    paths = sorted(Path(folder).glob("*.png"))
    images = FolderSet(paths, torch.arange(len(paths)), size=8)
    images.damage.limit = 2
    batches = Batches(images, 7, seed=1, processes=of)
    whole = []
    for batch in range(6):
        _, labels, own = batches.read(batch)
        everyone = batches.read_by_all(batch, own, torch.device("cpu"))
        assert torch.equal(everyone[of.share(7)], own)
        assert torch.equal(images.labels[own], labels)
        whole.append(everyone.tolist())
    lines = damage_lines([images], of)
    return whole, lines, images.damage.found


def test_processes_know_what_the_others_read(tmp_path):
    """Labels are formed of the whole batch on each of them, and every file is told by the first."""
    images = folder_of(tmp_path, 10, {3, 8})
    images.damage.limit = 2
    alone = [Batches(images, 7, seed=1).read(batch)[2].tolist() for batch in range(6)]
    found = processes.run(read_together, 2, str(tmp_path))
    assert [whole for whole, _, _ in found] == [alone] * 2
    assert [flags for _, _, flags in found] == [[3, 8]] * 2
    assert [len(lines) for _, lines, _ in found] == [2, 0]


def test_what_a_batch_that_nobody_took_found_out_is_not_forgotten():
    """A worker crosses the limit in a batch it prefetched, and its error goes the way of the batch."""
    damage = Damage(40, str, lambda number: None)
    damage.note(9)
    damage.flags[38] = 1  # by the worker
    with pytest.raises(DataError, match="2 of 40 image files cannot be read"):
        damage.note(9)
    damage.note()


def test_found_while_others_find():
    """A flag that is set while the set ones are looked for: PyTorch counts them first, and fails where one comes."""
    damage = Damage(2_000_000, str, id)
    stop = threading.Event()

    def others():
        while not stop.is_set():
            damage.flags.random_(2)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(20):
            assert all(0 <= number < 2_000_000 for number in damage.found[:3])
    finally:
        stop.set()
        thread.join()
