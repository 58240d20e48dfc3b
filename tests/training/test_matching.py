"""Rows of a pool and the images that they are of."""

import numpy as np
import pytest

from oodkern.training.matching import digests, images_of


def test_rows_are_matched_to_images_by_key():
    def found(rows, images):
        return images_of(digests(rows, len(rows)), digests(images, len(images))).tolist()

    assert found("bxabbca", "abcab") == [1, -1, 0, 4, -1, 2, 3]  # of equal keys the first, the second, and no third
    assert found("", "ab") == []
    assert found("ab", "") == [-1, -1]
    random = np.random.default_rng(0)
    rows, images = ([str(key) for key in random.integers(0, 300, count)] for count in (500, 400))
    places = {}
    for index, key in enumerate(images):
        places.setdefault(key, []).append(index)
    assert found(rows, images) == [places[key].pop(0) if places.get(key) else -1 for key in rows]


def test_as_many_keys_as_there_are_rows():
    with pytest.raises(ValueError, match="keys: expected 3, got 2"):
        digests("ab", 3)
