"""The same picture in two places: digests of pixels, a perceptual hash, and how like two pictures are.

The hash is that of the discrete cosine transform ("pHash"): grey, 32 x 32, the 63 lowest frequencies against their
median. Copies of a picture that were coded again, resized or made brighter differ in few of its bits. What has like
hashes is then compared as thumbnails, since two shirts have them too.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

SIDE, LOW, THUMBNAIL = 32, 8, 16
RADIUS = 4  # bits of 63
# The pixels of two thumbnails correlate by LIKE at least and their detail, see `detail`, by ALIKE: they look alike.
# They are one picture where the detail correlates by SAME, and the finer detail of the images at 32 x 32 by FINE.
# Of CIFAR-10's test images whose hash is near that of a training image 112 reach LIKE, all copies by eye, and 83 ALIKE.
# Of things that look alike by nature, letters and digits or clothes of two classes, dozens in 10,000 reach SAME, with
# finer detail of 0.1 to 0.91, nearly all below 0.88. Of copies made by JPEG at quality 50, at 24 pixels a side or
# brighter by a fifth 95 % have more than 0.93, of textures 0.87; at quality 25 half have 0.93, of textures 0.9.
LIKE, ALIKE, SAME, FINE = 0.9, 0.9, 0.95, 0.9
# Standard deviation of a thumbnail's pixels, of 255, below which the hash is noise and no near-duplicate is looked for.
FLAT = 2.0
BANDS = (11, 11, 11, 11, 10, 10)
MOST_ALIKE = 1 << 20  # pairs of one bucket
CHUNK = 1 << 22  # pairs that are compared at once


class Fingerprints(NamedTuple):
    """Of N images: 288 bytes each."""

    digests: NDArray[np.uint64]  # [N, 2], of the pixels as the model sees them
    hashes: NDArray[np.uint64]  # [N], of the picture
    mirrored: NDArray[np.uint64]  # [N], of its mirror image
    thumbnails: NDArray[np.uint8]  # [N, 256], grey, 16 x 16

    def __len__(self) -> int:
        return len(self.hashes)

    def at(self, indices: NDArray) -> Fingerprints:
        return Fingerprints(*(one[indices] for one in self))


def joined(parts: list[Fingerprints]) -> Fingerprints:
    return Fingerprints(*(np.concatenate(one) for one in zip(*parts, strict=True))) if parts else NOTHING


NOTHING = Fingerprints(
    np.zeros((0, 2), np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros((0, THUMBNAIL**2), np.uint8)
)


def cosines(rows: int, side: int) -> Tensor:
    """The lowest rows of the discrete cosine transform of `side` numbers, of norm 1 but for the first."""
    k, n = torch.arange(rows).double()[:, None], torch.arange(side).double()
    return (2 / side) ** 0.5 * torch.cos(torch.pi * k * (2 * n + 1) / (2 * side))


def bits(frequencies: Tensor) -> NDArray[np.uint64]:
    """[N] of [N, 64]: a bit for each frequency that is above the median, the mean's left out."""
    above = frequencies > frequencies[:, 1:].median(1, keepdim=True).values
    above[:, 0] = False
    return np.packbits(above.numpy(), axis=1).view(">u8").astype(np.uint64)[:, 0]


def fingerprints(images: Tensor) -> Fingerprints:
    """Of images [N, C, H, W] in [0, 1]. Digests are of uint8 pixels and of the shape; grey is the mean of channels."""
    pixels = (images.clamp(0, 1) * 255).round().byte().contiguous()
    shape = str(tuple(pixels.shape[1:])).encode()
    digests = [hashlib.blake2b(one, digest_size=16, person=shape[:16]).digest() for one in pixels.numpy()]
    grey = pixels.double().mean(1, keepdim=True)
    small = resized(grey, SIDE)[:, 0]
    basis = cosines(LOW, SIDE)
    frequencies = basis @ small @ basis.T  # [N, 8, 8], rows vertical
    # Mirrored from left to right a picture's frequency k along a row is (-1)^k times what it was.
    signs = torch.tensor([1.0, -1.0]).double().repeat(LOW // 2)
    return Fingerprints(
        np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2),
        bits(frequencies.flatten(1)),
        bits((frequencies * signs).flatten(1)),
        resized(grey, THUMBNAIL).flatten(1).round().clamp(0, 255).byte().numpy(),
    )


