"""What is wrong with the parts of a data set before anything is trained: `oodkern check-data`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from oodkern.data.damage import ONE_IN
from oodkern.data.duplicates import FINE, SAME, Near, fine_likeness, near_duplicates, same_pixels
from oodkern.data.images import FileSet, ImageSet
from oodkern.data.options import DataConfig
from oodkern.data.parts import BATCH, ID_PARTS, OUTLIER_PARTS, Part
from oodkern.data.sources import as_opened
from oodkern.data.split import OODSplit, without_shared_images

SHOWN = 24  # pairs of a finding
NAMED = 5  # unreadable files


@dataclass
class Pair:
    """An image of a part and its like in another part."""

    left: int
    right: int
    kind: str  # file (equal bytes), pixels, same (picture), alike
    likeness: float = 1.0
    mirrored: bool = False


@dataclass
class Finding:
    """Something wrong, or that a person should look at; pairs are the likest, SHOWN at most."""

    level: str  # error, warning
    kind: str  # unreadable, empty, classes, duplicates, alike, skipped
    text: str
    parts: tuple[Part, ...] = ()
    count: int = 0
    pairs: list[Pair] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"level": self.level, "kind": self.kind, "text": self.text, "count": self.count}
        found["parts"] = [part.name for part in self.parts]
        if self.pairs:
            left, right = self.parts
            found["pairs"] = [
                {
                    "images": [left.where(pair.left), right.where(pair.right)],
                    "kind": pair.kind,
                    "likeness": round(pair.likeness, 4),
                    "mirrored": pair.mirrored,
                }
                for pair in self.pairs
            ]
        return found


@dataclass
class Inspection:
    """All parts and findings of a configuration."""

    split: OODSplit
    parts: dict[str, Part]
    findings: list[Finding]
    left_out: dict[str, int]  # what training leaves out by itself, by the reason
    limit: int

    @property
    def clean(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)

    def record(self) -> dict[str, Any]:
        return {
            "data": self.split.name,
            "clean": self.clean,
            "shape": list(self.split.train.shape),
            "classes": list(self.split.classes),
            "limit": self.limit,
            "parts": {name: part.facts() for name, part in self.parts.items()},
            "left_out": self.left_out,
            "findings": [finding.record() for finding in self.findings],
        }


def inspect(data: DataConfig, limit: int = 0, progress: bool = False) -> Inspection:
    """Reads every image, or `limit` of each part, and finds what is wrong.

    Errors: a picture of the outliers or of an OOD set that is an ID picture, an outlier that is a picture of the test,
    a part that is empty or of which more than one file in 1,000 cannot be read. Warnings: pictures that are alike, ID
    pictures that are in two parts, classes of outliers or OOD that the ID set has (which training leaves out), classes
    without images, fewer unreadable files. Memory is 288 bytes for an image.
    """
    split = as_opened(data)
    named = {name: getattr(split, name) for name in (*ID_PARTS, *OUTLIER_PARTS)}
    named |= {f"ood.{name}": images for name, images in split.test_ood.items()}
    parts = {name: Part(name, images, split.classes if name in ID_PARTS else ()) for name, images in named.items()}
    for part in parts.values():
        part.read(limit, data.workers, progress)
    findings = [
        *shared_classes(split.namesakes),
        *(one for part in parts.values() for one in alone(part)),
        *unreadable(parts),
    ]
    for left, right in compared_parts(parts):
        findings += shared(left, right)
    findings.sort(key=lambda finding: finding.level != "error")
    return Inspection(split, parts, findings, without_shared_images(split).left_out, limit)


def shared_classes(namesakes: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    for source, names in namesakes.items():
        listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        text = f"{source}: {classes(len(names))} of the ID set too, and left out in training: {listed}"
        yield Finding("warning", "classes", text, (), len(names))


def alone(part: Part) -> Iterator[Finding]:
    """What is wrong with a part by itself."""
    if not len(part.images):
        yield Finding("error", "empty", f"{part.title}: no images", (part,))
    missing = [name for name, count in zip(part.classes, part.counts, strict=True) if not count]
    if missing and len(part.images):
        listed = ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else "")
        yield Finding("warning", "classes", f"{part.title}: {classes(len(missing))} without images: {listed}", (part,))


def unreadable(parts: Mapping[str, Part]) -> Iterator[Finding]:
    """What cannot be read of each set as it was opened, of which several parts may be."""
    sets: dict[int, list[Part]] = {}
    for part in parts.values():
        sets.setdefault(id(getattr(part.images, "damage", part)), []).append(part)
    for found in sets.values():
        errors = [error for part in found for error in part.errors]
        if errors:
            read = sum(len(part.indices) for part in found) + len(errors)
            names = "; ".join(errors[:NAMED]) + ("; ..." if len(errors) > NAMED else "")
            titles = ", ".join(part.title for part in found)
            text = f"{titles}: {len(errors):,} of {read:,} files cannot be read: {names}"
            level = "error" if len(errors) > max(1, read // ONE_IN) else "warning"
            yield Finding(level, "unreadable", text, tuple(found), len(errors))


def compared_parts(parts: Mapping[str, Part]) -> list[tuple[Part, Part]]:
    """Pairs of parts that should share no picture."""
    ood = [name for name in parts if name.startswith("ood.")]
    names = [*itertools.product((*OUTLIER_PARTS, *ood), ID_PARTS), *itertools.product(OUTLIER_PARTS, ood)]
    names += [("test", "train"), ("test", "validation"), ("validation", "train")]
    return [(parts[left], parts[right]) for left, right in names]


def shared(left: Part, right: Part) -> Iterator[Finding]:
    """The pictures of `left` that are in `right` too."""
    exact = same_pixels(left.prints, right.prints)
    rest = np.setdiff1d(np.arange(len(left.prints)), exact[:, 0])
    near = near_duplicates(left.prints.at(rest), right.prints)
    same = one_picture(left, right, rest, near)
    pairs = [Pair(int(left.indices[i]), int(right.indices[j]), "pixels") for i, j in exact[:SHOWN]]
    for pair in pairs:
        if equal_bytes(left.images, pair.left, right.images, pair.right):
            pair.kind = "file"
    order = np.argsort(-near.likeness, kind="stable")
    likest = {kind: order[same[order] == (kind == "same")][:SHOWN] for kind in ("same", "alike")}
    of_kind = {
        kind: [
            Pair(
                int(left.indices[rest[near.pairs[k, 0]]]),
                int(right.indices[near.pairs[k, 1]]),
                kind,
                float(near.likeness[k]),
                bool(near.mirrored[k]),
            )
            for k in chosen
        ]
        for kind, chosen in likest.items()
    }
    both = (left, right)
    if count := len(exact) + int(same.sum()):
        how = f"{len(exact):,} of equal pixels, {count - len(exact):,} coded, cut or mirrored otherwise"
        level = "warning" if left.name in ID_PARTS else "error"
        text = f"{left.title}: {pictures(count)} also in {right.title} ({how})"
        yield Finding(level, "duplicates", text, both, count, (pairs + of_kind["same"])[:SHOWN])
    if looks := int((~same).sum()):
        text = f"{left.title}: {pictures(looks)} like one in {right.title}, and may be the same"
        yield Finding("warning", "alike", text, both, looks, of_kind["alike"])
    if near.skipped:
        text = f"{left.title}: {pictures(near.skipped)} not compared with all of {right.title}: too many like hashes"
        yield Finding("warning", "skipped", text, both, near.skipped)


def classes(count: int) -> str:
    return "1 class is" if count == 1 else f"{count:,} classes are"


def pictures(count: int) -> str:
    return "1 picture is" if count == 1 else f"{count:,} pictures are"


def one_picture(left: Part, right: Part, rest: np.ndarray, near: Near) -> np.ndarray:
    """Which [M] of the pairs are one picture: of those that could be the images are read once more."""
    same = near.likeness >= SAME
    chosen = np.flatnonzero(same)
    for at in range(0, len(chosen), BATCH):
        some = chosen[at : at + BATCH]
        one = left.images.images(torch.from_numpy(left.indices[rest[near.pairs[some, 0]]]))
        other = right.images.images(torch.from_numpy(right.indices[near.pairs[some, 1]]))
        same[some] = fine_likeness(one, other, near.mirrored[some]) >= FINE
    return same


def equal_bytes(left: ImageSet, i: int, right: ImageSet, j: int) -> bool:
    if not isinstance(left, FileSet) or not isinstance(right, FileSet):
        return False
    return left.content(i) == right.content(j)
