"""A pool on disk: what is written is what is read, and reading takes no memory."""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from stores import ROWS, SHARD, SIZE, features_of, pool_of, same

from oodkern.pools import CHUNK_ROWS, FeatureStore, PoolError, StoreWriter

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_is_exact(tmp_path, dtype):
    features = features_of(dtype)
    head = torch.randn(3, SIZE), torch.randn(3)
    about = {"fingerprint": "ab", "source": "images", "facts": {"classes": ("a", "b"), "threshold": -1.5}, "head": head}
    pool = FeatureStore.open(pool_of(tmp_path / "a" / "pool", features, **about))
    assert (len(pool), pool.dimension, pool.dtype, pool.path) == (ROWS, SIZE, dtype, tmp_path / "a" / "pool")
    assert [(shard.name, shard.start, shard.number, shard.rows) for shard in pool.shards] == [
        (f"shard-{i:05d}.npy", 10 * i, 10 * i, rows) for i, rows in enumerate((10, 10, 10, 7))
    ]
    assert [shard.path for shard in pool.shards] == [pool.path / shard.name for shard in pool.shards]
    same(torch.cat([chunk for _, chunk in pool.chunks()]), features)
    indices = torch.randint(0, ROWS, (200,))
    same(pool.rows(indices), features[indices])
    assert pool.keys(indices) == [f"schlüssel\n{i}\udcff" for i in indices.tolist()]
    assert torch.equal(pool.numbers(indices), indices)
    assert (pool.fingerprint, pool.source, pool.skipped) == ("ab", "images", ())
    assert pool.facts == {"classes": ["a", "b"], "threshold": -1.5}
    same(pool.head[0], head[0])
    same(pool.head[1], head[1])


def test_heads_of_each_kind(tmp_path):
    assert FeatureStore.open(pool_of(tmp_path / "none")).head is None
    weight = torch.randn(2, SIZE, dtype=torch.float64)
    found = FeatureStore.open(pool_of(tmp_path / "no bias", head=(weight, None))).head
    same(found[0], weight)
    assert found[1] is None
    safetensors = pytest.importorskip("safetensors.torch")
    same(safetensors.load_file(tmp_path / "no bias" / "head.safetensors")["weight"], weight)
    with pytest.raises(ValueError, match=r"head: expected a weight \[K, 5\] and a bias \[K\] or None"):
        pool_of(tmp_path / "other", head=(weight[:, 1:], None))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("rows", [1, 3, 10, CHUNK_ROWS])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 0), (9, 11), (10, 30), (12, 13), (36, 37), (37, 37)])
def test_chunks_end_where_shards_do(tmp_path, rows, start, stop):
    features = features_of()
    pool = FeatureStore.open(pool_of(tmp_path, features))
    seen = start
    for offset, chunk in pool.chunks(rows, start, stop):
        assert offset == seen
        assert 0 < len(chunk) <= rows
        assert offset // SHARD == (offset + len(chunk) - 1) // SHARD
        same(chunk, features[offset : offset + len(chunk)])
        seen += len(chunk)
    assert seen == (ROWS if stop is None else stop)


def test_chunks_are_views_of_the_file(tmp_path):
    """Two chunks of the same rows lie at one place, and of neighbouring ones side by side."""
    pool = FeatureStore.open(pool_of(tmp_path))
    (_, first), (_, second) = list(pool.chunks(5, 10, 20))
    assert second.data_ptr() - first.data_ptr() == 5 * SIZE * 2
    assert next(pool.chunks(4, 10))[1].data_ptr() == first.data_ptr()
    assert first.is_contiguous()
    copied = pool.rows(torch.arange(10, 15))
    copied.zero_()
    assert not torch.equal(pool.rows(torch.arange(10, 15)), copied)


