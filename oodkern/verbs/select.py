"""`oodkern select`."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodkern.verbs.common import EXIT_CODES, EXIT_OK
from oodkern.verbs.extract import CHECKPOINTS, facts_of, loaded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oodkern.pools.store import FeatureStore

    Head = tuple[Tensor, Tensor | None]

# Of each policy, its options by their names here; `oodkern.pools.policies` has their defaults and what they mean.
CLUSTERED = ("clusters", "score", "absent_class")
POLICIES = {
    "uniform": (),
    "energy-window": ("low", "high", "score"),
    "ntom": ("quantile", "score", "absent_class"),
    "margin": ("threshold", "score"),
    "top-k": ("score", "largest"),
    "poem": ("known",),
    "dos": CLUSTERED,
    "gregplus": (*CLUSTERED, "one_way"),
}
HEADLESS = ("uniform", "poem")  # which look at no head
OPTIONS = tuple(dict.fromkeys(name for names in POLICIES.values() for name in names))

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
    from oodkern.pools.scoring import score_pool
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
    policy = policy_of(options, pool, facts)
    try:
        chosen = policy.select(pool, head, options.count, torch.Generator().manual_seed(options.seed))
    except ValueError as error:
        raise ConfigError(as_typed(error)) from None
    found: dict[str, Any] = {"pool": options.pool, "rows": len(pool), "skipped": list(pool.skipped)}
    found |= {name: getattr(options, name) for name in ("policy", "run", "count", "seed", "out", "names")}
    found |= {"options": {name: getattr(policy, name) for name in plain_options(policy)}, "plot": None}
    if head is not None:
        score = getattr(policy, "score", suited_score(facts))
        name = score.removeprefix("-")
        scores = score_pool(pool, head, (name,), device=device, progress=sys.stderr.isatty())[name]
        found |= {"score": name, **selection_record(scores, scores[chosen.numpy()])}
        found["plot"] = options.plot or str(Path(options.out).with_suffix(".svg"))
        drawn = selection_figure(scores, scores[chosen.numpy()], options.policy, name)
        write_text(ready(found["plot"]), drawn)
    if options.names:
        write_text(ready(options.names), "".join(f"{as_line(key)}\n" for key in pool.keys(chosen)))
    buffer = io.BytesIO()
    np.save(buffer, pool.numbers(chosen).numpy())
    write_bytes(ready(options.out), buffer.getvalue())  # last: where it is there all of it is
    if options.json:
        print(json.dumps(found, indent=2))
        return EXIT_OK
    if head is not None:
        print(f"{selection_table(found, found['score'])}\n")
    print(f"{options.policy} chose {options.count:,} of {len(pool):,} rows: {options.out}")
    print(f"The histograms are in {found['plot']}" if found["plot"] else "No head, and so no scores and no plot: --run")
    return EXIT_OK


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for an option of another policy, naming it."""
    from oodkern.config import ConfigError

    for name in OPTIONS:
        if getattr(options, name) is not None and name not in POLICIES[options.policy]:
            those = ", ".join(policy for policy, names in POLICIES.items() if name in names)
            raise ConfigError(f"{typed(name)}: counts with --policy {those}, got it with {options.policy}")


def typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def as_typed(error: ValueError) -> str:
    """What a policy says of an argument, as it is called here."""
    name, colon, rest = str(error).partition(":")
    return f"{typed(name)}:{rest}" if colon and name in (*OPTIONS, "count") else str(error)


def opened(path: str, options: argparse.Namespace, **how: Any) -> FeatureStore:
    """A pool; tells what was left out of it."""
    from oodkern.config import ConfigError
    from oodkern.pools.store import FeatureStore

    try:
        pool = FeatureStore.open(path, skip_damaged=options.skip_damaged, verify=not options.no_verify, **how)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    for line in pool.skipped:
        print(f"oodkern select: left out, {line}", file=sys.stderr)
    return pool


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


def policy_of(options: argparse.Namespace, pool: FeatureStore, facts: Mapping[str, Any]) -> Any:
    """The policy with the options that were given. Raises ConfigError, naming the option."""
    from oodkern.config import ConfigError
    from oodkern.pools.policies import POLICIES as KINDS

    given = {name: value for name in POLICIES[options.policy] if (value := getattr(options, name)) is not None}
    if "score" in POLICIES[options.policy]:
        given.setdefault("score", suited_score(facts))
    if given.pop("one_way", False):
        given["two_way"] = False
    if options.policy == "margin" and options.threshold is None:
        given["threshold"] = threshold_of(options, facts)
    if options.policy == "poem":
        if options.known is None:
            raise ConfigError("--known: expected a pool of ID images, as `oodkern extract RUN id` makes it, for poem")
        known = opened(options.known, options)
        if known.fingerprint != pool.fingerprint:
            print(
                f"oodkern select: warning: the features of {options.known} and {options.pool} are of different models",
                file=sys.stderr,
            )
        given["known"] = known
    try:
        return KINDS[options.policy](**given)
    except ValueError as error:
        raise ConfigError(as_typed(error)) from None


def suited_score(facts: Mapping[str, Any]) -> str:
    """What is lowest for what is most like in-distribution."""
    return "-joint_energy" if facts.get("multi_label") else "energy"


def threshold_of(options: argparse.Namespace, facts: Mapping[str, Any]) -> float:
    """The run's own, where it is one of the score that margin goes by, at temperature 1."""
    from oodkern.config import ConfigError

    score, threshold = facts.get("score"), facts.get("threshold")
    if facts.get("checkpoint") == "baseline":
        raise ConfigError("--threshold: expected a number, since the run's is not that of its starting model")
    own, asked = f"-{score}" if score != "energy" else score, options.score or suited_score(facts)
    if asked != own or not isinstance(threshold, int | float):
        raise ConfigError(f"--threshold: expected a number, since the run's score is {own}, and margin goes by {asked}")
    if facts.get("temperature", 1.0) != 1.0:
        raise ConfigError(f"--threshold: expected a number, since the run's is at temperature {facts['temperature']:g}")
    return float(threshold)


def plain_options(policy: Any) -> list[str]:
    """Names of a policy's settings that are numbers and words."""
    return [one.name for one in dataclasses.fields(policy) if isinstance(getattr(policy, one.name), int | float | str)]


def as_line(key: str) -> str:
    """A key as it is; as JSON where it has a line's end or what cannot be printed, or begins as JSON does."""
    return key if key.isprintable() and not key.startswith('"') else json.dumps(key)


def ready(path: str) -> Path:
    """The path, its folder made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)
