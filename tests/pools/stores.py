"""Pools that tests write: 37 rows of 5 features in shards of 10, with keys."""

import torch

from oodkern.pools import StoreWriter

ROWS, SIZE, SHARD = 37, 5, 10


def features_of(dtype=torch.float16):
    made = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    made[3, 1], made[20, 0], made[36, 4] = float("nan"), float("inf"), -0.0
    return made


def writer_of(folder, dtype="float16", **options):
    given = {"rows": ROWS, "dimension": SIZE, "dtype": dtype, "shard_rows": SHARD, "keys": True, **options}
    return StoreWriter(folder, **given)


def fill(writer, features, shards=None):
    for shard in range(writer.shards) if shards is None else shards:
        rows = range(shard * SHARD, min((shard + 1) * SHARD, len(features)))
        writer.write(shard, features[rows.start : rows.stop], [f"schlüssel\n{i}\udcff" for i in rows])


def pool_of(folder, features=None, **options):
    features = features_of() if features is None else features
    writer = writer_of(folder, str(features.dtype).removeprefix("torch."), **options)
    fill(writer, features)
    writer.finish()
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(found, expected):
    """Bit by bit, NaN and the sign of zero included."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