def resized(grey: Tensor, side: int) -> Tensor:
    if grey.shape[2:] == (side, side):
        return grey
    return interpolate(grey, (side, side), mode="bilinear", antialias=True, align_corners=False)


def same_pixels(left: Fingerprints, right: Fingerprints) -> NDArray[np.int64]:
    """[M, 2]: for each image of `left` with an equal one in `right` its number and that of the first equal one."""
    either = np.concatenate([left.digests, right.digests])
    _, numbers = np.unique(either, axis=0, return_inverse=True)
    of_left, of_right = np.split(numbers.reshape(-1), [len(left)])
    known, first = np.unique(of_right, return_index=True)
    if not len(known):
        return np.zeros((0, 2), np.int64)
    at = np.searchsorted(known, of_left).clip(max=len(known) - 1)
    found = known[at] == of_left
    return np.stack([np.flatnonzero(found), first[at[found]]], 1).astype(np.int64)


def repeated(prints: Fingerprints) -> int:
    """How many images are equal in pixels to an earlier one."""
    return len(prints) - len(np.unique(prints.digests, axis=0))


class Near(NamedTuple):
    """M images of `left` that look like one in `right`, each with the likest."""

    pairs: NDArray[np.int64]  # [M, 2], numbers in left and right
    mirrored: NDArray[np.bool_]  # [M], whether the left one's mirror image does
    likeness: NDArray[np.float64]  # [M], correlation of their detail, from ALIKE to 1
    skipped: int  # images of left that were not compared with all of right, see MOST_ALIKE


def near_duplicates(left: Fingerprints, right: Fingerprints, radius: int = RADIUS) -> Near:
    """Images whose hash, or whose mirror image's, differs in `radius` (0 to 4) bits at most from one in `right`.

    Their thumbnails are alike too, see ALIKE; flat images, see FLAT, are not compared. Candidates share two of the six
    bands of a hash's bits, as all do that differ in four: of six bands two are left alone. No more than CHUNK of them
    are held at once, so that memory is that of the hashes, sorted by one pair of bands after the other. A bucket of
    images with the same two bands whose pairs are more than MOST_ALIKE is left out.
    """
    if not 0 <= radius <= 4:
        raise ValueError(f"radius: expected 0 to 4 bits, got {radius}")
    ours, theirs = (np.flatnonzero(~is_flat(one)) for one in (left, right))
    hashes, others = np.concatenate([left.hashes[ours], left.mirrored[ours]]), right.hashes[theirs]
    skipped = np.zeros(len(hashes), bool)
    best = PAIR[:0]
    for bands in itertools.combinations(range(len(BANDS)), 2):
        for i, j in candidates(key_of(hashes, bands), key_of(others, bands), skipped):
            close = np.flatnonzero(ones(hashes[i] ^ others[j]) <= radius)
            for at in range(0, len(close), CHUNK >> 8):
                some = close[at : at + (CHUNK >> 8)]
                found = np.zeros(len(some), PAIR.dtype)
                found["left"], found["right"] = ours[i[some] % len(ours)], theirs[j[some]]
                found["mirrored"] = i[some] >= len(ours)
                found["likeness"] = alike(
                    left.thumbnails[found["left"]], right.thumbnails[found["right"]], found["mirrored"]
                )
                best = likest(np.concatenate([best, found[found["likeness"] >= ALIKE]]))
    pairs = np.stack([best["left"], best["right"]], 1)
    return Near(pairs, best["mirrored"], best["likeness"], int(skipped.reshape(2, -1).any(0).sum()))


PAIR = np.zeros(0, [("left", np.int64), ("right", np.int64), ("mirrored", np.bool_), ("likeness", np.float64)])


def likest(pairs: NDArray) -> NDArray:
    """Of each image of left the likest; of equally like ones an image before mirror images, and the first."""
    ordered = pairs[np.lexsort((pairs["right"], pairs["mirrored"], -pairs["likeness"], pairs["left"]))]
    return ordered[np.unique(ordered["left"], return_index=True)[1]]


def is_flat(prints: Fingerprints) -> NDArray[np.bool_]:
    return deviations(prints.thumbnails) < FLAT


