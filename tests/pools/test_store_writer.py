"""Writing a pool: shards that lack rows, going on, other plans, and processes at once."""

import json
import multiprocessing

import pytest
import torch
from stores import ROWS, SIZE, contents, features_of, fill, pool_of, same, writer_of

from oodkern.pools import FeatureStore, PoolError
from oodkern.pools.folders import replacing


def test_a_shard_may_lack_rows(tmp_path):
    """Images that cannot be read have no features: shards are shorter than planned, down to none at all."""
    features = features_of()
    writer = writer_of(tmp_path)
    fill(writer, features, [0, 3])
    writer.write(1, features[11:19], [str(i) for i in range(11, 19)])
    writer.write(2, features[:0], [])
    assert all(writer.done(shard) for shard in range(4))
    writer.finish()
    pool = FeatureStore.open(tmp_path)
    there = torch.tensor([*range(10), *range(11, 19), *range(30, 37)])
    same(torch.cat([chunk for _, chunk in pool.chunks()]), features[there])
    assert [shard.number for shard in pool.shards] == [0, 10, 18]
    assert pool.keys(torch.tensor([10, 18])) == ["11", "schlüssel\n30\udcff"]


def test_going_on_makes_what_is_missing(tmp_path):
    """A shard counts when its file, its keys and what is beside them agree; the bytes are an undisturbed one's."""
    features = features_of()
    whole = contents(pool_of(tmp_path / "whole"))
    folder = tmp_path / "pool"
    fill(writer_of(folder), features, [0, 1, 3])
    assert [writer_of(folder).done(shard) for shard in range(4)] == [True, True, False, True]
    with pytest.raises(PoolError, match=r"pool: 1 of 4 shards are missing, the first is shard-00002.npy$"):
        writer_of(folder).finish()
    message = f"{folder}: the pool is not complete: 3 of 4 shards are there; the same `oodkern extract` command goes on"
    with pytest.raises(PoolError) as raised:
        FeatureStore.open(folder)
    assert str(raised.value) == message
    flipped = bytearray((folder / "shard-00000.npy").read_bytes())
    flipped[-3] ^= 1
    (folder / "shard-00000.npy").write_bytes(flipped)
    (folder / "shard-00001.keys.jsonl").write_bytes(b"")
    (folder / "shard-00003.json").unlink()
    (folder / ".shard-00002.npy.1-2.tmp").write_bytes(b"half of one")
    writer = writer_of(folder)
    assert not writer.complete
    assert [writer.done(shard) for shard in range(4)] == [False] * 4
    fill(writer, features)
    writer.finish()
    assert writer.complete
    assert contents(folder) == whole
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = writer_of(folder)
    assert all(again.done(shard) for shard in range(4))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_another_plan_is_told(tmp_path):
    about = {"fingerprint": "ab", "source": "s", "facts": {"a": [1, 2], "b": "x"}, "head": (torch.ones(2, SIZE), None)}
    before = contents(pool_of(tmp_path, **about))
    others = {
        "rows": 36,
        "dimension": 4,
        "dtype": "float32",
        "shard_rows": 9,
        "keys": False,
        "fingerprint": "cd",
        "source": "t",
        "facts": {"a": [1, 3], "b": "x"},
        "head": None,
    }
    said = {
        "rows": "shape: ",
        "dimension": "shape: ",
        "keys": "has_keys: ",
        "facts": r"facts.a: \[1, 2\], not \[1, 3\]",
    }
    for name, value in others.items():
        given = {**about, name: value} if name != "dimension" else {**about, name: value, "head": None}
        with pytest.raises(PoolError, match=rf"holds a pool of another plan: {said.get(name, f'{name}: ')}"):
            writer_of(tmp_path, **given)
    assert contents(tmp_path) == before
    # Shards beside the manifest of another plan are not its own.
    other = {**about, "fingerprint": "cd"}
    writer_of(tmp_path / "other", **other)
    (tmp_path / "other" / "manifest.json").replace(tmp_path / "manifest.json")
    assert not any(map(writer_of(tmp_path, **other).done, range(4)))


def test_where_the_model_lay_is_no_part_of_the_plan(tmp_path):
    features = features_of()
    fill(writer_of(tmp_path, facts={"run": "/a", "checkpoint": "last", "b": 1}), features, [0, 1])
    writer = writer_of(tmp_path, facts={"b": 1, "run": "/elsewhere", "checkpoint": "best"})
    assert [writer.done(shard) for shard in range(4)] == [True, True, False, False]
    fill(writer, features, [2, 3])
    writer.finish()
    assert FeatureStore.open(tmp_path).facts == {"run": "/a", "checkpoint": "last", "b": 1}
    with pytest.raises(PoolError, match=r"another plan: facts.b: 1, not 2$"):
        writer_of(tmp_path, facts={"run": "/a", "b": 2})


