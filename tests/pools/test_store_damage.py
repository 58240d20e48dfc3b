"""What is wrong with a pool on disk: one line that names the file, and the rest of the pool stays usable."""

import io
import json
import os
import re

import numpy as np
import pytest
import torch
from stores import ROWS, SIZE, features_of, pool_of, same

from oodkern.data import DataError
from oodkern.pools import FeatureStore, PoolError

SECOND = "shard-00001.npy"


@pytest.fixture
def pool(tmp_path):
    head = torch.ones(3, SIZE), torch.ones(3)
    return pool_of(tmp_path / "pool", head=head)


def message_of(path, **options):
    with pytest.raises(PoolError) as raised:
        FeatureStore.open(path, **options)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, DataError)
    return str(raised.value)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


VALUES = np.ones((10, SIZE), np.float16)
FILES = {
    "missing": (lambda content: None, "no such file or directory"),
    "empty": (lambda content: b"", "not a readable .npy file"),
    "truncated": (lambda content: content[:-1], "truncated: expected 228 bytes, got 227"),
    "cut to its header": (lambda content: content[:100], "not a readable .npy file"),
    "longer": (lambda content: content + b"\0", "longer than it should be: expected 228 bytes, got 229"),
    "dtype": (lambda content: npy(VALUES.astype("f4")), "expected float16, as the manifest says, got float32"),
    "dtype of 16 bits": (lambda content: npy(VALUES.view("u2")), "expected float16, as the manifest says, got uint16"),
    "integers": (
        lambda content: npy(VALUES.view("i2")),
        "expected float16, float32 or float64, little-endian, got int16",
    ),
    "big-endian": (lambda content: npy(VALUES.astype(">f2")), "little-endian, got >f2"),
    "dimension": (
        lambda content: npy(VALUES.repeat(2, 1)),
        "expected the shape [10, 5], as the manifest says, got [10, 10]",
    ),
    "rows": (lambda content: npy(VALUES[1:]), "expected the shape [10, 5], as the manifest says, got [9, 5]"),
    "dimensions": (
        lambda content: npy(VALUES.reshape(-1)),
        "expected the shape [10, 5], as the manifest says, got [50]",
    ),
    "order": (
        lambda content: npy(np.asfortranarray(VALUES)),
        "expected rows one after another, in C order, got Fortran",
    ),
    "objects": (lambda content: npy(VALUES.astype(object), allow_pickle=True), "little-endian, got object"),
    "other file": (lambda content: b"PK\x03\x04" + content, "not a readable .npy file"),
    "header": (lambda content: header(b"{'descr': open('x'), 'shape': 1}\n"), "not a readable .npy file"),
    "header's shape": (
        lambda content: header(b"{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 5)}\n"),
        "not a readable .npy file (its header is damaged)",
    ),
    "version": (lambda content: b"\x93NUMPY\x03\x00" + content[8:], "not a readable .npy file"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("damage", FILES)
def test_a_shard_is_damaged(pool, damage, verify):
    """Each is found without checksums too, and without it the others are as they were."""
    change, expected = FILES[damage]
    path = pool / SECOND
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = message_of(pool, verify=verify)
    assert message.startswith(f"{path}: ")
    assert expected in message
    store = FeatureStore.open(pool, verify=verify, skip_damaged=True)
    assert store.skipped == (message,)
    there = torch.tensor([*range(10), *range(20, ROWS)])
    assert torch.equal(store.numbers(torch.arange(27)), there)
    assert [(shard.name[6:11], shard.start, shard.number, shard.rows) for shard in store.shards] == [
        ("00000", 0, 0, 10),
        ("00002", 10, 20, 10),
        ("00003", 20, 30, 7),
    ]
    same(torch.cat([chunk for _, chunk in store.chunks()]), features_of()[there])
    same(store.rows(torch.tensor([26, 10])), features_of()[[36, 20]])
    assert store.keys(torch.tensor([10])) == ["schlüssel\n20\udcff"]
    assert store.subset(torch.tensor([10])).numbers(torch.tensor([0])).tolist() == [20]


@pytest.mark.parametrize("name", [SECOND, "shard-00001.keys.jsonl"])
def test_a_flipped_bit(pool, name):
    content = bytearray((pool / name).read_bytes())
    content[-5] ^= 4
    (pool / name).write_bytes(content)
    message = message_of(pool)
    assert re.fullmatch(
        re.escape(f"{pool / name}: damaged: expected the SHA-256 ") + r"\w{12}\.\.\., got \w{12}\.\.\.", message
    )
    assert FeatureStore.open(pool, skip_damaged=True).skipped == (message,)
    assert len(FeatureStore.open(pool, verify=False)) == ROWS


def test_several_are_damaged(pool):
    for i in (0, 2, 3):
        (pool / f"shard-{i:05d}.npy").write_bytes(b"")
    assert message_of(pool).startswith(f"{pool / 'shard-00000.npy'}: ")
    store = FeatureStore.open(pool, skip_damaged=True)
    assert [line.split(": ")[0][-15:] for line in store.skipped] == [f"shard-{i:05d}.npy" for i in (0, 2, 3)]
    assert len(store) == 10
    (pool / SECOND).unlink()
    message = message_of(pool, skip_damaged=True)
    assert message.startswith(f"{pool}: none of 4 shards is whole; the first: {pool / 'shard-00000.npy'}: ")


@pytest.mark.parametrize("content", [b"", b"no json\n" * 10, b'"a"\n' * 9, b'"a"\n' * 9 + b'"a"', b"7\n" * 10, None])
def test_keys_are_damaged(pool, content):
    """Without checksums it shows where they are read."""
    path = pool / "shard-00001.keys.jsonl"
    path.unlink()
    if content is None:
        os.mkfifo(path)
        assert message_of(pool, verify=False) == f"{path}: expected a file, got a special file"
        return
    path.write_bytes(content)
    store = FeatureStore.open(pool, verify=False)
    assert store.keys(torch.tensor([0])) == ["schlüssel\n0\udcff"]
    with pytest.raises(PoolError) as raised:
        store.keys(torch.tensor([12]))
    assert str(raised.value).startswith(f"{path}: damaged: expected ")


def change_manifest(pool, change):
    path = pool / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


MANIFESTS = {
    "format": ({"format": 2}, "expected format 1, got 2: another version of oodkern wrote it"),
    "no format": ({"format": None}, "format: expected an integer, got None"),
    "complete": ({"complete": "yes"}, "complete: expected true or false, got 'yes'"),
    "shape": ({"shape": [37]}, "shape: expected [rows, dimension], both positive, got [37]"),
    "shape's type": ({"shape": [37, 5.0]}, "shape: expected [rows, dimension], both positive, got [37, 5.0]"),
    "no rows": ({"shape": [0, 5]}, "shape: expected [rows, dimension], both positive, got [0, 5]"),
    "dtype": ({"dtype": "int8"}, "dtype: expected one of float16, bfloat16, float32, got 'int8'"),
    "planned_rows": ({"planned_rows": 0}, "planned_rows: expected 1 at least, got 0"),
    "shard_rows": ({"shard_rows": True}, "shard_rows: expected an integer, got True"),
    "has_keys": ({"has_keys": 1}, "has_keys: expected true or false, got 1"),
    "facts": ({"facts": []}, "facts: expected an object, got []"),
    "head": ({"head": "head.safetensors"}, "head: expected an object, got 'head.safetensors'"),
    "shards": ({"shards": {}}, "shards: expected a list, got {}"),
    "shard": ({"shards": [7]}, "shards: expected objects, got 7"),
    "fewer": ({"planned_rows": 30}, "shards: expected 3 of 10 rows each, as 30 rows need, got 4"),
    "sum": ({"shape": [38, 5]}, "expected the shards' rows to sum to 38, as its shape says, got 37"),
    "smaller": ({"shard_rows": 11, "planned_rows": 44}, None),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_the_manifest_is_damaged(pool, case):
    """Always an error: what it says of the shards cannot be relied on."""
    changes, expected = MANIFESTS[case]
    path = change_manifest(pool, lambda content: content.update(changes))
    if expected is None:
        assert len(FeatureStore.open(pool)) == ROWS
        return
    for skip_damaged in (False, True):
        assert message_of(pool, skip_damaged=skip_damaged) == f"{path}: {expected}"


@pytest.mark.parametrize("key", ["format", "complete", "shape", "dtype", "planned_rows", "facts", "shards", "has_keys"])
def test_the_manifest_lacks_a_key(pool, key):
    path = change_manifest(pool, lambda content: content.pop(key))
    assert message_of(pool) == f"{path}: expected the key {key!r}, and there is none"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rows", 11, "shard-00001.npy: expected 10 rows at most, got 11"),
        ("rows", -1, "rows: expected 0 at least, got -1"),
        ("sha256", "ab", "sha256: expected 64 hexadecimal digits, got 'ab'"),
        ("keys_sha256", None, "keys_sha256: expected a string, got None"),
        ("keys", "shard-00001.npy", "shards: expected another file for each, got shard-00001.npy twice"),
        ("file", "shard-00002.npy", "shards: expected another file for each, got shard-00002.npy twice"),
        *[
            ("file", name, f"file: expected a plain name of a file in this folder, got {name!r}")
            for name in ("/etc/passwd", "../a.npy", "a/b.npy", "..", ".", "", "a\\b.npy", "a\0b")
        ],
        ("keys", "../keys", "keys: expected a plain name of a file in this folder, got '../keys'"),
    ],
)
def test_an_entry_of_the_manifest_is_damaged(pool, key, value, expected):
    path = change_manifest(pool, lambda content: content["shards"][1].update({key: value}))
    for skip_damaged in (False, True):
        assert message_of(pool, skip_damaged=skip_damaged) == f"{path}: {expected}"


def test_a_link_leads_out_of_the_folder(pool, tmp_path):
    """Also where what it leads to is what the manifest says; one within the folder, or of the folder, is none."""
    os.rename(pool / SECOND, tmp_path / "elsewhere.npy")
    (pool / SECOND).symlink_to(tmp_path / "elsewhere.npy")
    for skip_damaged in (False, True):
        message = message_of(pool, skip_damaged=skip_damaged)
        assert message == f"{pool / 'manifest.json'}: file: {SECOND} is a link that leads out of this folder"
    os.rename(tmp_path / "elsewhere.npy", pool / "inside.npy")
    (pool / SECOND).unlink()
    (pool / SECOND).symlink_to("inside.npy")
    (tmp_path / "link").symlink_to(pool)
    assert len(FeatureStore.open(tmp_path / "link")) == ROWS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "not readable JSON (JSONDecodeError: "),
        (b"\xff", "not readable JSON (UnicodeDecodeError: "),
        (b"[" * 200_000, "not readable JSON (RecursionError"),
        (b"[]", "expected a JSON object, got list"),
    ],
)
def test_the_manifest_is_no_manifest(pool, content, expected):
    (pool / "manifest.json").write_bytes(content)
    assert message_of(pool).startswith(f"{pool / 'manifest.json'}: {expected}")


def test_there_is_no_manifest(tmp_path):
    assert (
        message_of(tmp_path)
        == f"{tmp_path}: expected a pool that `oodkern extract` wrote, and there is no manifest.json"
    )
    assert message_of(tmp_path / "none") == f"{tmp_path / 'none'}: no such file or folder"
    (tmp_path / "manifest.json").mkdir()
    assert message_of(tmp_path) == f"{tmp_path / 'manifest.json'}: expected a file, got a folder"


def test_the_head_is_damaged(pool):
    path = pool / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert message_of(pool, verify=False).startswith(f"{path}: damaged: expected the SHA-256 ")
    path.unlink()
    assert message_of(pool) == f"{path}: no such file or directory"


def test_arguments(pool):
    assert message_of(pool, dtype="bfloat16") == f"{pool}: expected bfloat16, got float16"
    with pytest.raises(ValueError, match="dtype: expected one of float16, bfloat16, float32, float64, got 'half'"):
        FeatureStore.open(pool, dtype="half")
    with pytest.raises(ValueError, match=r"name: expected none for .*pool, which holds features alone, got 'a'"):
        FeatureStore.open(pool, name="a")
