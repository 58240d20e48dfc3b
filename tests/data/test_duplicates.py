"""The same picture in two places: digests, perceptual hashes, and what is taken for alike."""

import itertools

import numpy as np
import pytest
import torch
from clouds import coded, pictures
from PIL import Image

from oodkern.data import duplicates
from oodkern.data.duplicates import (
    FINE,
    SAME,
    Fingerprints,
    fine_likeness,
    fingerprints,
    is_flat,
    joined,
    near_duplicates,
    repeated,
    same_pixels,
)


def as_images(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255


def prints_of(hashes):
    """Fingerprints with given hashes, all of one picture."""
    hashes = np.asarray(hashes, np.uint64)
    thumbnail = np.random.default_rng(0).integers(0, 256, 256).astype(np.uint8)
    digests = np.stack([hashes, hashes], 1)
    return Fingerprints(digests, hashes, ~hashes, np.tile(thumbnail, (len(hashes), 1)))


def test_the_hash_by_its_definition():
    from scipy.fft import dctn

    images = as_images(pictures(5))
    grey = images.mean(1).mul(255).double().numpy()
    frequencies = dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(5, -1)[:, 1:]
    above = frequencies > np.median(frequencies, axis=1, keepdims=True)
    expected = [int("0" + "".join(map(str, row.astype(int))), 2) for row in above]
    # Rows and columns of frequency 0 have another norm here than in scipy's transform, which moves few bits.
    for found, other in zip(fingerprints(images).hashes.tolist(), expected, strict=True):
        assert bin(found ^ other).count("1") <= 2
        assert found >> 63 == 0, "the mean is no bit"


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_the_mirrored_hash_is_that_of_the_mirrored_picture(size):
    images = as_images(pictures(20, size=size))
    prints, mirrored = fingerprints(images), fingerprints(images.flip(3))
    assert duplicates.ones(prints.mirrored ^ mirrored.hashes).max() <= 1  # rounding, at the median
    assert duplicates.ones(prints.hashes ^ mirrored.hashes).min() > 4


def test_ones():
    words = np.array([0, 1, 3, 2**63, 2**64 - 1, 0x0123456789ABCDEF], np.uint64)
    assert duplicates.ones(words).tolist() == [bin(int(word)).count("1") for word in words]


def test_candidates_find_every_pair_within_the_radius():
    generator = np.random.default_rng(1)
    right = generator.integers(0, 2**63, 300).astype(np.uint64)
    flips = [sum(1 << int(bit) for bit in generator.permutation(64)[: i % 8]) for i in range(300)]
    left = right ^ np.array(flips, np.uint64)
    found = near_duplicates(prints_of(left), prints_of(right))
    assert found.pairs.tolist() == [[i, i] for i in range(300) if i % 8 <= 4]
    assert not found.mirrored.any()
    assert found.skipped == 0
    assert near_duplicates(prints_of(left), prints_of(right), radius=1).pairs[:, 0].tolist() == [
        i for i in range(300) if i % 8 <= 1
    ]
    for bits in itertools.combinations((0, 10, 11, 21, 22, 33, 43, 44, 53, 54, 63), 4):  # at the ends of bands
        assert len(near_duplicates(prints_of([0]), prints_of([sum(1 << bit for bit in bits)])).pairs) == 1


def test_copies_are_found_and_other_pictures_are_not():
    pixels = pictures(60)
    others = fingerprints(as_images(pictures(60, seed=1)))
    prints = fingerprints(as_images(pixels))
    copies = {
        "coded": coded(pixels, 60),
        "mirrored": pixels[:, :, ::-1],
        "brighter": (pixels * 0.8 + 20).astype(np.uint8),
        "smaller": np.stack([np.asarray(Image.fromarray(one).resize((27, 27)).resize((32, 32))) for one in pixels]),
    }
    for name, made in copies.items():
        found = near_duplicates(fingerprints(as_images(made)), prints)
        assert len(found.pairs) >= 54, name
        assert (found.pairs[:, 0] == found.pairs[:, 1]).all(), name
        assert (found.mirrored == (name == "mirrored")).all(), name
        assert np.median(found.likeness) > SAME, name
        i, j = torch.from_numpy(found.pairs).T
        assert np.median(fine_likeness(as_images(made)[i], as_images(pixels)[j], found.mirrored)) > FINE, name
    assert len(near_duplicates(others, prints).pairs) == 0


def test_same_outlines_with_other_detail_are_not_the_same_picture():
    generator = torch.Generator().manual_seed(2)
    outline = torch.zeros(1, 1, 32, 32)
    outline[:, :, 6:26, 10:22] = 0.6
    pattern = torch.randn(2, 1, 32, 32, generator=generator) * 0.08
    images = (outline + pattern + 0.2).clamp(0, 1)
    assert np.corrcoef(*images.flatten(1).numpy())[0, 1] > 0.85
    assert fine_likeness(images[:1], images[1:], np.array([False]))[0] < FINE


def test_the_likest_and_then_the_first_is_taken():
    pixels = pictures(3)
    right = np.concatenate([coded(pixels[:1], 30), pixels[1:2], pixels[:1], pixels[:1]])
    found = near_duplicates(fingerprints(as_images(pixels)), fingerprints(as_images(right)))
    assert found.pairs.tolist() == [[0, 2], [1, 1]]
    assert found.likeness == pytest.approx([1, 1])


def test_flat_pictures_are_not_compared():
    grey = torch.full((40, 3, 32, 32), 0.5) + torch.rand(40, 3, 32, 32) * 0.004
    prints = fingerprints(grey)
    assert is_flat(prints).all()
    found = near_duplicates(prints, prints)
    assert len(found.pairs) == found.skipped == 0
    assert not is_flat(fingerprints(as_images(pictures(9)))).any()


def test_a_bucket_that_is_too_full_is_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_ALIKE", 99)
    crowd, alone = [7] * 10, [0x5A5A5A5A5A5A5A5A]
    found = near_duplicates(prints_of(crowd + alone), prints_of(crowd + alone))
    assert found.pairs.tolist() == [[10, 10]]
    assert found.skipped == 10
    monkeypatch.setattr(duplicates, "MOST_ALIKE", 100)
    found = near_duplicates(prints_of(crowd + alone), prints_of(crowd + alone))
    assert found.pairs.tolist() == [[i, 0] for i in range(10)] + [[10, 10]]
    assert found.skipped == 0


def test_chunks_change_nothing(monkeypatch):
    pixels = pictures(40)
    left = fingerprints(as_images(np.concatenate([coded(pixels, 80), pixels])))
    right = fingerprints(as_images(np.concatenate([pixels, pixels[:, :, ::-1]])))
    whole = near_duplicates(left, right)
    monkeypatch.setattr(duplicates, "CHUNK", 512)
    parts = near_duplicates(left, right)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_same_pixels():
    pixels = pictures(6)
    left, right = pixels[[0, 1, 2, 1]], pixels[[5, 1, 0, 1]]
    one, other = fingerprints(as_images(left)), fingerprints(as_images(right))
    assert same_pixels(one, other).tolist() == [[0, 2], [1, 1], [3, 1]]
    assert repeated(one) == repeated(other) == 1
    assert len(same_pixels(one, joined([]))) == len(same_pixels(joined([]), one)) == 0
    assert len(near_duplicates(one, joined([])).pairs) == len(near_duplicates(joined([]), one).pairs) == 0


def test_equal_bytes_in_another_shape_are_other_pixels():
    flat = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 8, 8)
    assert len(same_pixels(*map(fingerprints, flat))) == 0


def test_radius():
    with pytest.raises(ValueError, match="radius: expected 0 to 4 bits, got 5"):
        near_duplicates(joined([]), joined([]), radius=5)
