"""`oodkern bench`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from oodkern.verbs.common import EXIT_CODES, EXIT_OK

LEAST_SECONDS, MOST_SECONDS = 0.1, 60.0

SHORT = "speed, memory and errors of the kernels here, against eager PyTorch, torch.compile and chunks"
HELP = """\
Measures some of the kernels on this machine, in under two minutes, against what one would write instead: eager PyTorch,
torch.compile of that, PyTorch in chunks, and the papers' code where it is another. Inputs are random, contenders take
turns, memory is that of fresh processes (of a GPU, its allocator's), errors are against float64. Where a rival is
faster it says so; what cannot run here is named, with the reason.

Nothing else should run meanwhile. A checkout's folder `benches` has all cases, and other people's kernels.
"""
EXAMPLES = f"""\
examples:
  oodkern bench                        on the GPU, where there is one
  oodkern bench --device cpu           OMP_NUM_THREADS=N before it sets the threads
  oodkern bench --seconds 5            more turns: closer quartiles
  oodkern bench --json > result.json   all contenders, for programs

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="auto (default): cuda where there is one; or cpu, cuda, cuda:1"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="that the turns of a case take, about (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace, command: list[str]) -> int:
    import oodkern
    from oodkern import _native
    from oodkern.benchmarks.machine import machine
    from oodkern.benchmarks.short import measure_short, short_cases, stored_rows
    from oodkern.benchmarks.table import outcomes_text
    from oodkern.config import ConfigError
    from oodkern.detector import find_device

    if not LEAST_SECONDS <= options.seconds <= MOST_SECONDS:
        raise ConfigError(
            f"--seconds: expected a number from {LEAST_SECONDS:g} to {MOST_SECONDS:g}, got {options.seconds:g}"
        )
    device = find_device(options.device)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    missing = _native.missing[device.type]
    if missing:
        log(f"no native kernels for {device.type} ({missing}): `oodkern doctor` says who computes instead of them")
    found = {**machine(device), "oodkern": oodkern.__version__, "native_missing": missing or None}
    outcomes = measure_short(short_cases(device), device, options.seconds, log)
    if options.json:
        print(
            json.dumps(
                {"command": shlex.join(command), "machine": found, "rows": stored_rows(outcomes, device)}, indent=1
            )
        )
    else:
        print(outcomes_text(outcomes, found))
    return EXIT_OK
