"""`oodkern doctor`."""

from __future__ import annotations

import argparse

from oodkern.verbs.common import EXIT_OK

SHORT = HELP = "what was built, who computes what, what is missing and how to get it"
EXAMPLES = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern.doctor import report

    print(report())
    return EXIT_OK
