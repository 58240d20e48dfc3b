"""Features in Parquet and Arrow files: every way they are written, read a piece at a time."""

import gc
import sys

import numpy as np
import pytest
import torch
from stores import features_of, same
from test_formats import holds, message_of

from oodkern.pools import FeatureStore

pa = pytest.importorskip("pyarrow")
import pyarrow.feather as feather  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402

DTYPES = [torch.float16, torch.float32, torch.float64]
KINDS = ["parquet", "arrow", "stream", "compressed", "feather"]


def table_of(features, kind="fixed", **others):
    values = pa.array(features.numpy().reshape(-1))
    size = features.shape[1]
    if kind == "fixed":
        column = pa.FixedSizeListArray.from_arrays(values, size)
    else:
        offsets = np.arange(len(features) + 1) * size
        made = pa.LargeListArray if kind == "large" else pa.ListArray
        column = made.from_arrays(pa.array(offsets, pa.int64() if kind == "large" else pa.int32()), values)
    return pa.table({"label": pa.array(range(len(features))), "features": column, **others})


def write(folder, table, kind):
    """The file, in pieces of 10 rows."""
    path = folder / {"parquet": "a.parquet", "feather": "a.feather"}.get(kind, "a.arrow")
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=10)
    elif kind == "feather":
        feather.write_feather(table, str(path), compression="lz4", chunksize=10)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd" if kind == "compressed" else None)
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with new(str(path), table.schema, options=options) as file:
            file.write_table(table, max_chunksize=10)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lists", ["fixed", "plain", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_files(tmp_path, dtype, lists, kind):
    features = features_of(dtype)
    path = write(tmp_path, table_of(features, lists), kind)
    for options in ({}, {"name": "features"}, {"verify": False}):
        store = FeatureStore.open(path, **options)
        holds(store, features)
        assert [(shard.start, shard.number, shard.rows) for shard in store.shards] == [
            (0, 0, 10),
            (10, 10, 10),
            (20, 20, 10),
            (30, 30, 7),
        ]


@pytest.mark.parametrize("kind", ["arrow", "stream"])
def test_arrow_is_mapped(tmp_path, kind):
    features = features_of(torch.float32)
    store = FeatureStore.open(write(tmp_path, table_of(features), kind))
    before = pa.total_allocated_bytes()
    places = [chunk.data_ptr() for _, chunk in store.chunks()]
    assert pa.total_allocated_bytes() == before
    assert places == [chunk.data_ptr() for _, chunk in store.chunks()]
    assert max(places) - min(places) < 10_000, "in one file"


def test_one_row_group_is_in_memory(tmp_path):
    """Of 8 of 1 MB each, and nothing that Arrow's threads would still hold of those before it."""
    path = tmp_path / "a.parquet"
    parquet.write_table(table_of(torch.randn(8 * 4096, 64)), path, row_group_size=4096)
    gc.collect()
    before, held = pa.total_allocated_bytes(), []
    store = FeatureStore.open(path)
    for _, chunk in store.chunks(1000):
        held.append(pa.total_allocated_bytes() - before)
        assert len(chunk) <= 1000
    assert len(held) == 40
    assert 0.75 < min(held) / (1 << 20) <= max(held) / (1 << 20) < 1.25


@pytest.mark.parametrize("kind", KINDS)
def test_columns(tmp_path, kind):
    features = features_of(torch.float32)
    two = write(tmp_path, table_of(features, other=table_of(features + 1)["features"]), kind)
    assert message_of(two) == "expected one column of lists of floats, or its name, got 2 (features, other)"
    same(FeatureStore.open(two, name="other").rows(torch.arange(37)), features + 1)
    assert message_of(two, name="none") == "expected one column 'none', got 3 (label, features, other)"
    assert message_of(two, name="label") == "label: expected lists of float16, float32 or float64, got int64"
    assert message_of(two, name="other", dtype="float16") == "expected float16, got float32"
    none = write(tmp_path, pa.table({"a": [1, 2], "b": [[1], [2]]}), kind)
    assert message_of(none) == "expected one column of lists of floats, or its name, got none"


def damaged(lists, change):
    rows = features_of(torch.float32).tolist()
    change(rows)
    kind = pa.list_(pa.float32(), 5) if lists == "fixed" else pa.list_(pa.float32())
    return pa.table({"features": pa.array(rows, kind)})


def a_null(rows):
    rows[13] = None


def a_null_number(rows):
    rows[13][2] = None


def a_longer_one(rows):
    rows[13].append(1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lists", "change", "expected"),
    [
        ("fixed", a_null, "expected a list in every row, got 1 nulls"),
        ("plain", a_null, "expected a list in every row, got 1 nulls"),
        ("fixed", a_null_number, "expected numbers, got 1 nulls"),
        ("plain", a_null_number, "expected numbers, got 1 nulls"),
        ("plain", a_longer_one, "expected lists of 5 numbers each, got 5 to 6"),
    ],
)
def test_a_piece_is_no_features(tmp_path, kind, lists, change, expected):
    path = write(tmp_path, damaged(lists, change), kind)
    message = message_of(path)
    piece = "row group" if kind == "parquet" else "record batch"
    assert message == f"{piece} 1: features: {expected}"
    if kind == "stream":
        return
    store = FeatureStore.open(path, skip_damaged=True)
    assert store.skipped == (f"{path}: {message}",)
    there = torch.tensor([*range(10), *range(20, 37)])
    assert torch.equal(store.numbers(torch.arange(27)), there)
    same(torch.cat([chunk for _, chunk in store.chunks()]), features_of(torch.float32)[there])


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_damaged(tmp_path, kind):
    path = write(tmp_path, table_of(features_of(torch.float32)), kind)
    content = path.read_bytes()
    name = "Parquet" if kind == "parquet" else "Arrow"
    path.write_bytes(b"no such thing " * 10)
    assert message_of(path).startswith(f"not a readable {name} file (")
    path.write_bytes(content[: len(content) // 2])
    assert message_of(path).startswith((f"not a readable {name} file (", "record batch "))


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_no_rows(tmp_path, kind):
    path = write(tmp_path, table_of(features_of(torch.float32))[:0], kind)
    assert message_of(path) == "expected features, and there are no rows"


def test_a_compressed_stream(tmp_path):
    table = table_of(features_of(torch.float32))
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as file:
        file.write_table(table)
    assert message_of(path) == "a compressed stream, of which batches cannot be read alone: write a file of it"


def test_pyarrow_is_an_extra(tmp_path, monkeypatch):
    for kind in ("parquet", "arrow"):
        path = write(tmp_path, table_of(features_of(torch.float32)), kind)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ImportError, match=r"need pyarrow: pip install 'oodkern\[pool\]'"):
            FeatureStore.open(path)
        monkeypatch.undo()
