"""`oodkern train`."""

from __future__ import annotations

import argparse
import shlex
import sys

from oodkern.verbs.common import EXIT_CODES, EXIT_OK, file_and_overrides

SHORT = "train a baseline, fine-tune it with outliers, compare the two"
HELP = """\
Pretrains a classifier on the in-distribution images, fine-tunes it with auxiliary outliers, and prints both
side by side: how well each tells unknown images from known ones, and what that cost in accuracy.

Without arguments it runs the embedded example: scikit-learn's digits 0-5 are known, 6-7 are the outliers to
train with, and 8-9 (near) and patches of photographs (far) are the unknown ones to be found out.
"""
EXAMPLES = f"""\
examples:
  oodkern train                               the embedded example with energy fine-tuning
  oodkern train method=oe loss.alpha=1.0      Outlier Exposure, its weight doubled
  oodkern train data.name=digits-multilabel   canvases of several digits, with a long tail of labels
  oodkern train data.name=cifar10:DIR data.outliers=folder:DIR data.ood.textures=folder:DIR \\
                model.name=wrn_40 precision=bf16 data.workers=4
  oodkern train config.yaml seed=1            a file of the same keys, one of them overridden
  oodkern train config.yaml --resume          goes on where that run stopped, bit for bit
  oodkern train --show method=energy          every key with its value and what it means
  torchrun --nproc-per-node 8 -m oodkern train config.yaml --resume auto
                                              one model on 8 processes; batch sizes are of all of them

sources of images, as KIND:PATH:
  folder          DIR/CLASS/*, or DIR/train and DIR/test (or val) of that
  imglist         FILE[@ROOT], OpenOOD's lists: `relative/path label` a line, under ROOT or a folder above the list
  wds             WebDataset shards: a folder of tar files, a glob, or shard-{{0000..0099}}.tar; an index is kept beside
  npy             FILE, one array of images, uint8 [N, H, W, 3], unlabelled
  cifar10, cifar100, svhn, idx, emnist
                  DIR with their files: Python or binary version, .mat, MNIST's plain or gzipped (emnist swaps axes)
  voc, coco       DIR with annotations of objects: several labels an image
`oodkern check-data` with the same arguments tells what the sets share.

The run folder (runs/METHOD-seedN) gets report.html, config.yaml, metrics.jsonl, scores.npz, environment.json,
last.ckpt (to resume from) and best.ckpt (the best epoch on held-out training images).

SIGTERM and SIGUSR1, a scheduler's warnings, end a run after the step under way (and the validation, where that was an
epoch's last): last.ckpt is written, "resumable" is printed, and the exit code is 0. Where no step is under way a run
ends at once, with the last.ckpt that it has. With `--resume auto` the same command goes on where there is something to
go on with, also with another number of processes: it says what is then not bit for bit. Where one of several processes
is lost the others end with exit code 1.

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="config.yaml | key=value", help="a file, then overrides")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, if there is one (also: --resume auto)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where the folder holds a run")
    parser.add_argument("--show", action="store_true", help="print the resolved configuration, explained, and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern import tables
    from oodkern.config import load_config, to_yaml
    from oodkern.processes import launched, leave, own_rank_is_first
    from oodkern.training import train
    from oodkern.training.interrupt import Stopped

    config = load_config(*file_and_overrides(options.words))
    if options.show:
        print(to_yaml(config, explained=True), end="")
        return EXIT_OK
    try:
        run = train(
            config,
            progress=not options.quiet and sys.stderr.isatty(),
            resume=options.resume,
            overwrite=options.overwrite,
        )
    except (KeyboardInterrupt, Stopped) as error:
        again = shlex.join([*(one for one in command if one not in ("--overwrite", "--resume")), "--resume"])
        again = again if not launched() else f"torchrun ... -m {again}"
        if isinstance(error, Stopped):
            raise Stopped(f"stopped by {error}, resumable: `{again}` goes on") from None
        raise KeyboardInterrupt(f"interrupted; `{again}` goes on") from None
    leave()
    if not own_rank_is_first():
        return EXIT_OK
    print()
    print(tables.run_table(run))
    print(f"\n{run.seconds:.1f} s; the report is {run.folder / 'report.html'}")
    return EXIT_OK
