"""A Detector as one file that runs where this library is not: normalisation, backbone, head, score and threshold in
one graph of PyTorch's own operations, [N, C, H, W] float32 in [0, 1] -> label, score, is_ood, for any N.

    program = torch.export.load("model.pt2").module()              # torch alone
    label, score, is_ood = program(images)

    session = onnxruntime.InferenceSession("model.onnx")           # onnxruntime alone
    label, score, is_ood = session.run(None, {"images": images})

Beside the graph the file holds what `notes` says, as JSON: under extra_files of a .pt2, in metadata_props of an .onnx.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import oodkern
from oodkern._errors import brief
from oodkern._files import write_bytes
from oodkern.detector import Detector, Prediction

NOTES = "oodkern.json"
INPUT, OUTPUTS = "images", Prediction._fields
KINDS = ("pt2", "onnx")
BATCHES = (1, 2, 17)  # that every exported file is tried on
# How far scores may be off, in units of 1 + |score|. A dozen networks with random weights, from small_cnn to Swin-T and
# DenseNet-121, stay below 3e-7 in either format.
TOLERANCE = 1e-4
ONNX_BYTES = 2_000_000_000  # protobuf's messages end at 2^31
OLDEST_OPSET = 18  # that PyTorch's exporter makes
# Namespaces of operations that come with PyTorch.
OWN = ("aten", "prim", "prims", "higher_order")


class ExportError(RuntimeError):
    """Why there is no file, in one line."""


@dataclass(frozen=True)
class Agreement:
    """What a file and the eager model made of the same images.

    score_difference: the largest |score - eager score|, and allowed: what it may be there, 1e-4 (1 + |eager score|).
    undecided: images whose label or verdict differs, since two logits, or score and threshold, are as close as that.
    """

    images: int
    batches: tuple[int, ...]
    score_difference: float
    allowed: float
    undecided: int


@dataclass(frozen=True)
class Exported:
    """A file, and how it agrees with the eager model."""

    path: Path
    bytes: int
    agreement: Agreement


def export(
    detector: Detector, path: Path | str, opset: int | None = None, batches: Sequence[int] = BATCHES
) -> Exported:
    """Writes a Detector, its model in float32 and in evaluation mode, and compares the file with it.

    Args:
        detector: from `oodkern.load`; it stays as it is, on whatever device.
        path: ends in .pt2 (torch.export) or .onnx (which needs `pip install 'oodkern[export]'`).
        opset: of ONNX, 18 or more; by default PyTorch's.
        batches: how many random images the file is tried on at a time.

    The file is written under a temporary name, read again and run on the CPU; only one that agrees with
    `detector.predict` takes its name. Raises ExportError where it does not, where the model cannot be traced, or is too
    large for ONNX; ValueError for another suffix, ImportError where a package is missing, before work is done.
    """
    path = Path(path)
    kind = check(path, opset)
    eager = copy.deepcopy(detector)
    eager.model.to("cpu", torch.float32).eval().requires_grad_(False)  # nor does what the file gives require one
    size = sum(one.numel() * one.element_size() for one in eager.model.state_dict().values())
    if kind == "onnx" and size > ONNX_BYTES:
        raise ExportError(f"{path}: expected a model of 2 GB at most in an .onnx, got {size / 1e9:.1f} GB; take .pt2")
    text = json.dumps(notes(detector), ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with warnings.catch_warnings():  # of what PyTorch will do otherwise in later versions
            warnings.simplefilter("ignore")
            program = traced(eager)
            content = pt2_bytes(program, text) if kind == "pt2" else onnx_bytes(program, text, opset)
            write_bytes(temporary, content)
            agreement = compare(eager, runner(temporary), batches)
        os.replace(temporary, path)
    except ExportError as error:
        raise ExportError(f"{path}: not written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, len(content), agreement)


def check(path: Path, opset: int | None = None) -> str:
    """What kind of file it will be. Raises ValueError, and ImportError where it cannot be made or tried here."""
    kind = path.suffix.removeprefix(".")
    if kind not in KINDS:
        raise ValueError(f"path: expected a file that ends in .pt2 or .onnx, got {path.name}")
    if opset is not None and kind != "onnx":
        raise ValueError(f"opset: counts with .onnx alone, got {opset} for {path.name}")
    if opset is not None and opset < OLDEST_OPSET:
        raise ValueError(f"opset: expected {OLDEST_OPSET} or more, got {opset}")
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" and find_spec(name) is None]
    if absent:
        raise ImportError(f"{path.name}: needs {', '.join(absent)}: pip install 'oodkern[export]'")
    return kind


def notes(detector: Detector) -> dict[str, Any]:
    """What a program has to know of the file: class names, in the labels' order, above all."""
    return {
        "classes": list(detector.classes),
        "threshold": detector.threshold,
        "score": detector.method.score_name,
        "method": detector.config.method,
        "model": detector.config.model.name,
        "multi_label": detector.method.multi_label,
        "input": {"name": INPUT, "shape": ["N", *detector.shape], "dtype": "float32", "range": [0, 1]},
        "outputs": list(OUTPUTS),
        "resize": detector.config.data.resize,
        "stage": detector.stage,
        "epoch": detector.epoch,
        "versions": {"oodkern": oodkern.__version__, "torch": torch.__version__},
    }


