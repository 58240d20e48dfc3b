"""The command line: `oodkern train`, `evaluate`, `score`, `compare` and more. Also `python -m oodkern`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

EXIT_OK, EXIT_LOST, EXIT_USAGE, EXIT_NOT_FINITE, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = (
    "exit codes: 0 done, 2 wrong usage, configuration or data, 3 the loss became NaN or infinite, 130 interrupted"
)

TRAIN_HELP = """\
Pretrains a classifier on the in-distribution images, fine-tunes it with auxiliary outliers, and prints both
side by side: how well each tells unknown images from known ones, and what that cost in accuracy.

Without arguments it runs the embedded example: scikit-learn's digits 0-5 are known, 6-7 are the outliers to
train with, and 8-9 (near) and patches of photographs (far) are the unknown ones to be found out.
"""
TRAIN_EXAMPLES = f"""\
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

sources of images, as KIND:DIR: idx and emnist (files of the MNIST family, plain or gzipped; emnist swaps the
axes), cifar10, cifar100 (Python or binary version), folder (DIR/CLASS/*, or DIR/train and DIR/test of that)

The run folder (runs/METHOD-seedN) gets report.html, config.yaml, metrics.jsonl, scores.npz, environment.json,
last.ckpt (to resume from) and best.ckpt (the best epoch on held-out training images).

SIGTERM and SIGUSR1, a scheduler's warnings, end a run after the step under way (and the validation, where that was an
epoch's last): last.ckpt is written, "resumable" is printed, and the exit code is 0. Where no step is under way a run
ends at once, with the last.ckpt that it has. With `--resume auto` the same command goes on where there is something to
go on with, also with another number of processes: it says what is then not bit for bit. Where one of several processes
is lost the others end with exit code 1.

{EXIT_CODES}
"""
EVALUATE_HELP = """\
Judges the model of a run on the test images of its configuration, and tells what its stored threshold does there.
"""
EVALUATE_EXAMPLES = f"""\
examples:
  oodkern evaluate runs/energy-seed0
  oodkern evaluate runs/energy-seed0 --checkpoint best --json
  oodkern evaluate runs/greg-seed0 --certificate     local certified radii: (threshold - S) / ||grad S||,
                                                     "inf" in --json where the gradient is 0
  oodkern evaluate runs/energy-seed0 data.ood.textures=folder:DIR    one more OOD set

{EXIT_CODES}
"""
SCORE_HELP = """\
Prints for each image file, or each image below a folder: the class the model takes it for, its outlier score
(larger = more OOD), and whether that is above the stored threshold, which accepts 95 % of known images.
Columns are separated by tabs. Files that are no images are named on standard error, and the exit code is 2.
"""
SCORE_EXAMPLES = f"""\
examples:
  oodkern score runs/energy-seed0 photo.png folder/
  oodkern score runs/energy-seed0 folder/ --json     one JSON object a line

{EXIT_CODES}
"""
COMPARE_HELP = """\
Trains methods and plain training (ce) from the same starting models on the same splits of the classes, and prints
the paired differences with a confidence interval over the splits. A comparison that was stopped goes on when it is
called again; its runs are in runs/compare, or where output=DIR says, and so is comparison.html: the table, the
intervals, every split and every run on one page.
"""
COMPARE_EXAMPLES = f"""\
examples:
  oodkern compare --methods oe,energy --splits 5            five random splits, one seed
  oodkern compare --methods energy --seeds 0,1,2            the fixed split, three seeds
  oodkern compare --methods energy --splits 15 --json > result.json

{EXIT_CODES}
"""
PLAN_HELP = """\
Foretells the peak memory of a training step, as configured and made in other ways, without making it: the trainer's own
code runs on tensors that have sizes and no numbers. With --memory it looks for the largest batch that fits, with the
outliers in the configured ratio.

With a CUDA device three steps are also made, on random images, and the last of them is measured and timed; clipping and
the scaler of fp16 are not in the time. Without one it is the CPU's step that is counted, with its kernels and its rules
of autocast: leave a margin of about 10 %.
"""
PLAN_EXAMPLES = f"""\
examples:
  oodkern plan                                the embedded example with energy fine-tuning
  oodkern plan config.yaml --memory 80GiB     the largest batch for a GPU that is not there yet
  oodkern plan --methods oe,greg model.name=resnet18 optimizer.batch_size=512 optimizer.outlier_batch_size=1024
  oodkern plan --methods all precision=bf16 --memory 8GiB --json

{EXIT_CODES}
"""
SELECT_OUTLIERS_HELP = """\
Ranks sets of images as outliers to train with, by the dilation distance of EDGE between the features of each and of
the run's training images: the closest is the recommended one. Draws the spectra and the distances in
outlier-sets.svg, in the folder of the run or in --out.

Take a run of plain training (method=ce): a model that was trained with a set as outliers has pushed it away. Images
of the ID set are left out of a candidate, but not other images of the same classes: such a set is close, and no
outliers.
"""
SELECT_OUTLIERS_EXAMPLES = f"""\
examples:
  oodkern select-outliers runs/ce-seed0 digits=digits photos=photos
  oodkern select-outliers runs/ce-seed0 textures=DIR svhn=folder:DIR letters=emnist:DIR
  oodkern select-outliers runs/ce-seed0 a=DIR b=DIR --images 8192 --seed 1 --out chosen --json

sources of images, as KIND:DIR: as for data.outliers (see `oodkern train --help`), or photos, or a folder of images

{EXIT_CODES}
"""


def parser() -> argparse.ArgumentParser:
    import oodkern

    top = argparse.ArgumentParser(
        prog="oodkern",
        description="Fast, memory-lean training with auxiliary outliers for OOD detection.",
        epilog="`oodkern VERB --help` explains a verb, with examples. Begin with `oodkern train`.",
    )
    top.add_argument("--version", action="version", version=f"oodkern {oodkern.__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, short: str, text: str, examples: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name,
            help=short,
            description=text,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    train = verb("train", "train a baseline, fine-tune it with outliers, compare the two", TRAIN_HELP, TRAIN_EXAMPLES)
    train.add_argument("words", nargs="*", metavar="config.yaml | key=value", help="a file, then overrides")
    train.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, if there is one (also: --resume auto)"
    )
    train.add_argument("--overwrite", action="store_true", help="start anew where the folder holds a run")
    train.add_argument("--show", action="store_true", help="print the resolved configuration, explained, and stop")
    train.add_argument("--quiet", action="store_true", help="no progress bars")

    def trained(one: argparse.ArgumentParser) -> None:
        one.add_argument("run", metavar="RUN", help="the folder of a run")
        one.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which of the run's models")
        one.add_argument(
            "--device", default="auto", help="auto (default): cuda where there is one; or cpu, cuda, cuda:1"
        )
        one.add_argument("--json", action="store_true", help="for programs")

    evaluate = verb("evaluate", "judge the model of a run", EVALUATE_HELP, EVALUATE_EXAMPLES)
    trained(evaluate)
    evaluate.add_argument("--certificate", action="store_true", help="also how far images are from the threshold")
    evaluate.add_argument("words", nargs="*", metavar="data.ood.NAME=SOURCE", help="further OOD sets")
    score = verb("score", "class, score and verdict of image files", SCORE_HELP, SCORE_EXAMPLES)
    trained(score)
    score.add_argument("words", nargs="+", metavar="IMAGES", help="image files, or folders of them")
    compare = verb("compare", "methods against plain training, over splits and seeds", COMPARE_HELP, COMPARE_EXAMPLES)
    compare.add_argument("--methods", type=names, required=True, metavar="A,B", help="as in method=; ce is always run")
    compare.add_argument("--seeds", type=numbers, default=[0], metavar="0,1", help="of the training (default 0)")
    compare.add_argument("--splits", type=int, metavar="N", help="random splits 0..N-1 (default: the fixed one)")
    compare.add_argument("--json", action="store_true", help="every run and the summary, for programs")
    compare.add_argument("words", nargs="*", metavar="config.yaml | key=value", help="for every run")
    plan = verb("plan", "memory of a training step, and the largest batch that fits", PLAN_HELP, PLAN_EXAMPLES)
    plan.add_argument(
        "--methods", type=names, metavar="A,B", help="beside the configured one; all: what suits the data"
    )
    plan.add_argument("--memory", metavar="80GiB", help="to fill (default: that of the CUDA device, if there is one)")
    plan.add_argument("--json", action="store_true", help="for programs, in bytes")
    plan.add_argument("words", nargs="*", metavar="config.yaml | key=value", help="as of train")
    select = verb(
        "select-outliers",
        "which of several sets to take as outliers",
        SELECT_OUTLIERS_HELP,
        SELECT_OUTLIERS_EXAMPLES,
    )
    trained(select)
    select.add_argument("words", nargs="+", metavar="NAME=SOURCE", help="the candidates")
    select.add_argument(
        "--top", type=int, default=32, metavar="K", help="singular values compared, at most B (default 32)"
    )
    select.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="images in a batch, at most N (default 64)"
    )
    select.add_argument("--images", type=int, default=2048, metavar="N", help="at most, of each set (default 2048)")
    select.add_argument("--seed", type=int, default=0, help="of the draw of the images (default 0)")
    select.add_argument("--out", metavar="FOLDER", help="for outlier-sets.svg (default: the folder of the run)")
    verbs.add_parser("doctor", help="what was built, who computes what, what is missing and how to get it")
    return top


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,1,2, got {text!r}") from None


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
    if options.verb == "doctor":
        from oodkern.doctor import report

        print(report())
        return EXIT_OK

    def failed(error: object, code: int) -> int:
        if first_to_speak():
            print(f"oodkern {options.verb}: {error}", file=sys.stderr)
        return code

    from oodkern._errors import brief
    from oodkern.processes import Elsewhere, first_to_speak, lost

    try:  # Ctrl-C may come while these imports are under way
        from oodkern import verbs
        from oodkern.config import ConfigError
        from oodkern.data import DataError
        from oodkern.training.interrupt import Stopped
        from oodkern.training.stage import NotFinite
    except KeyboardInterrupt:
        return failed("interrupted", EXIT_INTERRUPTED)
    try:
        return getattr(verbs, options.verb.replace("-", "_"))(options, ["oodkern", *arguments])
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
