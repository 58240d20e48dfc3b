"""`oodkern plan`."""

from __future__ import annotations

import argparse
import json
import shlex

from oodkern.verbs.common import EXIT_CODES, EXIT_OK, file_and_overrides, names

SHORT = "memory of a training step, and the largest batch that fits"
HELP = """\
Foretells the peak memory of a training step, as configured and made in other ways, without making it: the trainer's own
code runs on tensors that have sizes and no numbers. With --memory it looks for the largest batch that fits, with the
outliers in the configured ratio.

With a CUDA device three steps are also made, on random images, and the last of them is measured and timed; clipping and
the scaler of fp16 are not in the time. Without one it is the CPU's step that is counted, with its kernels and its rules
of autocast: leave a margin of about 10 %.
"""
EXAMPLES = f"""\
examples:
  oodkern plan                                the embedded example with energy fine-tuning
  oodkern plan config.yaml --memory 80GiB     the largest batch for a GPU that is not there yet
  oodkern plan --methods oe,greg model.name=resnet18 optimizer.batch_size=512 optimizer.outlier_batch_size=1024
  oodkern plan --methods all precision=bf16 --memory 8GiB --json

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", type=names, metavar="A,B", help="beside the configured one; all: what suits the data"
    )
    parser.add_argument("--memory", metavar="80GiB", help="to fill (default: that of the CUDA device, if there is one)")
    parser.add_argument("--json", action="store_true", help="for programs, in bytes")
    parser.add_argument("words", nargs="*", metavar="config.yaml | key=value", help="as of train")


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern.config import ConfigError, load_config
    from oodkern.processes import launched
    from oodkern.training.fitting import parse_memory
    from oodkern.training.plan import plan as plan_steps
    from oodkern.verbs.plan_text import plan_text

    if launched():
        raise ConfigError("foretells the step of one process; expected no torchrun")
    if options.methods == []:
        raise ConfigError("--methods: expected names with commas, such as oe,greg, or all; got none")
    memory = None if options.memory is None else parse_memory(options.memory)
    found = plan_steps(load_config(*file_and_overrides(options.words)), options.methods or (), memory)
    print(
        json.dumps({**found.as_dict(), "command": shlex.join(command)}, indent=1) if options.json else plan_text(found)
    )
    return EXIT_OK
