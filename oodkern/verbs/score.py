"""`oodkern score`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from oodkern.verbs.common import EXIT_CODES, EXIT_OK, EXIT_USAGE, trained

if TYPE_CHECKING:
    from torch import Tensor

    from oodkern.detector import Detector

BATCH = 256

SHORT = "class, score and verdict of image files"
HELP = """\
Prints for each image file, or each image below a folder: the class the model takes it for, its outlier score
(larger = more OOD), and whether that is above the stored threshold, which accepts 95 % of known images.
Columns are separated by tabs. Files that are no images are named on standard error, and the exit code is 2.
"""
EXAMPLES = f"""\
examples:
  oodkern score runs/energy-seed0 photo.png folder/
  oodkern score runs/energy-seed0 folder/ --json     one JSON object a line

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    trained(parser)
    parser.add_argument("words", nargs="+", metavar="IMAGES", help="image files, or folders of them")


def run(options: argparse.Namespace, command: list[str]) -> int:
    import torch

    from oodkern.config import ConfigError
    from oodkern.data import DataError
    from oodkern.data.images import image_files
    from oodkern.detector import load

    detector = load(options.run, options.checkpoint, options.device)
    paths: list[Path] = []
    for given in map(Path, options.words):
        if not given.exists():
            raise ConfigError(f"{given}: no such file or folder")
        found = image_files(given) if given.is_dir() else [given]
        if not found:
            raise ConfigError(f"{given}: expected images, found none")
        paths += found
    if not options.json:
        print("image\tclass\tscore\tOOD")
    unreadable = 0
    for start in range(0, len(paths), BATCH):
        batch, images = [], []
        for path in paths[start : start + BATCH]:
            try:
                images.append(detector.read(path))
                batch.append(path)
            except DataError as error:
                print(f"oodkern score: {error}", file=sys.stderr)
                unreadable += 1
        if images:
            print_scores(detector, batch, torch.stack(images), options.json)
    return EXIT_USAGE if unreadable else EXIT_OK


def print_scores(detector: Detector, paths: list[Path], images: Tensor, as_json: bool) -> None:
    from oodkern.detector import name_of

    found = detector.predict(images)
    for path, label, score, is_ood in zip(paths, *(one.tolist() for one in found), strict=True):
        name = name_of(label, detector.classes)
        if as_json:
            line = {"image": str(path), "class": name, "score": score, "threshold": detector.threshold, "ood": is_ood}
            print(json.dumps(line))
        else:
            print(f"{path}\t{name}\t{score:.4f}\t{'yes' if is_ood else 'no'}")
