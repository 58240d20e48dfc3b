"""`oodkern extract`."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodkern.verbs.common import EXIT_CODES, EXIT_OK

if TYPE_CHECKING:
    from oodkern.data import ImageSet
    from oodkern.detector import Detector
    from oodkern.pools.extraction import Extraction
    from oodkern.pools.store import FeatureStore
    from oodkern.processes import Processes

OWN_SETS = ("outliers", "id")  # of the run: words where a source is expected
CHECKPOINTS = ("last", "best", "baseline")

SHORT = "features of a set of images, as a pool on disk"
HELP = """\
Writes the penultimate features of all images of a source, by the model of a run, into the folder POOL: shards of
so many rows each, with the images' keys, the model's head and a manifest with checksums. `oodkern select` chooses from
it, and `oodkern train outliers.pool=POOL` trains with it.

Images are decoded as the run decodes them. Images of the ID set, and classes that bear the name of an ID class, are
left out, and so are images that cannot be read; more than one in a thousand of these is an error.

A shard is written at once when it is whole. The same command goes on where a killed or interrupted one stopped, to the
same bytes, and does nothing where the pool is whole. Processes that `torchrun` starts share the shards.
"""
EXAMPLES = f"""\
examples:
  oodkern extract runs/ce-seed0 outliers --out pool
  oodkern extract runs/ce-seed0 DIR --out pool --workers 8
  oodkern extract runs/ce-seed0 'wds:DIR/pool-{{00000..04095}}.tar' --out pool --dtype bfloat16 --workers 16
  torchrun --nproc-per-node 8 -m oodkern extract runs/ce-seed0 wds:DIR --out pool --workers 8

