"""What the verbs of the command line do. Each prints, and returns the exit code."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from oodkern import tables
from oodkern.config import ConfigError, load_config, to_yaml
from oodkern.data import DataError, build_split
from oodkern.data.candidates import open_candidates
from oodkern.data.images import image_files
from oodkern.data.options import check_names
from oodkern.data.sources import with_more_ood
from oodkern.outlier_sets import LARGEST_SEED, rank_outlier_sets
from oodkern.plan_verb import plan_text
from oodkern.processes import launched, leave, own_rank_is_first
from oodkern.report.comparison import write_comparison
from oodkern.report.spectra import outlier_set_figure, ranking_record, ranking_table
from oodkern.training import Detector, load_run
from oodkern.training import evaluate as judge
from oodkern.training import train as run_training
from oodkern.training.certify import as_json, certify
from oodkern.training.comparison import compare as run_comparison
from oodkern.training.evaluation import name_of
from oodkern.training.files import write_text
from oodkern.training.fitting import parse_memory
from oodkern.training.interrupt import Stopped
from oodkern.training.plan import plan as plan_steps

OK, WRONG = 0, 2
SCORE_BATCH = 256


def file_and_overrides(arguments: list[str]) -> tuple[str | None, list[str]]:
    """A configuration file, where the first argument is one, and the rest."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], arguments[1:]
    return None, arguments


