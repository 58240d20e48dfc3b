"""`oodkern export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from oodkern.verbs.common import EXIT_CODES, EXIT_OK

if TYPE_CHECKING:
    from oodkern.detector import Detector
    from oodkern.export import Exported

FORMATS = ("pt2", "onnx", "both")
SUFFIXES = (".pt2", ".onnx")

SHORT = "the model of a run as one file that runs without oodkern"
HELP = """\
Writes backbone, head, score and threshold of a run's model as one graph: images [N, C, H, W] float32 in [0, 1] ->
label, score (larger = more OOD) and is_ood (score above the stored threshold), for any N. A .pt2 file, of torch.export,
needs torch alone; an .onnx file needs a runtime of ONNX, and to be made: pip install 'oodkern[export]'.

Each file is read again and compared with the eager model on random images, on the CPU and at several batch sizes; one
that differs by more than rounding is deleted, and the exit code is 2.
"""
EXAMPLES = f"""\
examples:
  oodkern export runs/energy-seed0                       runs/energy-seed0/model.pt2
  oodkern export runs/energy-seed0 --format both         model.pt2 and model.onnx
  oodkern export runs/energy-seed0 --out served/a.onnx   the suffix says the format
  oodkern export runs/energy-seed0 --checkpoint best --format onnx --opset 20 --out served/

in another program, which needs no oodkern:
  extra = {{"oodkern.json": ""}}                           class names, threshold, size of the images
  program = torch.export.load("model.pt2", extra_files=extra).module()
  label, score, is_ood = program(images)

  session = onnxruntime.InferenceSession("model.onnx")   the same JSON is in its custom metadata
  label, score, is_ood = session.run(None, {{"images": images.numpy()}})

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which of the run's models")
    parser.add_argument("--format", choices=FORMATS, help="pt2, unless the suffix of --out says otherwise")
    parser.add_argument(
        "--out", metavar="FILE|FOLDER", help="a file that ends in .pt2 or .onnx, or a folder (default: that of the run)"
    )
    parser.add_argument("--opset", type=int, help="of ONNX, 18 or more (default: PyTorch's)")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern.config import ConfigError
    from oodkern.detector import load
    from oodkern.export import ExportError, check

    paths = paths_of(options)
    try:
        for path in paths:
            check(path, options.opset if path.suffix == ".onnx" else None)
        detector = load(options.run, options.checkpoint)
        found = [detector.export(path, options.opset if path.suffix == ".onnx" else None) for path in paths]
    except (ExportError, ImportError, ValueError) as error:
        raise ConfigError(str(error)) from None
    if options.json:
        print(json.dumps([record(one) for one in found], indent=2))
    else:
        print("\n".join(text(one, detector) for one in found))
    return EXIT_OK


def paths_of(options: argparse.Namespace) -> list[Path]:
    """The files to write. Raises ConfigError where --format and --out do not go together."""
    from oodkern.config import ConfigError

    out = Path(options.out or options.run)
    if options.out and out.suffix in SUFFIXES and not out.is_dir():
        if options.format not in (None, out.suffix[1:]):
            raise ConfigError(f"--format: expected {out.suffix[1:]} with --out {out}, got {options.format}")
        paths = [out]
    else:
        if out.is_file() or (options.out and out.suffix and not out.is_dir()):  # model.pt is not meant for a folder
            raise ConfigError(f"--out: expected a folder, or a file that ends in .pt2 or .onnx, got {out}")
        chosen = {"both": SUFFIXES, "onnx": (".onnx",)}.get(options.format, (".pt2",))
        paths = [out / f"model{suffix}" for suffix in chosen]
    if options.opset is not None and all(path.suffix != ".onnx" for path in paths):
        raise ConfigError(f"--opset: counts with --format onnx or both, got {options.opset}")
    return paths


def record(exported: Exported) -> dict:
    from dataclasses import asdict

    return {"path": str(exported.path), "bytes": exported.bytes, **asdict(exported.agreement)}


def text(exported: Exported, detector: Detector) -> str:
    one = exported.agreement
    shape = ", ".join(map(str, detector.shape))
    label = f"label [N, {len(detector.classes)}]" if detector.method.multi_label else "label [N]"
    close = f"; {one.undecided} at a tie within that" if one.undecided else ""
    return (
        f"{exported.path} ({exported.bytes / 1e6:.1f} MB): images [N, {shape}] -> {label}, score [N], is_ood [N]\n"
        f"  compared with the eager model on {one.images} random images, {', '.join(map(str, one.batches))} at a time: "
        f"largest difference of scores {one.score_difference:.1e}, {one.allowed:.1e} allowed; the same labels and "
        f"verdicts{close}"
    )
