"""`oodkern calibrate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from oodkern.verbs.common import EXIT_CODES, EXIT_OK

SHORT = "margins for a run's model, from its energies"
HELP = """\
Looks at the energies of held-out ID images and outliers by a run's model, and proposes margin_in and margin_out for
training on from there with method=energy, greg or gregplus. loss.margins=auto does so by itself, by the same rule, of
the images that are trained with. Shows what published margins would do to this model. No test image is looked at.

Margins are of one model and one set. Take the model that the fine-tuning begins with: a run of plain training
(method=ce), or --checkpoint baseline, the starting model of any run. Draws the histograms in calibration.svg.
"""
EXAMPLES = f"""\
examples:
  oodkern calibrate runs/ce-seed0
  oodkern calibrate runs/energy-seed0 --checkpoint baseline
  oodkern calibrate runs/ce-seed0 --json --out margins

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--checkpoint", choices=("last", "best", "baseline"), default="last", help="which of the run's models"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (default): cuda where there is one; or cpu, cuda, cuda:1"
    )
    parser.add_argument("--out", metavar="FOLDER", help="for calibration.svg (default: the folder of the run)")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern._files import write_text
    from oodkern.config import ConfigError
    from oodkern.data import build_split
    from oodkern.data.damage import damage_lines
    from oodkern.detector import load, read_checkpoint
    from oodkern.methods.energy import EnergyOptions
    from oodkern.report.calibration import calibration_figure
    from oodkern.training.calibration import calibrate, calibration_text

    baseline = options.checkpoint == "baseline"
    # Where there is a starting model there is a best.ckpt, also of a run that stopped within an epoch.
    weights = read_checkpoint(Path(options.run) / "last.ckpt")["baseline"] if baseline else None
    if baseline and weights is None:
        raise ConfigError(f"--checkpoint: {options.run} has no starting model yet; expected last")
    detector = load(options.run, "best" if baseline else options.checkpoint, options.device)
    if weights is not None:
        detector.model.load_state_dict(weights)
    config = detector.config
    # Other methods' temperatures are not of the energy.
    temperature = config.loss.temperature if isinstance(config.loss, EnergyOptions) else 1.0
    try:
        split = build_split(config.data)
        if split.train.shape != detector.shape:
            raise ConfigError(f"data: expected images of the run's shape {detector.shape}, got {split.train.shape}")
        found = calibrate(
            detector.model,
            split.validation,
            split.outlier_validation,
            split.multi_label,
            temperature,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for line in damage_lines((split.validation, split.outlier_validation)):
        print(f"oodkern calibrate: {line}", file=sys.stderr)
    figure = Path(options.out or options.run) / "calibration.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    write_text(figure, calibration_figure(found))
    if options.json:
        asked = {"run": options.run, "checkpoint": options.checkpoint}
        print(json.dumps({**asked, **found.as_dict(), "proposal": found.words, "figure": str(figure)}, indent=2))
    else:
        print(calibration_text(found, options.checkpoint, figure))
    return EXIT_OK
