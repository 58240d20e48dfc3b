"""`oodkern compare`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from oodkern.verbs.common import EXIT_CODES, EXIT_OK, file_and_overrides, names

SHORT = "methods against plain training, over splits and seeds"
HELP = """\
Trains methods and plain training (ce) from the same starting models on the same splits of the classes, and prints
the paired differences with a confidence interval over the splits. A comparison that was stopped goes on when it is
called again; its runs are in runs/compare, or where output=DIR says, and so is comparison.html: the table, the
intervals, every split and every run on one page.
"""
EXAMPLES = f"""\
examples:
  oodkern compare --methods oe,energy --splits 5            five random splits, one seed
  oodkern compare --methods energy --seeds 0,1,2            the fixed split, three seeds
  oodkern compare --methods energy --splits 15 --json > result.json

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", type=names, required=True, metavar="A,B", help="as in method=; ce is always run")
    parser.add_argument("--seeds", type=numbers, default=[0], metavar="0,1", help="of the training (default 0)")
    parser.add_argument("--splits", type=int, metavar="N", help="random splits 0..N-1 (default: the fixed one)")
    parser.add_argument("--json", action="store_true", help="every run and the summary, for programs")
    parser.add_argument("words", nargs="*", metavar="config.yaml | key=value", help="for every run")


def numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,1,2, got {text!r}") from None


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern.config import ConfigError
    from oodkern.processes import launched
    from oodkern.report.comparison import write_comparison
    from oodkern.training import comparison
    from oodkern.training.interrupt import Stopped

    if launched():
        raise ConfigError("compare: runs its trainings one after the other, in one process; expected no torchrun")
    if options.splits is not None and options.splits < 1:
        raise ConfigError(f"--splits: expected 1 or more, got {options.splits}")
    path, overrides = file_and_overrides(options.words)
    splits: list[int | None] = [None] if options.splits is None else list(range(options.splits))

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        found = comparison.compare(options.methods, options.seeds, splits, overrides, path, log)
    except (KeyboardInterrupt, Stopped):  # of a table that is not there yet no program is to think that it is
        raise KeyboardInterrupt("interrupted; the same command goes on") from None
    page = write_comparison(found, found.folder / "comparison.html", shlex.join(command))
    log(f"the page is {page}")
    if options.json:
        print(json.dumps(found.as_dict(shlex.join(command)), indent=1))
    else:
        print(found.table())
    return EXIT_OK
