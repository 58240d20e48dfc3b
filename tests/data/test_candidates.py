"""Candidates for outliers, opened; `oodkern select-outliers` has sources on disk and mistakes."""

import torch

from oodkern.data import DataConfig, build_split
from oodkern.data.candidates import open_candidates


def test_id_images_are_left_out_of_a_candidate():
    split = build_split(DataConfig())
    found = open_candidates({"digits": "digits", "far": "photos"}, split, None)
    digits, left_out = found["digits"]
    known = len(split.train) + len(split.validation) + len(split.test)
    assert (len(digits), left_out) == (1797 - known, known)
    assert (len(found["far"][0]), found["far"][1]) == (360, 0)
    assert (digits.labels == -1).all()
    of_known = {tuple(image) for image in split.train.images(torch.arange(len(split.train))).flatten(1).tolist()}
    assert not of_known & {tuple(image) for image in digits.images(torch.arange(len(digits))).flatten(1).tolist()}
