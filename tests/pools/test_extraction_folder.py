"""The folder of an extraction: who may write to it, and a complete pool of which a shard is made anew."""

import os
import signal
import time

import pytest
import torch
from extractions import BATCH, SHARD, contents, folder_of, network, small

from oodkern.pools.extraction import Extraction
from oodkern.pools.store import FeatureStore, PoolError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("images") / "all", 37)


def test_a_complete_pool_whose_shard_is_made_anew(images, tmp_path):
    """With other bytes than before, as of another batch size; killed before the manifest says so, and after."""
    made = network()
    pool = tmp_path / "pool"
    small(made, images, pool, dtype="float32")
    before = contents(pool)
    damaged = bytearray(before["shard-00001.npy"])
    damaged[-1] ^= 1
    (pool / "shard-00001.npy").write_bytes(damaged)
    work = Extraction(made, images, pool, dtype="float32", shard_rows=SHARD, batch_size=1)
    work.writer.write(1, FeatureStore.open(pool, verify=False).rows(torch.arange(10, 20)) + 1, ["k"] * 10)
    work.writer.close()
    assert b'"complete": false' in (pool / "manifest.json").read_bytes()
    with pytest.raises(PoolError, match="the pool is not complete: 4 of 4 shards are there"):
        FeatureStore.open(pool)
    for manifest in ((pool / "manifest.json").read_bytes(), before["manifest.json"]):
        (pool / "manifest.json").write_bytes(manifest)
        again = Extraction(made, images, pool, dtype="float32", shard_rows=SHARD, batch_size=1)
        assert (again.missing, again.whole) == ([], False)
        again.run()
        assert FeatureStore.open(pool).keys(torch.arange(9, 12))[1:] == ["k"] * 2


def test_one_command_at_a_time(images, tmp_path):
    """Of whom the first holds the folder until it is done, fails or is killed."""
    made = network()
    first = Extraction(made, images, tmp_path / "pool", shard_rows=SHARD, batch_size=BATCH)
    half = tmp_path / "pool" / ".shard-00000.npy.1-2.tmp"
    half.write_bytes(b"half of one")
    message = f"^{tmp_path}/pool: another process is writing this pool$"
    with pytest.raises(PoolError, match=message):
        small(made, images, tmp_path / "pool")
    assert half.exists()
    first.run()
    assert not half.exists()
    with pytest.raises(PoolError, match="another plan"):
        small(made, images, tmp_path / "pool", source="elsewhere")
    small(made, images, tmp_path / "pool", workers=1)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        own = Extraction(made, images, tmp_path / "pool", shard_rows=SHARD)
        os.write(writer, b"-" if own.writer.lock is None else b"x")
        time.sleep(60)
        os._exit(0)
    assert os.read(reader, 1) == b"x"
    with pytest.raises(PoolError, match=message):
        small(made, images, tmp_path / "pool")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    held = Extraction(made, images, tmp_path / "pool", shard_rows=SHARD)
    child = os.fork()  # as a worker that outlives who started it
    if not child:
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    held.writer.close()
    try:
        small(made, images, tmp_path / "pool")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
