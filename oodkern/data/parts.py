"""The parts of a data set, read once: what each image is known by, and which files cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oodkern.data.duplicates import Fingerprints, fingerprints, is_flat, joined, repeated
from oodkern.data.images import DataError, FileSet, ImageSet
from oodkern.data.pictures import as_tensor, fitted
from oodkern.data.stream import ignore_interrupts, relayed

BATCH = 256
ID_PARTS, OUTLIER_PARTS = ("train", "validation", "test"), ("outliers", "outlier_validation")


class Fingerprinted(Dataset):
    """Item b: the fingerprints of the readable images of batch b, their indices, and the errors of the others."""

    def __init__(self, images: ImageSet, indices: Tensor) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return -(-len(self.indices) // BATCH)

    def __getitem__(self, batch: int) -> tuple[Fingerprints, list[int], list[str]]:
        indices = self.indices[batch * BATCH : (batch + 1) * BATCH]
        if not isinstance(self.images, FileSet):
            return fingerprints(self.images.images(indices)), indices.tolist(), []
        found, made, errors = [], [], []
        for index in indices.tolist():
            try:
                picture = self.images.picture(index)
            except DataError as error:
                errors.append(str(error))
                continue
            made.append(as_tensor(fitted(picture, self.images.size, self.images.resize)))
            found.append(index)
        images = torch.stack(made) if made else torch.empty(0, *self.images.shape)
        return fingerprints(images), found, errors


def as_it_is(item: Any) -> Any:
    return item


@dataclass
class Part:
    """One part of a data set, what was read of it, and what each image is known by."""

    name: str  # train, validation, test, outliers, outlier_validation, ood.NAME
    images: ImageSet
    classes: tuple[str, ...] = ()  # of an ID part
    prints: Fingerprints = field(default_factory=lambda: joined([]))
    indices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of the images that were read
    errors: list[str] = field(default_factory=list)

    def read(self, limit: int, workers: int, progress: bool) -> None:
        """Reads all images, or `limit` of them at even distances, in `workers` processes."""
        from tqdm import tqdm

        count = len(self.images)
        indices = torch.arange(count) if not 0 < limit < count else torch.arange(limit) * count // limit
        batches = Fingerprinted(self.images, indices)
        made: Iterator[tuple[Fingerprints, list[int], list[str]]] = map(batches.__getitem__, range(len(batches)))
        if workers and len(batches) > 1:
            options: dict[str, Any] = {"collate_fn": as_it_is, "worker_init_fn": ignore_interrupts}
            made = relayed(DataLoader(batches, batch_size=None, num_workers=workers, **options))
        prints, found = [], []
        with tqdm(total=len(indices), desc=self.title, unit=" images", disable=not progress, leave=False) as bar:
            for some, theirs, errors in made:
                prints.append(some)
                found += theirs
                self.errors += errors
                bar.update(len(theirs) + len(errors))
        self.prints, self.indices = joined(prints), np.array(found, np.int64)

    @property
    def title(self) -> str:
        if self.name.startswith("ood."):
            return f"OOD {self.name[4:]}"
        return self.name.replace("_", " ") if self.name in OUTLIER_PARTS else f"ID {self.name}"

    @property
    def counts(self) -> list[int]:
        """Images of each class of an ID part."""
        labels = self.images.labels
        if labels.dim() == 2:
            return (labels != 0).sum(0).tolist()
        return torch.bincount(labels[labels >= 0], minlength=len(self.classes)).tolist() if self.classes else []

    def where(self, index: int) -> str:
        """An image for people: its file, or its number in the part."""
        return self.images.name(index) if isinstance(self.images, FileSet) else f"{self.title}, image {index:,}"

    def facts(self) -> dict[str, Any]:
        counts = self.counts
        per_class = None
        if counts:
            least, most = (int(np.argmin(counts)), int(np.argmax(counts)))
            per_class = {"classes": len(counts), "least": [self.classes[least], counts[least]]}
            per_class["most"] = [self.classes[most], counts[most]]
        return {
            "images": len(self.images),
            "read": len(self.indices) + len(self.errors),
            "unreadable": len(self.errors),
            "repeated": repeated(self.prints),
            "flat": int(is_flat(self.prints).sum()),
            "per_class": per_class,
        }
