"""What several verbs of the command line share."""

from __future__ import annotations

import argparse
from pathlib import Path

EXIT_OK, EXIT_LOST, EXIT_USAGE, EXIT_NOT_FINITE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = (
    "exit codes: 0 done, 2 wrong usage, configuration or data, 3 the loss became NaN or infinite, 130 interrupted"
)


def file_and_overrides(arguments: list[str]) -> tuple[str | None, list[str]]:
    """A configuration file, where the first argument is one, and the rest."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], arguments[1:]
    return None, arguments


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def trained(parser: argparse.ArgumentParser) -> None:
    """What a verb that looks at a run's model is told."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which of the run's models")
    parser.add_argument(
        "--device", default="auto", help="auto (default): cuda where there is one; or cpu, cuda, cuda:1"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
