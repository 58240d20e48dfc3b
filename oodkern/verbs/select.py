"""`oodkern select`."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodkern.verbs.common import EXIT_CODES, EXIT_OK
from oodkern.verbs.extract import CHECKPOINTS, facts_of, loaded
from oodkern.verbs.select_policy import (
    OPTIONS,
    POLICIES,
    as_typed,
    opened,
    plain_options,
    policy_of,
    suited_score,
    typed,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oodkern.pools.store import FeatureStore

    Head = tuple[Tensor, Tensor | None]

HEADLESS = ("uniform", "poem")  # which look at no head

SHORT = "rows of a pool by a policy: which images to train with"
HELP = """\
Chooses N rows of a pool of features (see `oodkern extract`) by a policy, and writes their numbers in the pool as
int64 into FILE.npy, in the order of the choice, with a plot of the scores of the pool and of what was taken. The pool
is read chunk by chunk. The choice is a function of the pool, the head, the options and the seed alone.

POOL is a folder that `oodkern extract` wrote, or a file of features: .npy, .safetensors, .parquet, .arrow, .feather.
Scores are formed by the head that is stored with the pool, or by that of --run: by default the energy, or of models of
several labels -joint_energy, which are low for what is most like in-distribution.

policies:
  uniform         any rows
  energy-window   any rows between two quantiles of the score: --low (default 0), --high (0.25)
  ntom            the rows from a quantile of the score on, ascending: --quantile (0.125)
  margin          those nearest to a threshold: --threshold (the run's, where it is one of --score)
  top-k           those of lowest score, or --largest
  poem            those nearest to a boundary that is drawn anew by every seed: --known, a pool of ID images
  dos             of each cluster of the features those of lowest score: --clusters (64)
  gregplus        of each cluster those of lowest and of highest score: --clusters (64), --one-way
All but uniform and poem take --score. dos, gregplus and ntom take --absent-class too.
"""
EXAMPLES = f"""\
examples:
  oodkern select pool --policy gregplus --count 10000 --out chosen.npy --names chosen.txt
  oodkern select pool --policy ntom --quantile 0.125 --count 10000 --out chosen.npy --run runs/energy-seed0
  oodkern select pool --policy poem --known id-pool --count 10000 --seed 1 --out chosen.npy
  oodkern select features.npy --run runs/ce-seed0 --policy top-k --score msp --count 500 --out chosen.npy --json

{EXIT_CODES}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pool", metavar="POOL", help="a folder of `oodkern extract`, or a file of features")
    parser.add_argument("--policy", required=True, choices=tuple(POLICIES), metavar="NAME", help="one of those above")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="rows to choose")
    parser.add_argument("--out", required=True, metavar="FILE.npy", help="the chosen rows' numbers, int64")
    parser.add_argument("--names", metavar="FILE", help="the chosen images' keys too, one a line")
    parser.add_argument("--plot", metavar="FILE.svg", help="of the scores (default: beside --out)")
    parser.add_argument("--run", metavar="RUN", help="the run whose head scores (default: the pool's own head)")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="last", help="which of its models")
    parser.add_argument("--seed", type=int, default=0, help="of what a policy draws (default 0)")
    own = parser.add_argument_group("options of policies")
    own.add_argument("--clusters", type=int, metavar="K", help="of the features, each divided by its norm")
    own.add_argument("--low", type=float, metavar="Q", help="quantile that the window begins at")
    own.add_argument("--high", type=float, metavar="Q", help="quantile that the window ends at")
    own.add_argument("--quantile", type=float, metavar="Q", help="share of the pool that is passed over")
    own.add_argument("--threshold", type=float, metavar="E", help="score to be near to")
    own.add_argument(
        "--score", metavar="NAME", help="energy (default), joint_energy, max_logit, msp; or --score=-msp for minus one"
    )
    own.add_argument("--largest", action="store_true", default=None, help="the largest scores first")
    own.add_argument("--one-way", action="store_true", default=None, help="of lowest score alone")
    own.add_argument("--absent-class", action="store_true", default=None, help="by the head's last class instead")
    own.add_argument("--known", metavar="POOL", help="of ID images, as `oodkern extract RUN id` makes it")
    how = parser.add_argument_group("how the pool is read")
    how.add_argument("--skip-damaged", action="store_true", help="leave damaged shards out instead of stopping")
    how.add_argument("--no-verify", action="store_true", help="do not compute the shards' checksums")
    how.add_argument("--dtype", choices=("bfloat16",), help="a .npy of uint16 holds these")
    how.add_argument("--name", metavar="TENSOR", help="of a file with several: the tensor, or the column")
    parser.add_argument(
        "--device", default="auto", help="auto (default): cuda where there is one; or cpu, cuda, cuda:1"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace, command: list[str]) -> int:
    import numpy as np
    import torch

    from oodkern._files import write_bytes, write_text
    from oodkern.config import ConfigError
    from oodkern.detector import find_device
    from oodkern.outlier_sets import LARGEST_SEED
    from oodkern.pools.policy import scores_of
    from oodkern.report.selection import selection_figure, selection_record, selection_table

    check_options(options)
    if not 0 <= options.seed <= LARGEST_SEED:
        raise ConfigError(f"--seed: expected a number from 0 to {LARGEST_SEED:,}, got {options.seed}")
    device = find_device(options.device)
    pool = opened(options.pool, options, dtype=options.dtype, name=options.name)
    if not 1 <= options.count <= len(pool):
        raise ConfigError(f"--count: expected a number from 1 to {len(pool):,}, the pool's rows, got {options.count}")
    if options.names and not pool.has_keys:
        raise ConfigError(f"--names: {options.pool} has no keys of images")
    head, facts = head_of(options, pool, device)
    policy = policy_of(options, pool, head, facts)
    watched = sys.stderr.isatty()
    try:
        scores = policy.scores(pool, head, progress=watched)
        random = torch.Generator().manual_seed(options.seed)
        chosen = policy.select(pool, head, options.count, random, scores=scores)
    except ValueError as error:
        raise ConfigError(as_typed(error)) from None
    found: dict[str, Any] = {"pool": options.pool, "rows": len(pool), "skipped": list(pool.skipped)}
    found |= {name: getattr(options, name) for name in ("policy", "run", "count", "seed", "out", "names")}
    found |= {"options": {name: getattr(policy, name) for name in plain_options(policy)}, "plot": None}
    if head is not None:
        name = "log p of the absent class" if options.absent_class else getattr(policy, "score", suited_score(facts))
        if scores is None:
            scores = scores_of(pool, head, name, progress=watched)
        found |= {"score": name, "scores": selection_record(scores, scores[chosen.numpy()]), "plot": options.plot}
        write_text(ready(options.plot), selection_figure(scores, scores[chosen.numpy()], options.policy, name))
    if options.names:
        write_text(ready(options.names), "".join(f"{as_line(key)}\n" for key in pool.keys(chosen)))
    buffer = io.BytesIO()
    np.save(buffer, pool.numbers(chosen).numpy())
    write_bytes(ready(options.out), buffer.getvalue())  # last: where it is there all of it is
    if options.json:
        print(json.dumps(found, indent=2))
        return EXIT_OK
    if head is not None:
        print(f"{selection_table(found['scores'], found['score'])}\n")
    print(f"{options.policy} chose {options.count:,} of {len(pool):,} rows: {options.out}")
    print(f"The histograms are in {found['plot']}" if found["plot"] else "No head, and so no scores and no plot: --run")
    return EXIT_OK


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError, naming the option, for one of another policy and for files that cannot be written as asked;
    says where the plot goes."""
    from oodkern.config import ConfigError

    for name in OPTIONS:
        if getattr(options, name) is not None and name not in POLICIES[options.policy]:
            those = ", ".join(policy for policy, names in POLICIES.items() if name in names)
            raise ConfigError(f"{typed(name)}: counts with --policy {those}, got it with {options.policy}")
    if options.absent_class and options.score is not None:
        raise ConfigError(f"--score: expected none beside --absent-class, which is a score, got {options.score}")
    if Path(options.out).suffix != ".npy":
        raise ConfigError(f"--out: expected a name that ends in .npy, got {options.out}")
    options.plot = options.plot or str(Path(options.out).with_suffix(".svg"))
    written: dict[Path, str] = {}
    for name in ("out", "plot", "names"):
        if (path := getattr(options, name)) is None:
            continue
        if Path(path).is_dir():
            raise ConfigError(f"--{name}: expected a file, got the folder {path}")
        if (other := written.setdefault(Path(path).resolve(), name)) != name:
            raise ConfigError(f"--{name}: expected another file than that of --{other}, got {path}")


def head_of(
    options: argparse.Namespace, pool: FeatureStore, device: torch.device
) -> tuple[Head | None, Mapping[str, Any]]:
    """The head that scores, on a device, and what is known of its model: the run's, or what the pool keeps.

    Tells where the features are those of another model. Raises ConfigError where there is none and one is needed.
    """
    from oodkern.config import ConfigError
    from oodkern.pools.extraction import fingerprint

    if options.run is None:
        if pool.head is None and options.policy not in HEADLESS:
            raise ConfigError(f"--run: {options.pool} has no head to score with; expected the run whose head does")
        head, facts = pool.head, pool.facts
    else:
        detector = loaded(options.run, options.checkpoint)
        linear = detector.model.head
        if linear.in_features != pool.dimension:
            raise ConfigError(
                f"--run: expected a model of {pool.dimension} features, which {options.pool} has, got "
                f"{linear.in_features} of {options.run}"
            )
        if pool.fingerprint != (own := fingerprint(detector.model)):
            theirs = f"model {pool.fingerprint[:12]}" if pool.fingerprint else "an unknown model"
            print(
                f"oodkern select: warning: the features of {options.pool} are of {theirs}, and {options.run} is "
                f"{own[:12]}",
                file=sys.stderr,
            )
        bias = None if linear.bias is None else linear.bias.detach()
        head, facts = (linear.weight.detach(), bias), facts_of(options, detector)
    if head is not None:
        head = head[0].to(device), None if head[1] is None else head[1].to(device)
    return head, facts


def as_line(key: str) -> str:
    """A key as it is; as JSON where it has a line's end or what cannot be printed, or begins as JSON does."""
    return key if key.isprintable() and not key.startswith('"') else json.dumps(key)


def ready(path: str) -> Path:
    """The path, its folder made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)