def anonymous():
    """MB of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_takes_no_memory(tmp_path):
    """Of 64 MB in 4 shards; nor a file descriptor for each shard."""
    writer = StoreWriter(tmp_path, rows=1 << 18, dimension=128, dtype="bfloat16", shard_rows=1 << 16)
    features = torch.randn(1 << 16, 128).bfloat16()
    for shard in range(4):
        writer.write(shard, features)
    writer.finish()
    expected = 4 * int((features.view(torch.int64) & 1).sum())
    files, before = len(os.listdir("/proc/self/fd")), anonymous()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = FeatureStore.open(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == files
    assert sum(int((chunk.view(torch.int64) & 1).sum()) for _, chunk in pool.chunks(8192)) == expected
    assert anonymous() - before < 16


def test_rows_out_of_range(tmp_path):
    pool = FeatureStore.open(pool_of(tmp_path))
    for call in (pool.rows, pool.keys, pool.numbers, pool.subset):
        with pytest.raises(ValueError, match="indices: expected rows of 37, 0 to 36, got 37"):
            call(torch.tensor([3, 37]))
        with pytest.raises(ValueError, match="indices: expected rows of 37, 0 to 36, got -1"):
            call(torch.tensor([-1]))
        with pytest.raises(ValueError, match=r"indices: expected int64 \[n\], got int32 \[1\]"):
            call(torch.tensor([1], dtype=torch.int32))
        with pytest.raises(ValueError, match=r"indices: expected int64 \[n\], got bool \[37\]"):
            call(torch.arange(37) > 5)
    none = torch.zeros(0, dtype=torch.int64)
    assert (pool.rows(none).shape, pool.keys(none), len(pool.numbers(none)), len(pool.subset(none))) == (
        (0, 5),
        [],
        0,
        0,
    )
    for options in ({"rows": 0}, {"start": 3, "stop": 2}, {"start": -1}, {"stop": 38}):
        with pytest.raises(ValueError, match="expected"):
            pool.chunks(**options)


def test_a_subset_is_a_store(tmp_path):
    features = features_of()
    pool = FeatureStore.open(pool_of(tmp_path, features, source="s", facts={"a": 1}))
    chosen = torch.tensor([0, 3, 9, 11, 28, 29, 36])
    some = pool.subset(chosen)
    assert (len(some), some.dimension, some.dtype, some.source, some.facts) == (7, SIZE, pool.dtype, "s", {"a": 1})
    assert [(shard.start, shard.number, shard.rows) for shard in some.shards] == [
        (0, 0, 3),
        (3, 11, 1),
        (4, 28, 2),
        (6, 36, 1),
    ]
    assert [(offset, len(chunk)) for offset, chunk in some.chunks(2)] == [(0, 2), (2, 1), (3, 1), (4, 2), (6, 1)]
    same(torch.cat([chunk for _, chunk in some.chunks(2)]), features[chosen])
    same(torch.cat([chunk for _, chunk in some.chunks(2, 2, 5)]), features[chosen[2:5]])
    indices = torch.tensor([6, 0, 3, 3])
    same(some.rows(indices), features[chosen[indices]])
    assert torch.equal(some.numbers(indices), chosen[indices])
    assert some.keys(indices) == pool.keys(chosen[indices])
    of_it = some.subset(torch.tensor([1, 4]))
    same(of_it.rows(torch.tensor([0, 1])), features[[3, 28]])
    assert of_it.numbers(torch.tensor([0, 1])).tolist() == [3, 28]
    for wrong in ([3, 3], [4, 3]):
        with pytest.raises(ValueError, match="indices: expected ascending rows, each once"):
            pool.subset(torch.tensor(wrong))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_tensor_as_a_store(dtype):
    features = features_of(dtype)
    pool = FeatureStore.of(features)
    assert (len(pool), pool.dimension, pool.dtype, pool.has_keys, pool.head) == (ROWS, SIZE, dtype, False, None)
    (offset, chunk), *rest = pool.chunks()
    assert (offset, chunk.data_ptr(), rest) == (0, features.data_ptr(), [])
    same(pool.rows(torch.tensor([36, 0])), features[[36, 0]])
    with pytest.raises(PoolError, match="expected a pool with keys of its rows, and it has none"):
        pool.keys(torch.tensor([0]))
    for wrong in (features[0], torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"features: expected \[N, D\] of float16, bfloat16, float32, float64, got"
        ):
            FeatureStore.of(wrong)
