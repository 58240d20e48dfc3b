"""What is kept of a tar: made of whole ones alone, and made anew where the tar is another."""

import io
import itertools
import os

import numpy as np
import pytest
from formats import sample, write_tar

from oodkern.data import DataError, tar_index
from oodkern.data.shards import read_shards
from oodkern.data.tar_index import index_of


def test_damaged_tars_are_named(tmp_path):
    write_tar(tmp_path / "good.tar", sample("a", 1) + sample("b", 2))
    good = (tmp_path / "good.tar").read_bytes()
    second = good.index(b"b.cls")
    for content, reason in (
        (b"no tar at all" * 100, "not a readable uncompressed tar file"),
        (b"", "not a readable uncompressed tar file"),
        (good[: second + 600], "not a readable uncompressed tar file .*unexpected end of data"),
        (good[: second + 300], "not a readable uncompressed tar file .*damaged header"),
        (
            good[:second] + b"\xff" * 512 + good[second + 512 :],
            f"not a readable uncompressed tar file .*damaged header at byte {second:,}",
        ),
    ):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"bad\.tar: {reason}") as caught:
            read_shards(f"{tmp_path}/*.tar")
        assert "\n" not in str(caught.value)
    write_tar(tmp_path / "bad.tar", sample("a", 1), mode="w:gz")
    with pytest.raises(DataError, match=r"bad\.tar: not a readable uncompressed tar file"):
        read_shards(str(tmp_path / "bad.tar"))
    for files, reason in (
        ([("a.txt", b"1")], "expected samples with an image .*, found none"),
        (sample("a", "cat"), r"a\.cls: expected an integer, got b'cat'"),
        ([*sample("a"), ("a.json", b"{")], r"a\.json: not readable"),
        ([*sample("a"), *sample("a")], "expected one png of each sample, got two of a"),
    ):
        write_tar(tmp_path / "bad.tar", files)
        with pytest.raises(DataError, match=rf"bad\.tar: {reason}"):
            read_shards(str(tmp_path / "bad.tar"))


def test_an_index_is_kept_while_the_tar_is_as_it_was(tmp_path, monkeypatch):
    path, kept = tmp_path / "a.tar", tmp_path / "a.tar.index.npz"
    write_tar(path, sample("a", 1) + sample("b", 2))
    before = index_of(path)
    assert [one.name for one in tmp_path.iterdir() if one != path] == [kept.name], "no temporary file is left"
    monkeypatch.setattr("oodkern.data.tar_index.read_index", lambda path: pytest.fail("made again"))
    assert all(np.array_equal(a, b) for a, b in zip(before, index_of(path), strict=True))
    monkeypatch.undo()
    for content in (b"", kept.read_bytes()[:100], b"PK"):
        kept.write_bytes(content)
        assert index_of(path).integers.tolist() == [1, 2]
    write_tar(path, sample("c", 5) + sample("d", 6))  # of the same size
    os.utime(path, ns=(0, 10**18))
    assert index_of(path).integers.tolist() == [5, 6]


def test_an_index_beside_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """It goes to the user's cache; where there is none either, it is made each time."""
    write_tar(tmp_path / "a.tar", sample("a", 1))
    beside, inside = tmp_path / "no" / "folder", tmp_path / "cache"
    beside.parent.write_bytes(b"a file, so that no folder can be made")
    monkeypatch.setenv("XDG_CACHE_HOME", str(inside))
    files = tar_index.cache_files(tmp_path / "a.tar")
    assert files[1].parent == inside / "oodkern" / "tar_index"
    monkeypatch.setattr(tar_index, "cache_files", lambda path: [beside, files[1]])
    index_of(tmp_path / "a.tar")
    assert files[1].is_file()
    monkeypatch.setattr(tar_index, "cache_files", lambda path: [beside])
    assert index_of(tmp_path / "a.tar").integers.tolist() == [1]


def test_a_tar_within_bounds_of_memory(tmp_path):
    """32 bytes a sample, whatever its names are."""
    write_tar(tmp_path / "a.tar", itertools.chain(*(sample(f"{'k' * 60}{i:04d}", i) for i in range(50))))
    index = index_of(tmp_path / "a.tar")
    assert sum(one.nbytes for one in index) == 50 * 32
    buffer = io.BytesIO((tmp_path / "a.tar.index.npz").read_bytes())
    assert np.load(buffer, allow_pickle=False)["rows"].shape == (4, 50)
