"""The policy that `oodkern select` was asked for, and the pools that it is of."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
OPTIONS = tuple(dict.fromkeys(name for names in POLICIES.values() for name in names))


def typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def as_typed(error: ValueError) -> str:
    """What a policy says of an argument, as it is called here."""
    name, colon, rest = str(error).partition(":")
    return f"{typed(name)}:{rest}" if colon and name in (*OPTIONS, "count") else str(error)


def policy_of(options: argparse.Namespace, pool: FeatureStore, head: Head | None, facts: Mapping[str, Any]) -> Any:
    """The policy with the options that were given. Raises ConfigError, naming the option."""
    from oodkern.config import ConfigError
    from oodkern.pools.policies import POLICIES as KINDS

    given = {name: value for name in POLICIES[options.policy] if (value := getattr(options, name)) is not None}
    if "score" in POLICIES[options.policy]:
        given.setdefault("score", suited_score(facts))
    if given.pop("one_way", False):
        given["two_way"] = False
    classes = facts.get("classes")
    if options.absent_class and isinstance(classes, list) and head is not None and len(head[0]) <= len(classes):
        raise ConfigError(
            f"--absent-class: expected a head with a class more than the run's {len(classes)}, got {len(head[0])}"
        )
    if options.policy == "margin" and options.threshold is None:
        given["threshold"] = threshold_of(options, facts)
    if options.policy == "poem":
        if options.known is None:
            raise ConfigError("--known: expected a pool of ID images, as `oodkern extract RUN id` makes it, for poem")
        suffix = Path(options.known).suffix
        dtype, name = options.dtype if suffix == ".npy" else None, options.name if suffix not in ("", ".npy") else None
        known = opened(options.known, options, dtype=dtype, name=name)
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
        raise ConfigError(f"--threshold: expected a number, since the run's is at temperature {facts['temperature']}")
    return float(threshold)


def plain_options(policy: Any) -> list[str]:
    """Names of a policy's settings that are numbers and words."""
    return [one.name for one in dataclasses.fields(policy) if isinstance(getattr(policy, one.name), int | float | str)]


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
