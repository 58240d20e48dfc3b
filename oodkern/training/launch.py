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
from oodkern.methods import METHODS
from oodkern.training import files
from oodkern.training.folder import prepare
from oodkern.training.run import Run
from oodkern.training.start import find_device
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

    Raises ConfigError, also where the folder holds a run and neither `resume` nor `overwrite` is given; DataError;
    NotFinite where the loss or its gradient is, with the batch saved; KeyboardInterrupt after Ctrl-C, with the run
    ready to be resumed.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = find_device(config.device)
    if split is not None:
        config = replace(config, data=replace(config.data, name=f"{OWN}:{split.name}"))
    try:
        split = build_split(config.data) if split is None else ready(split, config.data)
        METHODS[config.method](config.loss, split.multi_label)  # a program's images may be of the other kind
    except ValueError as error:
        raise ConfigError(str(error)) from None
    state = prepare(config.folder, config, resume, overwrite)
    with files.JSONLines(config.folder / "metrics.jsonl", state["log_bytes"] if state else 0) as lines:
        run = Trainer(config, split, device, lines, log, progress, pretrained).run(state)
    if report:
        from oodkern.report import write_report

        write_report(run)
    return run
