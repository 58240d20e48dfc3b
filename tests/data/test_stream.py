"""Streams and augmentations: functions of (seed, stream, position), whoever computes them."""

import itertools
import subprocess
import sys

import pytest
import torch

from oodkern.data import ArraySet, Batches, DataError, FolderSet, augmentation, random_numbers, stream
from oodkern.data.augment import crop, flip, vary
from oodkern.data.split import generator_of
from oodkern.processes import Processes


def numbered(count, size=8):
    images = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1))
    return ArraySet(images, torch.arange(count))


def take(batches, count, start=0, workers=0):
    return list(itertools.islice(stream(batches, start, workers), count))


def test_each_sample_is_seen_once_a_pass():
    batches = Batches(numbered(10), 4)
    indices = torch.cat([labels for _, labels in take(batches, 15)]).view(6, 10)
    for one in indices:
        assert sorted(one.tolist()) == list(range(10))
    assert len({tuple(one.tolist()) for one in indices}) > 1, "not shuffled anew"


def test_a_batch_may_be_larger_than_the_set():
    _, labels = Batches(numbered(3), 8)[0]
    assert len(labels) == 8
    assert torch.bincount(labels).min() >= 2


def test_rejects():
    with pytest.raises(
        ValueError, match="expected one image at least and a positive size, got 0 images and batch_size 4"
    ):
        Batches(numbered(0), 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_their_number_alone(workers):
    """Resuming, prefetching and processes change nothing; images come back with their labels."""
    batches = Batches(numbered(13), 5, seed=3, stream=1, augmentation=augmentation("vary+crop"))
    expected = [batches[i] for i in range(9)]
    for start in (0, 4):
        for (images, labels), (known, names) in zip(take(batches, 5, start, workers), expected[start:], strict=False):
            assert torch.equal(images, known)
            assert torch.equal(labels, names)
    plain = Batches(numbered(13), 5, seed=3, stream=1)
    images, labels = plain[7]
    assert torch.equal(images, numbered(13).array[labels])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_line_whoever_reads_it(tmp_path, workers):
    (tmp_path / "a.png").write_bytes(b"no image")
    images = FolderSet([tmp_path / "a.png"], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(DataError) as caught:
        take(Batches(images, 1), 1, workers=workers)
    assert str(caught.value).startswith(f"{tmp_path}/a.png: not a readable image (UnidentifiedImageError: ")
    assert "\n" not in str(caught.value)


def test_workers_leave_the_random_state_alone():
    before = torch.get_rng_state()
    take(Batches(numbered(5), 2), 2, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_and_streams_differ():
    orders = [
        tuple(Batches(numbered(50), 50, seed=seed, stream=number)[0][1].tolist())
        for seed in (0, 1)
        for number in (0, 1)
    ]
    assert len(set(orders)) == 4
    numbers = random_numbers(0, 0, torch.arange(4), 3)
    assert len(numbers.unique()) == 12
    assert torch.equal(random_numbers(0, 0, torch.tensor([2]), 3)[0], numbers[2])
    # A second pass draws other numbers for the same sample.
    batches = Batches(numbered(1), 1, augmentation=augmentation("crop"))
    assert len({tuple(batches[i][0].flatten().tolist()) for i in range(20)}) > 3


def test_splits_and_streams_draw_apart():
    """Whatever a split's number and a stream's seed."""
    for split, purpose in ((None, 0), (0, 3), (5, 2)):
        key = (0 if split is None else split + 1, purpose)
        drawn = generator_of(split, purpose).random(4, dtype="float32")
        assert not (random_numbers(*key, torch.arange(1), 4)[0].numpy() == drawn).any()


def test_random_numbers_are_uniform():
    numbers = random_numbers(5, 2, torch.arange(4000), 4)
    assert ((numbers >= 0) & (numbers < 1)).all()
    torch.testing.assert_close(numbers.mean(0), torch.full((4,), 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(numbers.T), torch.eye(4) / 12, atol=0.006, rtol=0)


def test_crop_moves_the_image():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 3, 4] = 1
    moved = crop(image.expand(900, 1, 8, 8), random_numbers(0, 0, torch.arange(900), 2))
    places = moved.flatten(1).argmax(1)
    offsets = {(int(p) // 8 - 3, int(p) % 8 - 4) for p in places}
    assert offsets == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    colours = torch.rand(2, 3, 16, 16)
    random = torch.tensor([[0.5, 0.5], [0.0, 0.999]])
    moved = crop(colours, random)
    assert torch.equal(moved[0], colours[0])
    assert torch.equal(moved[1, :, 2:, :14], colours[1, :, :14, 2:])
    assert (moved[1, :, :2] == 0).all()


def test_flip_swaps_half():
    images = torch.rand(6, 1, 4, 4)
    flipped = flip(images, torch.tensor([0.1, 0.9, 0.49, 0.5, 0.2, 0.99]).view(-1, 1))
    for i, swapped in enumerate([True, False, True, False, True, False]):
        assert torch.equal(flipped[i], images[i].flip(-1) if swapped else images[i])


def test_vary_never_makes_a_half_turn():
    """A half turn of a six is a nine, which is a test image's class."""
    image = torch.rand(1, 1, 8, 8)
    varied = vary(image.expand(4000, 1, 8, 8), random_numbers(0, 0, torch.arange(4000), 5))
    assert varied.shape == (4000, 1, 8, 8)
    assert varied.min() >= 0
    assert varied.max() <= 1

    def share(other):
        centred = varied.flatten(1) - varied.flatten(1).mean(1, keepdim=True)
        reference = other.flatten() - other.mean()
        cosine = (centred @ reference) / (centred.norm(dim=1) * reference.norm()).clamp_min(1e-9)
        return float((cosine.abs() > 0.999).float().mean())

    assert share(image) > 0.25
    assert share(image.rot90(1, (2, 3))) > 0.25
    assert share(image.rot90(-1, (2, 3))) > 0.25
    assert share(image.rot90(2, (2, 3))) == 0


def test_names_of_augmentations():
    assert augmentation("none") is None
    both = augmentation("flip+crop")
    images, random = torch.rand(3, 1, 8, 8), torch.rand(3, 3)
    assert torch.equal(both(images, random), crop(flip(images, random[:, :1]), random[:, 1:]))
    known = "crop, flip, vary, resized-crop, trivial, rand, jitter"
    with pytest.raises(ValueError, match=rf"expected none, or one or more of {known} joined by \+, got 'turn'"):
        augmentation("turn")


def test_processes_share_every_batch():
    """Of 70 samples in batches of 7, over the end of a pass: each process has its part, all of them the batch."""
    images = numbered(70)
    one = Batches(images, 7, seed=3, augmentation=augmentation("flip"))
    parts = [
        Batches(images, 7, seed=3, augmentation=augmentation("flip"), processes=Processes(rank, 3)) for rank in range(3)
    ]
    for batch in range(23):
        found = [part[batch] for part in parts]
        assert [len(labels) for _, labels in found] == [2, 2, 3]
        for whole, shares in zip(one[batch], zip(*found, strict=True), strict=True):
            assert torch.equal(torch.cat(shares), whole)
        assert all(torch.equal(part.indices(batch), one.indices(batch)) for part in parts)


def test_a_program_ends_that_leaves_a_stream_open():
    """Although its workers ignore the signal by which they would be ended."""
    program = (
        "import torch\nfrom oodkern.data import ArraySet, Batches, stream\n"
        "images = ArraySet(torch.zeros(8, 1, 2, 2), torch.zeros(8).long(), ('0',))\n"
        "batches = stream(Batches(images, 4), workers=2)\nnext(batches)\nprint('read')\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "read\n"), found.stderr
