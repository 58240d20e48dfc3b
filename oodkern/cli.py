"""The command line: `oodkern train`, `oodkern doctor`. Also `python -m oodkern`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oodkern.training import Run

EXIT_OK, EXIT_USAGE, EXIT_NOT_FINITE, EXIT_INTERRUPTED = 0, 2, 3, 130

TRAIN_HELP = """\
Pretrains a classifier on the in-distribution images, fine-tunes it with auxiliary outliers, and prints both
side by side: how well each tells unknown images from known ones, and what that cost in accuracy.

Without arguments it runs the embedded example: scikit-learn's digits 0-5 are known, 6-7 are the outliers to
train with, and 8-9 (near) and patches of photographs (far) are the unknown ones to be found out.
"""
TRAIN_EXAMPLES = """\
examples:
  oodkern train                               the embedded example with energy fine-tuning
  oodkern train method=oe loss.alpha=1.0      Outlier Exposure, its weight doubled
  oodkern train method=energy loss.margins=fixed loss.margin_in=-12 loss.margin_out=-4
  oodkern train config.yaml seed=1            a file of the same keys, one of them overridden
  oodkern train --show method=energy          the resolved configuration, every key with its value

The run folder (runs/METHOD-seedN) gets config.yaml, metrics.jsonl, last.ckpt, scores.npz and environment.json.
exit codes: 0 done, 2 wrong usage or configuration, 3 the loss became NaN or infinite, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    import oodkern

    top = argparse.ArgumentParser(
        prog="oodkern", description="Fast, memory-lean training with auxiliary outliers for OOD detection."
    )
    top.add_argument("--version", action="version", version=f"oodkern {oodkern.__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    train = verbs.add_parser(
        "train",
        help="train a baseline, fine-tune it with outliers, compare the two",
        description=TRAIN_HELP,
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("arguments", nargs="*", metavar="config.yaml | key=value", help="a file, then overrides")
    train.add_argument("--show", action="store_true", help="print the resolved configuration and stop")
    train.add_argument("--quiet", action="store_true", help="no progress bars")
    verbs.add_parser("doctor", help="what was built, who computes what, what is missing and how to get it")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    options = parser().parse_args(arguments)
    if options.verb == "doctor":
        from oodkern.doctor import report

        print(report())
        return EXIT_OK
    return train(options)


def train(options: argparse.Namespace) -> int:
    from oodkern.config import ConfigError, load_config, to_yaml

    given = list(options.arguments)
    path = given.pop(0) if given and ("=" not in given[0] or Path(given[0]).is_file()) else None
    try:
        config = load_config(path, given)
    except ConfigError as error:
        print(f"oodkern train: {error}", file=sys.stderr)
        return EXIT_USAGE
    if options.show:
        print(to_yaml(config), end="")
        return EXIT_OK

    from oodkern.training import NotFinite
    from oodkern.training import train as run

    try:
        result = run(config, progress=not options.quiet and sys.stderr.isatty())
    except NotFinite as error:
        print(f"oodkern train: {error}", file=sys.stderr)
        return EXIT_NOT_FINITE
    except KeyboardInterrupt:
        print(f"oodkern train: interrupted; what was logged is in {config.folder}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print()
    print(table(result, config.method))
    print(f"\n{result.seconds:.1f} s; everything is in {result.folder}")
    return EXIT_OK


def table(run: Run, method: str) -> str:
    """One row for each model, score and OOD set."""
    head = ("model", "score", "ID accuracy", "OOD set", "AUROC", "AUPR", "FPR95", "FPR95(ID+)")
    rows = []
    for model, one in (*(("baseline", each) for each in run.baseline), (method, run.method)):
        for name, found in one.ood.items():
            numbers = (found.auroc, found.aupr_out, found.fpr95_ood_positive, found.fpr95_id_positive)
            rows.append((model, one.score_name, percent(one.accuracy), name, *map(percent, numbers)))
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Iterable[str]) -> str:
        words = {0, 1, 3}
        padded = [c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded)

    legend = (
        "In percent. AUROC, AUPR: OOD positive, higher is better. FPR95: ID images flagged where\n"
        "95 % of OOD images are; FPR95(ID+): OOD images accepted where 95 % of ID images are; lower is better."
    )
    return "\n".join([line(head), line("-" * width for width in widths), *map(line, rows), "", legend])


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
