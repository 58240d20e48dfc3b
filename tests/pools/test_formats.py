"""Plain files of features: .npy and .safetensors, and what is wrong with them."""

import json
import struct
import warnings

import numpy as np
import pytest
import torch
from stores import features_of, same

from oodkern.pools import FeatureStore, PoolError
from oodkern.pools.formats import read_safetensors, safetensors_bytes

DTYPES = [torch.float16, torch.float32, torch.float64]
ALL = [*DTYPES, torch.bfloat16]


def message_of(path, **options):
    with pytest.raises(PoolError) as raised:
        FeatureStore.open(path, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def holds(store, features):
    """Every way to read it."""
    assert (len(store), store.dimension, store.dtype) == (*features.shape, features.dtype)
    same(torch.cat([chunk for _, chunk in store.chunks(7)]), features)
    same(torch.cat([chunk for _, chunk in store.chunks(7, 8, 31)]), features[8:31])
    indices = torch.tensor([30, 2, 2, 36, 20, 15])
    same(store.rows(indices), features[indices])
    chosen = torch.tensor([1, 9, 10, 36])
    same(torch.cat([chunk for _, chunk in store.subset(chosen).chunks(2)]), features[chosen])
    assert torch.equal(store.numbers(indices), indices)
    assert (store.has_keys, store.head, store.facts, store.source, store.fingerprint) == (False, None, {}, "", "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_npy(tmp_path, dtype):
    features = features_of(dtype)
    path = tmp_path / "features.npy"
    np.save(path, features.numpy())
    holds(FeatureStore.open(path), features)
    holds(FeatureStore.open(str(path), dtype=str(dtype).removeprefix("torch.")), features)
    assert message_of(path, dtype="bfloat16") == f"expected bfloat16, got {str(dtype).removeprefix('torch.')}"


def test_npy_of_bfloat16(tmp_path):
    features = features_of(torch.bfloat16)
    path = tmp_path / "features.npy"
    np.save(path, features.view(torch.uint16).numpy())
    holds(FeatureStore.open(path, dtype="bfloat16"), features)
    assert message_of(path) == 'expected floating-point numbers, got uint16; dtype="bfloat16" says it holds these'


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones(5, "f4"), "expected features [N, D], both positive, got [5]"),
        (np.ones((2, 3, 4), "f4"), "expected features [N, D], both positive, got [2, 3, 4]"),
        (np.ones((0, 4), "f4"), "expected features [N, D], both positive, got [0, 4]"),
        (np.ones((4, 0), "f4"), "expected features [N, D], both positive, got [4, 0]"),
        (np.ones((3, 4), "i8"), "expected float16, float32 or float64, little-endian, got int64"),
        (np.ones((3, 4), ">f4"), "expected float16, float32 or float64, little-endian, got >f4"),
        (np.ones((3, 4), "c8"), "expected float16, float32 or float64, little-endian, got complex64"),
        (np.ones((3, 4), "f4", order="F"), "expected rows one after another, in C order, got Fortran order"),
        (np.ones((3, 4), object), "expected float16, float32 or float64, little-endian, got object"),
    ],
)
def test_npy_of_something_else(tmp_path, array, expected):
    path = tmp_path / "features.npy"
    np.save(path, array)
    assert message_of(path) == expected


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "features.npz"
    np.savez(path, np.ones((3, 4), np.float32))
    kinds = ".npy, .safetensors, .parquet, .arrow, .feather"
    assert message_of(path) == f"expected a folder that `oodkern extract` wrote, or a file of features ({kinds})"
    for suffix in kinds.split(", "):
        path = tmp_path / f"empty{suffix}"
        path.touch()
        assert message_of(path) == "expected features, and the file is empty"
        assert message_of(tmp_path / f"none{suffix}") == "no such file or folder"


@pytest.mark.parametrize("dtype", ALL)
def test_safetensors(tmp_path, dtype):
    """As the format's own library writes it, and as that reads what is written here."""
    library = pytest.importorskip("safetensors.torch")
    features = features_of(dtype)
    path = tmp_path / "features.safetensors"
    library.save_file({"labels": torch.arange(37), "features": features}, path, metadata={"a": "b"})
    holds(FeatureStore.open(path), features)
    holds(FeatureStore.open(path, name="features"), features)
    assert message_of(path, name="other") == "expected a tensor 'other', got 2 (labels, features)"
    assert message_of(path, name="labels") == "labels: expected one of F16, BF16, F32, F64, got I64"
    path.write_bytes(safetensors_bytes({"features": features, "bias": features[0]}))
    found = library.load_file(path)
    same(found["features"], features)
    same(found["bias"], features[0])
    assert sorted(read_safetensors(path)) == ["bias", "features"]
    same(read_safetensors(path)["features"], features)
    assert message_of(path, name="bias") == "bias: expected features [N, D], both positive, got [5]"
    path.write_bytes(safetensors_bytes({"a": features, "b": features}))
    assert message_of(path) == "expected one tensor [N, D], or its name, got 2 (a, b)"
    path.write_bytes(safetensors_bytes({}))
    assert message_of(path) == "expected one tensor [N, D], or its name, got none"


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("spaces", range(3))
def test_safetensors_at_any_byte(tmp_path, dtype, spaces):
    """Headers of any length are allowed, and numbers then lie where a tensor cannot."""
    content = safetensors_bytes({"features": features_of(dtype)})
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(json.loads(content[8 : 8 + length])).encode() + b" " * spaces
    path = tmp_path / "features.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    holds(FeatureStore.open(path), features_of(dtype))


