"""`oodkern check-data`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from oodkern.verbs.common import EXIT_OK, EXIT_USAGE, file_and_overrides

SHORT = "whether the sets of a configuration share pictures or classes"
HELP = """\
Reads every image of a configuration's sets, before anything is trained, and tells which pictures are in two of them:
equal pixels, and by a perceptual hash copies that were coded, resized or mirrored otherwise. Also classes of the
outliers and OOD sets that bear an ID class's name (or wnid), files that cannot be read, and counts.

Errors are pictures of the outliers or an OOD set in the ID set, outliers in the test, a part without images, and more
than one unreadable file in 1,000. Pictures that only look alike, ID pictures that are in two parts, shared classes and
a few unreadable files are warnings. Training leaves out shared classes, equal pixels in memory and equal paths by
itself, and nothing else.

Writes data-check.html, with the pairs side by side, and data-check.json to --out.
"""
EXAMPLES = """\
examples:
  oodkern check-data                          the embedded example
  oodkern check-data config.yaml data.workers=8
  oodkern check-data data.name=cifar10:DIR data.outliers=folder:DIR data.ood.near=cifar100:DIR --json
  oodkern check-data config.yaml --limit 5000   a quick look: so many images of each part, at even distances

exit codes: 0 no errors, 2 errors were found, or wrong usage, configuration or data, 130 interrupted
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="config.yaml | key=value", help="a file, then overrides")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="images read of each part (default: all)")
    parser.add_argument("--out", metavar="FOLDER", help="for the report (default: check-data in `output`, as in runs)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern import _files
    from oodkern.config import ConfigError, load_config
    from oodkern.data.inspection import inspect
    from oodkern.report.data_check import check_text, write_data_check

    if options.limit < 0:
        raise ConfigError(f"--limit: expected a number of images, or 0 for all, got {options.limit}")
    config = load_config(*file_and_overrides(options.words))
    folder = Path(options.out) if options.out else Path(config.output) / "check-data"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = inspect(config.data, options.limit, not options.quiet and sys.stderr.isatty())
    except ValueError as error:
        raise ConfigError(str(error)) from None
    page = write_data_check(found, folder / "data-check.html", config.data)
    _files.write_json(folder / "data-check.json", found.record())
    if options.json:
        print(json.dumps({**found.record(), "report": str(page)}, indent=2))
    else:
        print(f"{check_text(found)}\n\nThe report is {page}")
    return EXIT_OK if found.clean else EXIT_USAGE