def test_a_folder_of_other_files_is_refused(tmp_path):
    message = f"^{tmp_path}: expected a new or empty folder, or a pool, and it has other files$"
    (tmp_path / "last.ckpt").touch()
    for exclusive in (False, True):
        with pytest.raises(PoolError, match=message):
            writer_of(tmp_path, exclusive=exclusive)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    (tmp_path / "last.ckpt").rename(tmp_path / ".hidden")
    writer_of(tmp_path)
    assert (tmp_path / "manifest.json").exists()


def test_a_shard_that_is_written_anew_opens_the_pool_again(tmp_path):
    """A manifest with its old checksum would be that of a damaged one."""
    features = features_of()
    pool_of(tmp_path)
    writer = writer_of(tmp_path)
    assert writer.complete
    writer.write(2, features[20:29], ["k"] * 9)
    assert not writer.complete
    with pytest.raises(PoolError, match="the pool is not complete: 4 of 4 shards are there"):
        FeatureStore.open(tmp_path)
    writer.finish()
    assert writer.complete
    assert len(FeatureStore.open(tmp_path)) == 36
    writer.write(2, features[20:30], ["k"] * 10)
    assert not writer.complete


def test_a_lost_head_is_written_again(tmp_path):
    about = {"head": (torch.ones(2, SIZE), None)}
    before = contents(pool_of(tmp_path, **about))
    (tmp_path / "head.safetensors").unlink()
    writer_of(tmp_path, **about)
    assert contents(tmp_path) == before


def test_arguments_of_a_writer(tmp_path):
    for options, message in (
        ({"rows": 0}, "rows: expected 1 at least, got 0"),
        ({"dimension": 0}, "dimension: expected 1 at least"),
        ({"shard_rows": -1}, "shard_rows: expected 1 at least"),
        ({"dtype": "float64"}, "dtype: expected one of float16, bfloat16, float32, got 'float64'"),
        ({"facts": {"a": torch.ones(1)}}, "facts: expected plain values"),
    ):
        with pytest.raises(ValueError, match=message):
            writer_of(tmp_path / "pool", **options)
    with pytest.raises(PoolError, match="expected the plan that the first process writes, and there is none"):
        writer_of(tmp_path / "pool", first=False)
    assert not (tmp_path / "pool").exists()
    (tmp_path / "file").touch()
    with pytest.raises(PoolError, match="file: File exists"):
        writer_of(tmp_path / "file")
    writer, features = writer_of(tmp_path / "pool"), features_of()
    writer_of(tmp_path / "pool", first=False).write(3, features[30:], ["k"] * 7)
    assert writer.done(3)
    for given, message in (
        ((0, features[:11], ["k"] * 11), r"features: expected \[n, 5\], n at most 10, got \[11, 5\]"),
        ((0, features[:, :4], ["k"]), r"features: expected \[n, 5\]"),
        ((0, features[:2].float(), ["k"] * 2), "features: expected float16, got float32"),
        ((0, features[:2], ["k"]), "keys: expected 2, got 1"),
        ((0, features[:2], None), "keys: expected 2, got none"),
        ((4, features[:2], ["k"] * 2), "shard: expected 0 to 3, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(*given)
    for shard in range(4):
        writer.write(shard, features[:0], [])
    with pytest.raises(PoolError, match="expected rows in one shard at least, and all 4 are empty"):
        writer.finish()


def work(folder, features, rank):
    fill(writer_of(folder), features, range(rank, 4, 2))


def test_processes_share_a_folder(tmp_path):
    """Started at once, each makes the plan where it is not there yet, and writes its own shards."""
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=work, args=(tmp_path / "two", features_of(), rank)) for rank in range(2)]
    for one in started:
        one.start()
    for one in started:
        one.join(60)
    assert [one.exitcode for one in started] == [0, 0]
    writer_of(tmp_path / "two").finish()
    assert contents(tmp_path / "two") == contents(pool_of(tmp_path / "one"))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def interrupted():
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_plain_json(tmp_path):
    found = json.loads((pool_of(tmp_path, facts={"a": 1}) / "manifest.json").read_text())
    assert (found["format"], found["complete"], found["shape"], found["dtype"]) == (1, True, [ROWS, SIZE], "float16")
    assert [(one["file"], one["rows"], one["keys"]) for one in found["shards"]] == [
        (f"shard-{i:05d}.npy", rows, f"shard-{i:05d}.keys.jsonl") for i, rows in enumerate((10, 10, 10, 7))
    ]