def train(options: argparse.Namespace, command: list[str]) -> int:
    config = load_config(*file_and_overrides(options.words))
    if options.show:
        print(to_yaml(config, explained=True), end="")
        return OK
    try:
        run = run_training(
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
        return OK
    print()
    print(tables.run_table(run))
    print(f"\n{run.seconds:.1f} s; the report is {run.folder / 'report.html'}")
    return OK


def plan(options: argparse.Namespace, command: list[str]) -> int:
    if launched():
        raise ConfigError("foretells the step of one process; expected no torchrun")
    if options.methods == []:
        raise ConfigError("--methods: expected names with commas, such as oe,greg, or all; got none")
    memory = None if options.memory is None else parse_memory(options.memory)
    found = plan_steps(load_config(*file_and_overrides(options.words)), options.methods or (), memory)
    print(
        json.dumps({**found.as_dict(), "command": shlex.join(command)}, indent=1) if options.json else plan_text(found)
    )
    return OK


def evaluate(options: argparse.Namespace, command: list[str]) -> int:
    detector = load_run(options.run, options.checkpoint, options.device)
    for word in options.words:
        if not word.startswith("data.ood."):
            raise ConfigError(f"{word}: expected data.ood.NAME=SOURCE; the rest is the run's own")
    config = detector.config
    given = load_config(str(Path(options.run) / "config.yaml"), options.words).data.ood  # with its checks
    more = {name: source for name, source in given.items() if config.data.ood.get(name) != source}
    try:
        split = with_more_ood(build_split(config.data), more, config.data.split)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if split.classes != detector.classes or split.train.shape != detector.shape:
        raise ConfigError(
            f"data: expected the run's classes {', '.join(detector.classes)} at {detector.shape}, got "
            f"{', '.join(split.classes)} at {split.train.shape}"
        )
    found = judge(detector.model, split, detector.method.score_name, detector.method.score)
    radii = {}
    if options.certificate:
        radii = {name: certify(detector, images) for name, images in {"id": split.test, **split.test_ood}.items()}
    flagged = {name: float((scores > detector.threshold).float().mean()) for name, scores in found.scores.items()}
    if options.json:
        ood = {name: metrics.as_dict() for name, metrics in found.ood.items()}
        print(
            json.dumps(
                {
                    "run": str(options.run),
                    "checkpoint": options.checkpoint,
                    "score": found.score_name,
                    "accuracy": found.accuracy,
                    "ood": ood,
                    "threshold": detector.threshold,
                    "flagged": flagged,
                    **({"certificate": {name: as_json(one) for name, one in radii.items()}} if radii else {}),
                },
                indent=2,
            )
        )
        return OK
    print(f"{split.describe()}\n{options.checkpoint}.ckpt, epoch {detector.epoch} of {detector.stage}\n")
    print(tables.evaluation_table([(config.method, found)], split.multi_label))
    shares = ", ".join(
        f"{tables.percent(share)} of {'ID' if name == 'id' else name}" for name, share in flagged.items()
    )
    print(f"\nAt the stored threshold, {detector.threshold:.4g}, these percent are called OOD: {shares}.")
    if radii:
        print(f"\n{tables.certificate_table(radii)}")
    return OK


def score(options: argparse.Namespace, command: list[str]) -> int:
    detector = load_run(options.run, options.checkpoint, options.device)
    paths: list[Path] = []
    for given in map(Path, options.words):
        if not given.exists():
            raise ConfigError(f"{given}: no such file or folder")
        found = image_files(given) if given.is_dir() else [given]
        if not found:
            raise ConfigError(f"{given}: expected images, found none")
        paths += found
    if not options.json:
        print("image\tclass\tscore\tOOD")
    unreadable = 0
    for start in range(0, len(paths), SCORE_BATCH):
        batch, images = [], []
        for path in paths[start : start + SCORE_BATCH]:
            try:
                images.append(detector.read(path))
                batch.append(path)
            except DataError as error:
                print(f"oodkern score: {error}", file=sys.stderr)
                unreadable += 1
        if images:
            print_scores(detector, batch, torch.stack(images), options.json)
    return WRONG if unreadable else OK


def print_scores(detector: Detector, paths: list[Path], images: torch.Tensor, as_json: bool) -> None:
    found = detector.predict(images)
    for path, label, score, is_ood in zip(paths, *(one.tolist() for one in found), strict=True):
        name = name_of(label, detector.classes)
        if as_json:
            line = {"image": str(path), "class": name, "score": score, "threshold": detector.threshold, "ood": is_ood}
            print(json.dumps(line))
        else:
            print(f"{path}\t{name}\t{score:.4f}\t{'yes' if is_ood else 'no'}")


def compare(options: argparse.Namespace, command: list[str]) -> int:
    if launched():
        raise ConfigError("compare: runs its trainings one after the other, in one process; expected no torchrun")
    if options.splits is not None and options.splits < 1:
        raise ConfigError(f"--splits: expected 1 or more, got {options.splits}")
    path, overrides = file_and_overrides(options.words)
    splits: list[int | None] = [None] if options.splits is None else list(range(options.splits))

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        found = run_comparison(options.methods, options.seeds, splits, overrides, path, log)
    except (KeyboardInterrupt, Stopped):  # of a table that is not there yet no program is to think that it is
        raise KeyboardInterrupt("interrupted; the same command goes on") from None
    page = write_comparison(found, found.folder / "comparison.html", shlex.join(command))
    log(f"the page is {page}")
    if options.json:
        print(json.dumps(found.as_dict(shlex.join(command)), indent=1))
    else:
        print(found.table())
    return OK


def select_outliers(options: argparse.Namespace, command: list[str]) -> int:
    sources = named_sources(options.words)
    for name, value, least, most, why in (
        ("images", options.images, 1, LARGEST_SEED, ""),
        ("batch-size", options.batch_size, 1, options.images, ", the --images"),
        ("top", options.top, 1, options.batch_size, ", the --batch-size and as many singular values as there are"),
        ("seed", options.seed, 0, LARGEST_SEED, ""),
    ):
        if not least <= value <= most:
            raise ConfigError(f"--{name}: expected a number from {least} to {most:,}{why}, got {value}")
    detector = load_run(options.run, options.checkpoint, options.device)
    data = detector.config.data
    try:
        split = build_split(data)
        if split.train.shape != detector.shape:
            raise ConfigError(f"data: expected images of the run's shape {detector.shape}, got {split.train.shape}")
        opened = open_candidates(sources, split, data.split)
        for name, (images, left_out) in opened.items():
            if left_out:
                print(f"{name}: {left_out:,} images of the ID set left out, {len(images):,} stay", file=sys.stderr)
        ranked = rank_outlier_sets(
            detector.model,
            split.train,
            {name: images for name, (images, _) in opened.items()},
            options.batch_size,
            options.images // options.batch_size,
            options.top,
            options.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    figure = Path(options.out or options.run) / "outlier-sets.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    write_text(figure, outlier_set_figure(ranked, options.top))
    if options.json:
        asked = {name: getattr(options, name) for name in ("run", "checkpoint", "batch_size", "top", "seed")}
        print(json.dumps({**asked, **ranking_record(ranked, sources), "figure": str(figure)}, indent=2))
    else:
        print(f"{ranking_table(ranked, options.batch_size)}\n\nThe spectra and the distances are in {figure}")
    return OK


def named_sources(words: list[str]) -> dict[str, str]:
    """NAME=SOURCE words. Raises ConfigError for another word, and for a name that is none or comes twice."""
    sources: dict[str, str] = {}
    for word in words:
        name, _, source = word.partition("=")
        if not name or not source:
            raise ConfigError(f"{word}: expected NAME=SOURCE")
        try:
            check_names([name])
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("data.ood.")) from None
        if name in sources:
            raise ConfigError(f"{name}: two sets have that name; expected another name for one of them")
        sources[name] = source
    return sources
