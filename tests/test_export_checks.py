"""Exported files that are not kept: what the check of each finds, and what cannot be asked for."""

import sys

import pytest
import torch
from picture_run import train_on, write_pictures
from torch import nn
from untrained import SHAPE, detector_of

import oodkern
from oodkern import export as exporting
from oodkern.cli import main
from oodkern.export import ExportError


class Deciding(nn.Module):
    """What it does hangs on the numbers in the images."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(432, 5)

    def forward(self, images):
        return self.fc(images.flatten(1)) * (2 if images.mean() > 0.5 else 1)


def test_a_model_that_cannot_be_traced(tmp_path):
    with pytest.raises(ExportError, match=r"a\.pt2: not written: model: torch\.export cannot trace small_cnn \("):
        detector_of(network=Deciding()).export(tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


class Kernel(nn.Module):
    """Calls an operation of this library's own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(432, 5)

    def forward(self, images):
        with oodkern.backend("native"):
            return self.fc(images.flatten(1)) + oodkern.energy(images.flatten(1))[:, None]


def test_an_operation_that_is_not_pytorchs(tmp_path):
    from oodkern import _native

    if _native.missing["cpu"]:
        pytest.skip("needs the native kernels")
    with pytest.raises(ExportError, match=r"expected PyTorch's own operations alone, got oodkern"):
        detector_of(network=Kernel()).export(tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    """The check is made on what was written: a program with other weights, another label, or another verdict."""
    detector = detector_of("method=energy")
    path = tmp_path / "a.pt2"
    path.write_bytes(b"an older file")
    real = exporting.pt2_bytes

    def other(program, text):
        bias = "model.model.fc.bias"
        program.state_dict[bias] = nn.Parameter(program.state_dict[bias] + 0.01)
        return real(program, text)

    monkeypatch.setattr(exporting, "pt2_bytes", other)
    with pytest.raises(ExportError, match=r"a\.pt2: not written: score: expected -\d.* as of the eager model, got -\d"):
        detector.export(path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.pt2"]
    assert path.read_bytes() == b"an older file"


def test_how_far_a_file_may_be_off():
    """1e-4 (1 + |score|); labels and verdicts may differ only where they hang on less."""
    detector = detector_of("method=energy")

    def compared(**changes):
        def run(images):
            found = detector.predict(images)
            return found._replace(**{name: change(found) for name, change in changes.items()})

        return exporting.compare(detector, run)

    assert compared().score_difference == compared().undecided == 0
    near = compared(score=lambda one: one.score + 9e-5 * (1 + one.score.abs()))
    assert 0.8 * near.allowed < near.score_difference < near.allowed
    for factor in (1.1e-4, -1.1e-4, float("nan"), float("inf")):
        with pytest.raises(ExportError, match=r"score: expected .* got .*, of image 1 of 1"):
            compared(score=lambda one, factor=factor: one.score + factor * (1 + one.score.abs()))
    with pytest.raises(ExportError, match=r"label: 1 of 1 differ, though the logits are apart"):
        compared(label=lambda one: (one.label + 1) % 5)
    with pytest.raises(ExportError, match=r"is_ood: 1 of 1 differ, though their scores are off the threshold"):
        compared(is_ood=lambda one: ~one.is_ood)
    with pytest.raises(ExportError, match=r"label: expected torch\.int64 \[1\], got torch\.int32 \[1\]"):
        compared(label=lambda one: one.label.int())
    with pytest.raises(ExportError, match=r"is_ood: expected torch\.bool \[1\], got torch\.bool \[1, 1\]"):
        compared(is_ood=lambda one: one.is_ood[:, None])

    images = exporting.random_images(1, SHAPE, torch.Generator().manual_seed(0))
    detector.threshold = float(detector.predict(images).score) + 5e-5  # of the first image
    first = compared(is_ood=lambda one: one.is_ood ^ ((one.score - detector.threshold).abs() < 1e-4))
    assert first.undecided >= 1
    with torch.no_grad():
        detector.model.head.weight[1] = detector.model.head.weight[0]
        detector.model.head.bias[:2] = 50.0  # two classes that are equally likely
    tie = compared(label=lambda one: 1 - one.label)
    assert tie.undecided == 20


def test_a_batch_size_that_became_a_constant():
    def run(images):
        if len(images) != 2:
            raise RuntimeError("expected two\nimages")
        return detector.predict(images)

    detector = detector_of()
    with pytest.raises(ExportError, match=r"it does not run on 1 images \(RuntimeError: expected two images\)"):
        exporting.compare(detector, run)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_on(write_pictures(tmp_path_factory.mktemp("pictures")), tmp_path_factory.mktemp("runs"))


def test_what_cannot_be_asked_for(run, tmp_path, monkeypatch, capsys):
    detector = detector_of()
    with pytest.raises(ValueError, match=r"path: expected a file that ends in \.pt2 or \.onnx, got a\.pth"):
        detector.export(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"opset: counts with \.onnx alone, got 18 for a\.pt2"):
        detector.export(tmp_path / "a.pt2", opset=18)
    for words, message in (
        (("--opset", "17", "--format", "onnx"), "opset: expected 18 or more, got 17"),
        (("--out", f"{tmp_path}/a.pt2", "--format", "both"), "--format: expected pt2 with --out "),
        (("--opset", "18"), "--opset: counts with --format onnx or both, got 18"),
        (("--out", f"{tmp_path}/a.pt"), "--out: expected a folder, or a file that ends in .pt2 or .onnx"),
        (("--out", str(run.folder / "config.yaml")), "--out: expected a folder, or a file that ends in .pt2 or .onnx"),
    ):
        assert main(["export", str(run.folder), *words]) == 2
        assert f"oodkern export: {message}" in capsys.readouterr().err
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else sys)
    assert main(["export", str(run.folder), "--format", "both"]) == 2
    assert "model.onnx: needs onnxscript: pip install 'oodkern[export]'" in capsys.readouterr().err
    monkeypatch.setattr(exporting, "find_spec", lambda name: sys)
    monkeypatch.setattr(exporting, "ONNX_BYTES", 1000)
    assert main(["export", str(run.folder), "--format", "onnx"]) == 2
    assert "model.onnx: expected a model of 2 GB at most in an .onnx, got 0.0 GB; take .pt2" in capsys.readouterr().err
    assert not [one for one in run.folder.iterdir() if one.suffix in (".pt2", ".onnx") or one.name.startswith(".")]