sources of images, as KIND:PATH: as for data.outliers (see `oodkern train --help`), or photos, or a folder of images;
or a word: `outliers` for the run's own outliers to train with, `id` for its ID training images

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("source", metavar="SOURCE", help="the images: KIND:PATH, a folder, or outliers or id")
    parser.add_argument("--out", metavar="POOL", required=True, help="the folder of the pool")
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        default="last",
        help="which of the run's models; baseline: what fine-tuning from its last.ckpt starts with",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="of the features on disk (default float16)",
    )
    parser.add_argument("--shard-rows", type=int, default=262_144, metavar="N", help="images a shard (default 262,144)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images a forward pass (default 256)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode (default: this one)")
    parser.add_argument(
        "--device", default="auto", help="auto (default): cuda where there is one; or cpu, cuda, cuda:1"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace, command: list[str]) -> int:
    from oodkern.config import ConfigError
    from oodkern.data.damage import damage_lines
    from oodkern.detector import find_device
    from oodkern.pools.extraction import Extraction
    from oodkern.processes import join, launched, leave
    from oodkern.training.several import own_device

    for name, least, most in (("shard_rows", 1, 2**40), ("batch_size", 1, 2**20), ("workers", 0, 256)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise ConfigError(f"--{name.replace('_', '-')}: expected a number from {least} to {most:,}, got {value}")
    detector = loaded(options.run, options.checkpoint)
    device = own_device(detector.config, find_device(options.device))
    processes = join(cuda=device.type == "cuda")
    detector.model.to(device)
    try:
        images, source = opened(detector, options.source, processes)
        work = Extraction(
            detector.model,
            images,
            options.out,
            source=source,
            dtype=options.dtype,
            shard_rows=options.shard_rows,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=sys.stderr.isatty(),
            processes=processes,
            facts=facts_of(options, detector),
        )
        begun = time.perf_counter()
        pool = work.run()
        seconds = time.perf_counter() - begun
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:
        again = shlex.join(command)
        again = again if not launched() else f"torchrun ... -m {again}"
        raise KeyboardInterrupt(f"interrupted; `{again}` goes on with the shards that are missing") from None
    rows = sum(processes.objects(work.rows))
    for line in damage_lines((images,), processes):
        print(f"oodkern extract: {line}", file=sys.stderr)
    leave()
    if processes.first:
        found = summary(pool, work, rows, seconds)
        print(json.dumps(found, indent=2) if options.json else text(found, work.whole))
    return EXIT_OK


def loaded(run: str, checkpoint: str) -> Detector:
    """The run with one of its models, on the CPU; of the baseline the threshold, which is not its own, is NaN."""
    from oodkern.config import ConfigError
    from oodkern.detector import load, read_checkpoint

    if checkpoint != "baseline":
        return load(run, checkpoint)
    # Where there is a starting model there is a best.ckpt, also of a run that stopped within an epoch.
    weights = read_checkpoint(Path(run) / "last.ckpt")["baseline"]
    if weights is None:
        raise ConfigError(f"--checkpoint: {run} has no starting model yet; expected last")
    detector = load(run, "best")
    detector.model.load_state_dict(weights)
    detector.threshold = math.nan
    return detector


def opened(detector: Detector, text: str, processes: Processes) -> tuple[ImageSet, str]:
    """The images of a source as the run takes outliers, and the source in full; tells what was left out.

    Raises ValueError, and DataError naming the file.
    """
    from oodkern.data import build_split
    from oodkern.data.candidates import open_candidates, source_of

    data = detector.config.data

    def found() -> tuple[ImageSet, str, int]:
        split = build_split(data)
        if split.train.shape != detector.shape:
            raise ValueError(f"data: expected images of the run's shape {detector.shape}, got {split.train.shape}")
        if text in OWN_SETS:
            return (split.train if text == "id" else split.outliers), f"{text} of {data.name}", 0
        images, left_out = open_candidates({"SOURCE": text}, split, data.split)["SOURCE"]
        return images, source_of(text), left_out

    def looked_at() -> None:
        found()

    if processes.count > 1:
        processes.once(looked_at)  # one process unpacks, indexes, or finds out what is wrong, for all
    images, source, left_out = found()
    if left_out and processes.first:
        print(
            f"{text}: {left_out:,} images of the ID set or its classes left out, {len(images):,} stay", file=sys.stderr
        )
    if not len(images):
        raise ValueError(f"{text}: expected images, and there are none")
    return images, source


def facts_of(options: argparse.Namespace, detector: Detector) -> dict[str, Any]:
    """What a pool keeps of the run: what its threshold is of, and how its images were decoded."""
    from oodkern.methods.energy import EnergyOptions

    method, data = detector.method, detector.config.data
    return {
        "run": str(Path(options.run).resolve()),
        "checkpoint": options.checkpoint,
        "epoch": detector.epoch,
        "classes": list(detector.classes),
        "multi_label": method.multi_label,
        "score": method.score_name,
        "temperature": detector.config.loss.temperature if isinstance(detector.config.loss, EnergyOptions) else 1.0,
        "threshold": float(detector.threshold) if math.isfinite(detector.threshold) else None,
        "shape": list(detector.shape),
        "resize": data.resize,
    }


def summary(pool: FeatureStore, work: Extraction, rows: int, seconds: float) -> dict[str, Any]:
    suffixes = (".npy", ".json", *([".keys.jsonl"] if pool.has_keys else []))
    files = [shard.path.with_suffix(suffix) for shard in pool.shards for suffix in suffixes]
    return {
        "pool": str(pool.path),
        "source": pool.source,
        "rows": len(pool),
        "dimension": pool.dimension,
        "dtype": str(pool.dtype).removeprefix("torch."),
        "shards": len(pool.shards),
        "bytes": sum(path.stat().st_size for path in files),
        "unreadable": len(work.images) - len(pool),
        "extracted": rows,
        "seconds": seconds,
        "images_per_second": rows / seconds if rows else None,
        "fingerprint": pool.fingerprint,
    }


def text(found: dict[str, Any], whole: bool) -> str:
    """What was made, for a person."""
    unreadable = f", {found['unreadable']:,} unreadable images left out" if found["unreadable"] else ""
    pool = (
        f"{found['rows']:,} rows of {found['dimension']:,} features, {found['dtype']}, in {found['shards']:,} "
        f"shard(s), {found['bytes'] / 1e6:,.1f} MB{unreadable}"
    )
    if whole:
        return f"{found['pool']} is whole: {pool}. Nothing was done."
    return (
        f"{found['pool']}: {pool}\n{found['extracted']:,} images in {found['seconds']:.1f} s, "
        f"{found['images_per_second'] or 0:,.0f} images/s"
    )
