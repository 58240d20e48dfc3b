"""The command line: `oodkern train`, `evaluate`, `score`, `compare` and more. Also `python -m oodkern`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from oodkern.verbs import VERBS
from oodkern.verbs.common import EXIT_INTERRUPTED, EXIT_LOST, EXIT_NOT_FINITE, EXIT_OK, EXIT_USAGE


def parser() -> argparse.ArgumentParser:
    import oodkern

    top = argparse.ArgumentParser(
        prog="oodkern",
        description="Fast, memory-lean training with auxiliary outliers for OOD detection.",
        epilog="`oodkern VERB --help` explains a verb, with examples. Begin with `oodkern train`.",
    )
    top.add_argument("--version", action="version", version=f"oodkern {oodkern.__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    for verb in VERBS:
        module = module_of(verb)
        one = verbs.add_parser(
            verb,
            help=module.SHORT,
            description=module.HELP,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(one)
    return top


def module_of(verb: str) -> Any:
    return importlib.import_module(f"oodkern.verbs.{verb.replace('-', '_')}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options may stand before, between and behind the words of a verb, which argparse alone does not allow."""
    top = parser()
    options, words = top.parse_known_args(arguments)
    if any(word.startswith("-") for word in words) or (words and not hasattr(options, "words")):
        top.error(f"unrecognized arguments: {' '.join(words)} (`oodkern {options.verb} --help` lists what there is)")
    if words:
        options.words += words
    return options


def without_auto(arguments: Sequence[str]) -> list[str]:
    """Schedulers' scripts are written with `--resume auto`, and begin anew where nothing is to be resumed, as here."""
    words = ["--resume" if one == "--resume=auto" else one for one in arguments]
    return [one for i, one in enumerate(words) if one != "auto" or words[max(i - 1, 0)] != "--resume"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = without_auto(arguments)
    options = parse(arguments)
    if options.verb == "doctor":  # which has to say what is missing where imports fail
        return module_of("doctor").run(options, arguments)

    def failed(error: object, code: int) -> int:
        if first_to_speak():
            print(f"oodkern {options.verb}: {error}", file=sys.stderr)
        return code

    from oodkern._errors import brief
    from oodkern.processes import Elsewhere, first_to_speak, lost

    try:  # Ctrl-C may come while these imports are under way
        from oodkern.config import ConfigError
        from oodkern.data import DataError
        from oodkern.training.interrupt import Stopped
        from oodkern.training.stage import NotFinite
    except KeyboardInterrupt:
        return failed("interrupted", EXIT_INTERRUPTED)
    try:
        return module_of(options.verb).run(options, ["oodkern", *arguments])
    except (ConfigError, DataError) as error:
        return failed(error, EXIT_USAGE)
    except NotFinite as error:
        return failed(error, EXIT_NOT_FINITE)
    except Stopped as error:
        return failed(error, EXIT_OK)
    except Elsewhere:
        return EXIT_USAGE
    except RuntimeError as error:
        if not lost(error):
            raise
        return failed(
            f"another process of the job ended, or no longer answers ({brief(error)}); its own message "
            "says why, and --resume goes on from the last checkpoint",
            EXIT_LOST,
        )
    except KeyboardInterrupt as error:
        return failed(error if str(error) else "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = None
        return EXIT_OK
    except OSError as error:  # a folder that cannot be written, a disk that is full
        return failed(error, EXIT_USAGE)
