"""Banks of outliers on disk, whole and damaged."""

import sys

import numpy as np
import pytest
import torch

from oodkern.data import DataError
from oodkern.synthesis import read_bank, write_bank


@pytest.fixture(params=[".npy", ".safetensors"])
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    return tmp_path / f"bank{request.param}"


def write(path, tensor, name="latents", **others):
    """Any tensor, as other programs write it."""
    if path.suffix == ".npy":
        np.save(path, tensor.numpy())
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous(), **others}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_is_written_is_read(path, dtype):
    latents = torch.randn(7, 5).T.to(dtype).requires_grad_()
    for attempt in (latents + 1, latents):  # written over
        write_bank(str(path), attempt)
    bank = read_bank(str(path))
    assert bank.dtype == torch.float32
    assert torch.equal(bank, latents.detach().float())
    assert [file.name for file in path.parent.iterdir()] == [path.name], "temporary files are gone"


def test_latents_of_images_are_averaged(path):
    latents = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    write(path, latents)
    torch.testing.assert_close(read_bank(path), latents.mean((1, 2)).float())
    write(path, latents[:, 0])
    torch.testing.assert_close(read_bank(path), latents[:, 0].mean(1).float())


def test_the_released_bank_reshaped(path):
    """As the error says: each latent is one outlier, as OAL's trainer has them."""
    released = torch.randn(10, 3, 64, 64)
    write(path, released.reshape(30, 64, 64))
    torch.testing.assert_close(read_bank(path), released.mean(2).reshape(30, 64))


def test_sixteen_bits_are_averaged_in_more(path):
    latents = (torch.rand(2, 4, 100, 100) * 1000).half()
    write(path, latents)
    torch.testing.assert_close(read_bank(path), latents.double().mean((1, 2)).float(), rtol=1e-6, atol=0)


def test_bytes_of_other_machines(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(">f4")
    np.save(tmp_path / "bank.npy", values)
    assert np.array_equal(read_bank(tmp_path / "bank.npy").numpy(), values)


def test_which_tensor(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "bank.safetensors"
    one, two, three = torch.randn(4, 3), torch.randn(5, 2), torch.randn(2, 3, 3)
    write(path, one, "latents", a=two)
    assert torch.equal(read_bank(path), one)
    write(path, one, "c", b=two, a=three)
    assert torch.equal(read_bank(path), two)
    write(path, three, "only")
    torch.testing.assert_close(read_bank(path), three.mean(1))
    write(path, three, "b", a=three * 2)
    with pytest.raises(
        DataError, match=r"bank\.safetensors: expected a tensor 'latents', a matrix or one .*'a': \[2, 3"
    ):
        read_bank(path)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.randn(4), r"expected outliers \[M, d\], or latents \[M, h, h\] or \[M, 4, h, h\], got \[4\]"),
        (torch.tensor(4.0), r"got \[\]"),
        (torch.randn(100, 3, 64, 64), r"got \[100, 3, 64, 64\] .*reshape \[100, 3, 64, 64\] to \[300, 64, 64\]"),
        (torch.randn(6, 20, 8), r"got \[6, 20, 8\] .*\[classes, m, d\] to \[classes \* m, d\]"),
        (torch.randn(6, 4, 8, 4), r"got \[6, 4, 8, 4\]"),
        (torch.randn(6, 4, 4, 8), r"got \[6, 4, 4, 8\]"),
        (torch.randn(6, 8, 8, 8), r"got \[6, 8, 8, 8\]"),
        (torch.randn(6, 4, 8), r"got \[6, 4, 8\]"),
        (torch.randn(1, 2, 3, 4, 5), r"got \[1, 2, 3, 4, 5\]"),
        (torch.randn(0, 4), r"got \[0, 4\]"),
        (torch.randn(2, 0, 4), r"got \[2, 0, 4\]"),
        (torch.ones(3, 2, dtype=torch.int64), "expected floating numbers, got int64"),
        (torch.tensor([[1.0, 2], [torch.nan, 1], [1, torch.inf]]), "NaN or infinity in 2 of 3 outliers"),
        (torch.full((3, 2), 1e60, dtype=torch.float64), "NaN or infinity in 3 of 3 outliers"),
    ],
)
def test_what_is_no_bank_is_named(path, latents, message):
    write(path, latents)
    with pytest.raises(DataError, match=rf"bank\{path.suffix}: .*{message}"):
        read_bank(path)


def test_damaged_files_are_named(path):
    write(path, torch.randn(40, 4))
    whole = path.read_bytes()
    for content in (whole[:-40], whole[:20], b"", b"no bank"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"bank\{path.suffix}: "):
            read_bank(path)
    path.unlink()
    with pytest.raises(DataError, match=rf"bank\{path.suffix}: No such file"):
        read_bank(path)


class Trap:
    opened = False

    def __reduce__(self):
        return setattr, (Trap, "opened", True)


def test_pickled_objects_stay_closed(tmp_path):
    path = tmp_path / "bank.npy"
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"bank\.npy: expected a \.npy file of numbers, which holds no Python objects"):
        read_bank(path)
    assert not Trap.opened
    with open(path, "wb") as file:
        np.savez(file, a=np.ones((2, 2)))
    with pytest.raises(DataError, match=r"bank\.npy: expected one array of floating numbers, got NpzFile"):
        read_bank(path)
    np.save(path, np.ones((2, 2), np.complex64))
    with pytest.raises(DataError, match=r"bank\.npy: expected one array of floating numbers, got complex64"):
        read_bank(path)


def test_other_formats(tmp_path):
    for verb in (read_bank, lambda path: write_bank(path, torch.ones(2, 2))):
        with pytest.raises(DataError, match=r"bank\.pt: expected a file of \.npy or \.safetensors, got \.pt"):
            verb(tmp_path / "bank.pt")
        with pytest.raises(DataError, match=r"bank: .*got no ending"):
            verb(tmp_path / "bank")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "bank.safetensors").touch()
    for verb in (read_bank, lambda path: write_bank(path, torch.ones(2, 2))):
        with pytest.raises(ImportError, match=r"pip install 'oodkern\[synthesis\]'"):
            verb(tmp_path / "bank.safetensors")


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "bank.npy"
    write_bank(path, torch.ones(2, 2))
    before = path.read_bytes()
    for latents, error, message in (
        (torch.ones(2), ValueError, r"latents: expected \[M, d\], got \[2\]"),
        (torch.ones(2, 2).long(), TypeError, "latents: expected one of float64"),
        (torch.tensor([[1.0, torch.nan]]), ValueError, "latents: expected finite numbers"),
        (torch.ones(0, 2), ValueError, r"latents: expected finite numbers \[M, d\] with M, d > 0, got \[0, 2\]"),
    ):
        with pytest.raises(error, match=message):
            write_bank(path, latents)
    assert path.read_bytes() == before