def deviations(thumbnails: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Standard deviation [N] of pixels [N, P], by chunks."""
    parts = [thumbnails[at : at + 65536].astype(np.float32).std(1) for at in range(0, len(thumbnails), 65536)]
    return np.concatenate([np.zeros(0), *parts])


def key_of(hashes: NDArray[np.uint64], bands: tuple[int, ...]) -> NDArray[np.uint32]:
    key = np.zeros(len(hashes), np.uint64)
    for band in bands:
        width = np.uint64(BANDS[band])
        key = key << width | hashes >> np.uint64(sum(BANDS[:band])) & np.uint64((1 << BANDS[band]) - 1)
    return key.astype(np.uint32)


def candidates(
    left: NDArray[np.uint32], right: NDArray[np.uint32], skipped: NDArray[np.bool_]
) -> Iterator[tuple[NDArray, NDArray]]:
    """Numbers of images with the same key, in left and in right, at most about CHUNK at once; `skipped` is marked."""
    mine, others = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    keys, ordered = left[mine], right[others]
    first = np.searchsorted(ordered, keys, "left")
    count = np.searchsorted(ordered, keys, "right") - first
    members = np.searchsorted(keys, keys, "right") - np.searchsorted(keys, keys, "left")
    full = members * count > MOST_ALIKE
    skipped[mine[full]] = True
    some = np.flatnonzero((count > 0) & ~full)
    ends = np.cumsum(count[some])
    at = 0
    while at < len(some):
        begin = ends[at - 1] if at else 0
        until = max(int(np.searchsorted(ends, begin + CHUNK, "right")), at + 1)
        chosen = some[at:until]
        within = np.arange(ends[until - 1] - begin) - np.repeat(ends[at:until] - count[chosen] - begin, count[chosen])
        yield np.repeat(mine[chosen], count[chosen]), others[np.repeat(first[chosen], count[chosen]) + within]
        at = until


def ones(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How many bits of each are 1: counted in pairs, fours and bytes, whose sum is the highest byte of a product."""
    two, four, eight = (np.uint64(m) for m in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    words = words - (words >> np.uint64(1) & two)
    words = (words & four) + (words >> np.uint64(2) & four)
    words = words + (words >> np.uint64(4)) & eight
    return words * np.uint64(0x0101010101010101) >> np.uint64(56)


def alike(left: NDArray[np.uint8], right: NDArray[np.uint8], mirrored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Correlation [M] of the detail of thumbnails [M, 256], the mirrored of the left mirrored; 0 for less than LIKE."""
    x, y = (one.reshape(-1, THUMBNAIL, THUMBNAIL).astype(np.float64) for one in (left, right))
    x = np.where(mirrored[:, None, None], x[:, :, ::-1], x)
    whole = cosine(x - x.mean((1, 2), keepdims=True), y - y.mean((1, 2), keepdims=True))
    # Rounded, so that ties do not hang on how a processor adds.
    return np.where(whole >= LIKE, cosine(detail(x, LOW, SIDE), detail(y, LOW, SIDE)).round(6), 0.0)


def detail(pictures: NDArray[np.float64], low: int, high: int) -> NDArray[np.float64]:
    """[M, F] of [M, S, S]: the frequencies k, l of the cosine transform with low <= k + l < high.

    What the hash is made of, where the light and the dark are, two pictures of like things have in common.
    """
    side = pictures.shape[1]
    basis = cosines(side, side).numpy()
    basis[0] /= 2**0.5
    k = np.arange(side)[:, None] + np.arange(side)
    return (basis @ pictures @ basis.T)[:, (low <= k) & (k < high)]


def fine_likeness(left: Tensor, right: Tensor, mirrored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Correlation [M] of the finer detail of images [M, C, H, W], at 32 x 32, the mirrored of the left mirrored."""
    left = torch.where(torch.from_numpy(mirrored)[:, None, None, None], left.flip(3), left)
    x, y = (resized(one.double().mean(1, keepdim=True), SIDE)[:, 0].numpy() for one in (left, right))
    return cosine(detail(x, 2 * LOW, 3 * LOW), detail(y, 2 * LOW, 3 * LOW))


def cosine(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of rows; 0 where one is zero."""
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (x * y).sum(1) / np.where(norms > 0, norms, np.inf)
