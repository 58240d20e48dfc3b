"""The test transform and the augmentations of torchvision, against torchvision itself where it is installed."""

import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from formats import write_image

from oodkern.data import ArraySet, Batches, FolderSet, augmentation, random_numbers, read_image, stream
from oodkern.data.pictures import fitted
from oodkern.data.readers import read_folder
from oodkern.data.vision import seeded

draws = np.random.default_rng(0)
SIDES = [(300, 200), (200, 300), (224, 224), (256, 256), (255, 257), (97, 401), (31, 500), (1, 3), (641, 480)]
NAMES = ("resized-crop", "trivial", "rand", "jitter")


def picture(width, height):
    from PIL import Image

    return Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [8, 32, 97, 224])
@pytest.mark.parametrize("sides", SIDES)
def test_center_crop_is_that_of_torchvision(sides, size):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    image = picture(*sides)
    theirs = v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)])(image)
    assert np.array_equal(np.asarray(fitted(image, size, "center-crop")), np.asarray(theirs))


def test_center_crop_keeps_the_shape_of_things(tmp_path):
    """A wide picture's middle: of columns numbered 0 to 63 at 16 rows, 14 in 16 of the height and as many columns."""
    columns = np.tile(np.arange(64, dtype=np.uint8) * 4, (16, 1))
    write_image(tmp_path / "a.png", columns)
    found = read_image(tmp_path / "a.png", 1, 14, "center-crop")
    assert torch.equal(found[0] * 255, torch.from_numpy(columns[1:15, 25:39]).float())
    assert read_image(tmp_path / "a.png", 1, 14).shape == (1, 14, 14)
    assert torch.equal(read_folder(tmp_path, 1, 14, "center-crop")["all"].images(torch.tensor([0]))[0], found)
    with pytest.raises(ValueError, match="resize: expected stretch or center-crop, got 'crop'"):
        read_image(tmp_path / "a.png", 1, 14, "crop")


def test_names_are_known_without_torchvision():
    """A configuration can be read where the package is not; nothing is imported."""
    program = (
        "import sys\nsys.modules['torchvision'] = None\nfrom oodkern.data import DataConfig, augmentation\n"
        "from oodkern.data.options import check\n"
        "check(DataConfig(augmentation='resized-crop+flip+trivial', outlier_augmentation='rand+jitter'))\n"
        "print(augmentation('resized-crop+flip+trivial').numbers)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "5\n"), found.stderr


def test_batches_can_be_sent_to_processes_that_are_spawned():
    images = ArraySet(torch.rand(5, 3, 8, 8), torch.arange(5))
    batches = Batches(images, 3, augmentation=augmentation("crop+flip"))
    sent = pickle.loads(pickle.dumps(batches))
    assert all(torch.equal(*pair) for pair in zip(batches[2], sent[2], strict=True))
    pickle.dumps(Batches(images, 3, augmentation=augmentation("resized-crop+flip+rand")))


def test_a_view_comes_first():
    with pytest.raises(
        ValueError, match=r"expected resized-crop, which is of the whole picture, as the first, got 'fl"
    ):
        augmentation("flip+resized-crop")


def test_draws_are_of_the_seed_and_leave_no_trace():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    numbers = random_numbers(0, 0, torch.arange(3), 2)
    first = [float(seeded(lambda one: torch.rand(()), None, row)) for row in numbers]
    assert torch.equal(torch.get_rng_state(), before)
    assert first == [float(seeded(lambda one: torch.rand(()), None, row)) for row in numbers]
    assert len(set(first)) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentations_are_those_of_torchvision(name, channels):
    """What torchvision makes of the same image from the same seed."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    theirs = {
        "resized-crop": v2.RandomResizedCrop((16, 16), scale=(0.08, 1.0)),
        "trivial": v2.TrivialAugmentWide(),
        "rand": v2.RandAugment(),
        "jitter": v2.ColorJitter(0.4, 0.4, 0.4),
    }[name]
    images = torch.from_numpy(draws.integers(0, 256, (12, channels, 16, 16), dtype=np.uint8))
    numbers = random_numbers(1, 2, torch.arange(12), 2)
    found = augmentation(name)(images / 255, numbers)
    of_bytes = name in ("trivial", "rand")
    for image, one, (high, low) in zip(images, found, numbers.double().tolist(), strict=True):
        torch.manual_seed(int(high * 2**24) * 2**24 + int(low * 2**24))
        expected = theirs(image if of_bytes else image / 255)
        assert torch.equal(one, expected / 255 if of_bytes else expected)
    assert found.shape == images.shape
    assert 0 <= found.min() <= found.max() <= 1 + 1e-6
    assert (found != images / 255).flatten(1).any(1).sum() > 6


def test_resized_crop_is_of_the_file(tmp_path):
    """Of all of its pixels, before it is made small; what follows is of the crop."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    pictures = [picture(60, 40) for _ in paths]
    for one, path in zip(pictures, paths, strict=True):
        one.save(path)
    batches = Batches(FolderSet(paths, torch.arange(6), size=16), 6, 7, 3, augmentation("resized-crop+flip"))
    images, labels = batches[1]
    numbers = random_numbers(7, 3, torch.arange(6, 12), 3)
    for image, label, (high, low, turn) in zip(images, labels.tolist(), numbers.double().tolist(), strict=True):
        torch.manual_seed(int(high * 2**24) * 2**24 + int(low * 2**24))
        crop = v2.RandomResizedCrop(16, scale=(0.08, 1.0))(pictures[label])
        expected = v2.functional.pil_to_tensor(crop) / 255
        assert torch.equal(image, expected.flip(-1) if turn < 0.5 else expected)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_batches_are_the_same_whoever_reads(tmp_path, kind):
    """From any batch on, here and in workers, which leave the random state alone."""
    pytest.importorskip("torchvision")
    images = ArraySet(torch.from_numpy(draws.integers(0, 256, (9, 3, 12, 12), dtype=np.uint8)), torch.arange(9))
    if kind == "files":
        paths = [tmp_path / f"{i}.png" for i in range(9)]
        for path in paths:
            picture(20, 12).save(path)
        images = FolderSet(paths, torch.arange(9), size=12)
    batches = Batches(images, 4, 1, 2, augmentation("resized-crop+flip+rand+jitter"))
    expected = [batches[i] for i in range(6)]
    before = torch.get_rng_state()
    for start, workers in itertools.product((0, 3), (0, 2)):
        found = itertools.islice(stream(batches, start, workers), 3)
        for (seen, labels), (known, names) in zip(found, expected[start:], strict=False):
            assert torch.equal(seen, known)
            assert torch.equal(labels, names)
    assert torch.equal(torch.get_rng_state(), before)
