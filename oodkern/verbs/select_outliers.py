"""`oodkern select-outliers`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from oodkern.verbs.common import EXIT_CODES, EXIT_OK, trained

SHORT = "which of several sets to take as outliers"
HELP = """\
Ranks sets of images as outliers to train with, by the dilation distance of EDGE between the features of each and of
the run's training images: the closest is the recommended one. Draws the spectra and the distances in
outlier-sets.svg, in the folder of the run or in --out.

Take a run of plain training (method=ce): a model that was trained with a set as outliers has pushed it away. Images
of the ID set, and classes that bear the name of an ID class, are left out of a candidate, but not images of ID classes
under other names: such a set is close, and no outliers.
"""
EXAMPLES = f"""\
examples:
  oodkern select-outliers runs/ce-seed0 digits=digits photos=photos
  oodkern select-outliers runs/ce-seed0 textures=DIR svhn=folder:DIR letters=emnist:DIR
  oodkern select-outliers runs/ce-seed0 a=DIR b=DIR --images 8192 --seed 1 --out chosen --json

sources of images, as KIND:PATH: as for data.outliers (see `oodkern train --help`), or photos, or a folder of images

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    trained(parser)
    parser.add_argument("words", nargs="+", metavar="NAME=SOURCE", help="the candidates")
    parser.add_argument(
        "--top", type=int, default=32, metavar="K", help="singular values compared, at most B (default 32)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="images in a batch, at most N (default 64)"
    )
    parser.add_argument("--images", type=int, default=2048, metavar="N", help="at most, of each set (default 2048)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the images (default 0)")
    parser.add_argument("--out", metavar="FOLDER", help="for outlier-sets.svg (default: the folder of the run)")


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern.config import ConfigError
    from oodkern.data import build_split
    from oodkern.data.candidates import open_candidates
    from oodkern.outlier_sets import LARGEST_SEED, rank_outlier_sets
    from oodkern.report.spectra import outlier_set_figure, ranking_record, ranking_table
    from oodkern.training import load_run
    from oodkern.training.files import write_text

    sources = named_sources(options.words)
    for name, value, least, most, why in (
        ("images", options.images, 1, LARGEST_SEED, ""),
        ("batch-size", options.batch_size, 1, options.images, ", the --images"),
        ("top", options.top, 1, options.batch_size, ", the --batch-size and as many singular values as there are"),
        ("seed", options.seed, 0, LARGEST_SEED, ""),
    ):
        if not least <= value <= most:
            raise ConfigError(f"--{name}: expected a number from {least} to {most:,}{why}, got {value}")
    detector = load_run(options.run, options.checkpoint, options.device)
    data = detector.config.data
    try:
        split = build_split(data)
        if split.train.shape != detector.shape:
            raise ConfigError(f"data: expected images of the run's shape {detector.shape}, got {split.train.shape}")
        opened = open_candidates(sources, split, data.split)
        for name, (images, left_out) in opened.items():
            if left_out:
                print(
                    f"{name}: {left_out:,} images of the ID set or its classes left out, {len(images):,} stay",
                    file=sys.stderr,
                )
        ranked = rank_outlier_sets(
            detector.model,
            split.train,
            {name: images for name, (images, _) in opened.items()},
            options.batch_size,
            options.images // options.batch_size,
            options.top,
            options.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    figure = Path(options.out or options.run) / "outlier-sets.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    write_text(figure, outlier_set_figure(ranked, options.top))
    if options.json:
        asked = {name: getattr(options, name) for name in ("run", "checkpoint", "batch_size", "top", "seed")}
        print(json.dumps({**asked, **ranking_record(ranked, sources), "figure": str(figure)}, indent=2))
    else:
        print(f"{ranking_table(ranked, options.batch_size)}\n\nThe spectra and the distances are in {figure}")
    return EXIT_OK


def named_sources(words: list[str]) -> dict[str, str]:
    """NAME=SOURCE words. Raises ConfigError for another word, and for a name that is none or comes twice."""
    from oodkern.config import ConfigError
    from oodkern.data.options import check_names

    sources: dict[str, str] = {}
    for word in words:
        name, _, source = word.partition("=")
        if not name or not source:
            raise ConfigError(f"{word}: expected NAME=SOURCE")
        try:
            check_names([name])
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("data.ood.")) from None
        if name in sources:
            raise ConfigError(f"{name}: two sets have that name; expected another name for one of them")
        sources[name] = source
    return sources
