"""From a configuration to a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from oodkern.config import ConfigError, TrainConfig
from oodkern.data import OODSplit, build_split
from oodkern.data.options import OWN
from oodkern.data.sources import ready
from oodkern.detector import find_device
from oodkern.methods import METHODS
from oodkern.processes import join
from oodkern.training import files
from oodkern.training.folder import prepare
from oodkern.training.interrupt import Interrupt
from oodkern.training.run import Run
from oodkern.training.several import check_several, own_device
from oodkern.training.trainer import Trainer


def train(
    config: TrainConfig,
    log: Callable[[str], None] = print,
    progress: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    report: bool = True,
    split: OODSplit | None = None,
    pretrained: Path | None = None,
) -> Run:
    """Runs a configuration and writes its folder; the same configuration gives the same bits at the same threads.

    Args:
        config: from `oodkern.config.load_config`.
        log: gets lines for a person.
        progress: shows bars.
        resume: goes on with the run in the folder, bit for bit, where there is one.
        overwrite: starts anew where there is one.
        report: writes report.html too.
        split: images of your own instead of those that `config.data` names.
        pretrained: a file that runs share: the pretrained model is taken from it where it holds that of this
            configuration, and written there otherwise. It changes no number.

    Where `torchrun` started several processes, each calls this with the same arguments: they train one model together,
    the first one writes the folder and speaks, and each returns the run.

    Raises ConfigError, also where the folder holds a run and neither `resume` nor `overwrite` is given; DataError;
    NotFinite where the loss or its gradient is, with the batch saved; KeyboardInterrupt after Ctrl-C and Stopped after
    a scheduler's signal (SIGTERM, SIGUSR1), with the run ready to be resumed; Elsewhere where another process failed.
    """
    with Interrupt(at_once=True):
        return run_of(config, log, progress, resume, overwrite, report, split, pretrained)


def run_of(
    config: TrainConfig,
    log: Callable[[str], None],
    progress: bool,
    resume: bool,
    overwrite: bool,
    report: bool,
    split: OODSplit | None,
    pretrained: Path | None,
) -> Run:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = own_device(config, find_device(config.device))
    processes = join(cuda=device.type == "cuda")
    if processes.count > 1:
        check_several(config, processes.count, device)
    if split is not None:
        config = replace(config, data=replace(config.data, name=f"{OWN}:{split.name}"))

    def images() -> OODSplit:
        return build_split(config.data) if split is None else ready(split, config.data)

    def looked_at() -> None:
        images()

    try:
        processes.once(looked_at)  # one process unpacks, or finds out what is wrong, for all
        found = images()
        METHODS[config.method](config.loss, found.multi_label)  # a program's images may be of the other kind
    except ValueError as error:
        raise ConfigError(str(error)) from None
    state = processes.once(lambda: prepare(config.folder, config, resume, overwrite))
    path, size = config.folder / "metrics.jsonl", state["log_bytes"] if state else 0
    with files.JSONLines(path, size) if processes.first else files.NoLines() as lines:
        speak = log if processes.first else lambda line: None
        run = Trainer(config, found, device, lines, speak, progress, pretrained, processes).run(state)
    if report and processes.first:
        from oodkern.report import write_report

        write_report(run)
    return run