def entry(**changes):
    return {"features": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (entry(data_offsets=[0, 20]), "'features': expected dtype, shape and data_offsets that agree"),
        (entry(data_offsets=[24, 0]), "'features': expected dtype, shape and data_offsets that agree"),
        (entry(data_offsets=[-4, 20]), "'features': expected dtype, shape and data_offsets that agree"),
        (entry(data_offsets=[0, 24.0]), "'features': expected dtype, shape and data_offsets that agree"),
        (entry(shape=[-2, -3]), "'features': expected dtype, shape and data_offsets that agree"),
        (entry(shape=6), "'features': expected dtype, shape and data_offsets that agree"),
        ({"features": {"dtype": "F32"}}, "'features': expected dtype, shape and data_offsets that agree"),
        ({"features": 1}, "'features': expected dtype, shape and data_offsets that agree"),
        (entry(data_offsets=[24, 48]), "truncated: expected 131 bytes, got 107"),
        (entry(data_offsets=[10**18, 10**18 + 24]), "truncated: expected 1,000,000,000,000,000,1"),
        (entry(shape=[2, 2], data_offsets=[0, 16]), "longer than it should be: expected 98 bytes, got 106"),
        (entry(dtype="I32"), "features: expected one of F16, BF16, F32, F64, got I32"),
        ([1], "not a readable .safetensors file (the header is no object)"),
    ],
)
def test_safetensors_with_another_header(tmp_path, header, expected):
    text = json.dumps(header).encode()
    path = tmp_path / "features.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    message = message_of(path)
    if "bytes" in expected or "," in expected:
        expected = expected.split("expected")[0]
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"abc", "not a readable .safetensors file (no header)"),
        (struct.pack("<Q", 2**63) + b"{}", "not a readable .safetensors file (no header)"),
        (struct.pack("<Q", 3) + b"{}", "not a readable .safetensors file (no header)"),
        (struct.pack("<Q", 3) + b"{a}", "not a readable .safetensors file (JSONDecodeError: "),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "not a readable .safetensors file (RecursionError"),
    ],
)
def test_safetensors_without_a_header(tmp_path, content, expected):
    path = tmp_path / "features.safetensors"
    path.write_bytes(content)
    assert message_of(path).startswith(expected)


def test_files_are_truncated(tmp_path):
    features = features_of(torch.float32)
    np.save(tmp_path / "a.npy", features.numpy())
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes({"a": features}))
    for path in (tmp_path / "a.npy", tmp_path / "a.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert message_of(path) == f"truncated: expected {len(content)} bytes, got {len(content) - 1}"
        path.write_bytes(content + b"\0")
        assert message_of(path) == f"longer than it should be: expected {len(content)} bytes, got {len(content) + 1}"


def test_a_file_larger_than_the_kernel_maps_copy_on_write(tmp_path, monkeypatch):
    """The map is read-only there, and says nothing about it."""

    def refused(*args, **options):
        raise RuntimeError("unable to mmap 1 bytes from file: Cannot allocate memory (12)")

    features = features_of()
    np.save(tmp_path / "a.npy", features.numpy())
    monkeypatch.setattr(torch, "from_file", refused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = FeatureStore.open(tmp_path / "a.npy")
    holds(store, features)


def test_npy_of_each_version(tmp_path):
    """3.0 has names of fields in UTF-8, which plain numbers have none of."""
    features = features_of(torch.float32)
    for version in ((1, 0), (2, 0), (3, 0)):
        with open(tmp_path / "a.npy", "wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.lib.format.write_array(file, features.numpy(), version=version)
        holds(FeatureStore.open(tmp_path / "a.npy"), features)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:6] + b"\4" + content[7:])
    assert message_of(tmp_path / "a.npy") == "not a readable .npy file (version 4.0 of the format)"
