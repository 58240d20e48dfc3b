"""`oodkern evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from oodkern.verbs.common import EXIT_CODES, EXIT_OK, trained

SHORT = "judge the model of a run"
HELP = """\
Judges the model of a run on the test images of its configuration, and tells what its stored threshold does there.
"""
EXAMPLES = f"""\
examples:
  oodkern evaluate runs/energy-seed0
  oodkern evaluate runs/energy-seed0 --checkpoint best --json
  oodkern evaluate runs/greg-seed0 --certificate     local certified radii: (threshold - S) / ||grad S||,
                                                     "inf" in --json where the gradient is 0
  oodkern evaluate runs/energy-seed0 data.ood.textures=folder:DIR    one more OOD set

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    trained(parser)
    parser.add_argument("--certificate", action="store_true", help="also how far images are from the threshold")
    parser.add_argument("words", nargs="*", metavar="data.ood.NAME=SOURCE", help="further OOD sets")


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern import tables
    from oodkern.config import ConfigError, load_config
    from oodkern.data import build_split
    from oodkern.data.damage import damage_lines
    from oodkern.data.sources import with_more_ood
    from oodkern.training import evaluate, load_run
    from oodkern.training.certify import as_json, certify

    detector = load_run(options.run, options.checkpoint, options.device)
    for word in options.words:
        if not word.startswith("data.ood."):
            raise ConfigError(f"{word}: expected data.ood.NAME=SOURCE; the rest is the run's own")
    config = detector.config
    given = load_config(str(Path(options.run) / "config.yaml"), options.words).data.ood  # with its checks
    more = {name: source for name, source in given.items() if config.data.ood.get(name) != source}
    try:
        split = with_more_ood(build_split(config.data), more, config.data.split)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if split.classes != detector.classes or split.train.shape != detector.shape:
        raise ConfigError(
            f"data: expected the run's classes {', '.join(detector.classes)} at {detector.shape}, got "
            f"{', '.join(split.classes)} at {split.train.shape}"
        )
    found = evaluate(detector.model, split, detector.method.score_name, detector.method.score)
    for line in damage_lines((split.test, *split.test_ood.values())):
        print(f"oodkern evaluate: {line}", file=sys.stderr)
    radii = {}
    if options.certificate:
        radii = {name: certify(detector, images) for name, images in {"id": split.test, **split.test_ood}.items()}
    flagged = {name: float((scores > detector.threshold).float().mean()) for name, scores in found.scores.items()}
    if options.json:
        ood = {name: metrics.as_dict() for name, metrics in found.ood.items()}
        print(
            json.dumps(
                {
                    "run": str(options.run),
                    "checkpoint": options.checkpoint,
                    "score": found.score_name,
                    "accuracy": found.accuracy,
                    "ood": ood,
                    "threshold": detector.threshold,
                    "flagged": flagged,
                    **({"certificate": {name: as_json(one) for name, one in radii.items()}} if radii else {}),
                },
                indent=2,
            )
        )
        return EXIT_OK
    print(f"{split.describe()}\n{options.checkpoint}.ckpt, epoch {detector.epoch} of {detector.stage}\n")
    print(tables.evaluation_table([(config.method, found)], split.multi_label))
    shares = ", ".join(
        f"{tables.percent(share)} of {'ID' if name == 'id' else name}" for name, share in flagged.items()
    )
    print(f"\nAt the stored threshold, {detector.threshold:.4g}, these percent are called OOD: {shares}.")
    if radii:
        print(f"\n{tables.certificate_table(radii)}")
    return EXIT_OK