class Judge(nn.Module):
    """`Detector.judge` as a module; plain tuples, since a file must not know a class of this library."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector, self.model = detector, detector.model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.detector.judge(images))


def traced(detector: Detector) -> torch.export.ExportedProgram:
    """The graph, of any batch size. Raises ExportError."""
    example = torch.full((2, *detector.shape), 0.5)  # of a batch of one the size would become a constant
    # Forward hooks, by which features of some models are found, are run by Python and leave no trace: not strict.
    try:
        with oodkern.backend("reference"), torch.no_grad():
            program = torch.export.export(
                Judge(detector).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("N")},), strict=False
            )
    except Exception as error:  # whatever a model's code does that cannot be traced
        raise ExportError(f"model: torch.export cannot trace {detector.config.model.name} ({brief(error)})") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine, a third of a small file
                namespace = getattr(node.target, "namespace", OWN[0])
                if node.op == "call_function" and namespace not in OWN:
                    raise ExportError(f"model: expected PyTorch's own operations alone, got {node.target}")
    return program


def pt2_bytes(program: torch.export.ExportedProgram, text: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={NOTES: text})
    return buffer.getvalue()


def onnx_bytes(program: torch.export.ExportedProgram, text: str, opset: int | None) -> bytes:
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
        assert made is not None
        made.model.metadata_props[NOTES] = text
        proto = made.model_proto
    except Exception as error:  # an operation without a translation, an opset that lacks one
        raise ExportError(f"model: no ONNX of it ({brief(error)})") from error
    got = [one.version for one in proto.opset_import if not one.domain]
    if opset is not None and got != [opset]:  # a conversion that failed leaves another one
        raise ExportError(f"opset: expected {opset}, got {', '.join(map(str, got))} of PyTorch's exporter")
    graph = proto.graph
    for node in graph.node:
        del node.metadata_props[:]  # where in a program's text it comes from
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "N", size.dim_param)
    return proto.SerializeToString()


def runner(path: Path) -> Callable[[Tensor], Prediction]:
    """A written file as a program that uses it would run it."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return torch.no_grad()(lambda images: Prediction(*program(images)))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: Prediction(*map(torch.from_numpy, session.run(list(OUTPUTS), {INPUT: images.numpy()})))


def compare(eager: Detector, run: Callable[[Tensor], Prediction], batches: Sequence[int] = BATCHES) -> Agreement:
    """Both on random images. Raises ExportError where they differ by more than rounding."""
    generator = torch.Generator().manual_seed(0)
    largest, allowed_there, undecided = -1.0, 0.0, 0
    for size in batches:
        images = random_images(size, eager.shape, generator)
        expected = eager.predict(images)
        try:
            got = run(images)
        except Exception as error:  # a batch size that became a constant, an operation that a runtime lacks
            raise ExportError(f"it does not run on {size} images ({brief(error)})") from error
        for name, one, other in zip(OUTPUTS, got, expected, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                raise ExportError(
                    f"{name}: expected {other.dtype} {list(other.shape)}, got {one.dtype} {list(one.shape)}"
                )
        allowed = TOLERANCE * (1 + expected.score.abs())
        difference = (got.score - expected.score).abs()
        worst = int((difference / allowed).nan_to_num(torch.inf).argmax())
        if not float(difference[worst]) <= float(allowed[worst]):  # NaN and infinite scores too
            raise ExportError(
                f"score: expected {expected.score[worst]:.7g} as of the eager model, got {got.score[worst]:.7g}, of "
                f"image {worst + 1} of {size}"
            )
        labels = differing_labels(eager, images, expected.label, got.label)
        verdicts = got.is_ood != expected.is_ood
        if wrong := int((verdicts & ((expected.score - eager.threshold).abs() > allowed)).sum()):
            raise ExportError(f"is_ood: {wrong} of {size} differ, though their scores are off the threshold")
        undecided += int((labels | verdicts).sum())
        if float(difference.max()) > largest:
            largest, allowed_there = float(difference.max()), float(allowed[difference.argmax()])
    return Agreement(sum(batches), tuple(batches), largest, allowed_there, undecided)


def differing_labels(eager: Detector, images: Tensor, expected: Tensor, got: Tensor) -> Tensor:
    """Which images have another label, [N]. Raises ExportError unless the logits it hangs on are as good as equal."""
    differ = (got != expected).reshape(len(got), -1).any(-1)
    if differ.any():
        with torch.no_grad():
            logits = eager.model(images)
        allowed = TOLERANCE * (1 + logits.abs().amax(-1, keepdim=True))
        if got.dtype == torch.bool:
            apart = (got != expected) & (logits.abs() > allowed)
        else:
            apart = logits.gather(-1, expected[:, None]) - logits.gather(-1, got[:, None]) > allowed
        if wrong := int(apart.any(-1).sum()):
            raise ExportError(f"label: {wrong} of {len(images)} differ, though the logits are apart")
    return differ


def random_images(count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """[count, C, H, W] in [0, 1]: noise of single pixels, and every other one smooth."""
    images = torch.rand(count, *shape, generator=generator)
    smooth = torch.rand(count, shape[0], 4, 4, generator=generator)
    images[::2] = interpolate(smooth, size=tuple(shape[1:]), mode="bilinear")[::2]
    return images
