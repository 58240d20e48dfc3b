"""Sets of images that could be outliers: opened as training would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from oodkern.data.images import ImageSet
from oodkern.data.options import OWN, kind_of
from oodkern.data.sources import open_unknown
from oodkern.data.split import OODSplit, seen_in, unseen


def source_of(text: str) -> str:
    """A source in full: what `data.outliers` takes, or the folder that stands for folder:PATH."""
    try:
        kind, _ = kind_of(text)
    except ValueError as error:
        if Path(text).expanduser().is_dir():
            return f"folder:{text}"
        raise ValueError(f"{error}, which is no folder either") from None
    if kind in (OWN, "digits-multilabel"):
        raise ValueError(f"expected a source that can be read as outliers, got {text!r}")
    return text


def open_candidates(sources: Mapping[str, str], split: OODSplit, number: int | None) -> dict[str, tuple[ImageSet, int]]:
    """The images of NAME: SOURCE as training would take them for outliers, and how many were left out.

    They are decoded to the channels and the size of the split, whose number is `number`; of a set with parts the
    training part is taken. Left out are images of the ID set, and of classes that bear the name of an ID class.

    Raises ValueError naming the set for a source that is none, DataError naming the file.
    """
    full = {}
    for name, source in sources.items():
        try:
            full[name] = source_of(source)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    seen = seen_in(split.train, split.validation, split.test)
    opened = {}
    for name, source in full.items():
        images, counted = open_unknown(split, source, "train", number)
        fresh = unseen(images, seen)
        namesakes = counted.namesake_images - split.namesake_images
        opened[name] = (fresh, namesakes + len(images) - len(fresh))
    return opened
