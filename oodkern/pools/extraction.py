"""Features of images on disk: a pool, made shard by shard by one process or several, and gone on with when killed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodkern.classifier import Classifier
from oodkern.data.images import DataError, FileSet, ImageSet
from oodkern.ops._checks import check_choice, check_count
from oodkern.outlier_sets import evaluating
from oodkern.pools.heartbeat import Heartbeat
from oodkern.pools.manifest import read_object, sidecar_file
from oodkern.pools.reading import ReadableBatches
from oodkern.pools.store import FeatureStore, PoolError, StoreWriter
from oodkern.processes import ALONE, Processes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_ROWS = 262_144  # 64 MiB of 128 features in 16 bits


def fingerprint(classifier: Classifier) -> str:
    """SHA-256, in hex, of what makes features: all weights and buffers but the head's, and the normalisation.

    Of each tensor of the state dict, by name: name, dtype, shape and bytes, whatever the memory format and the device.
    """
    head = f"model.{classifier.head_name}." if classifier.head_name else "model."
    found = hashlib.sha256()
    for name, value in sorted(classifier.state_dict().items()):
        if name.startswith(head) or not isinstance(value, Tensor):
            continue
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def image_keys(images: ImageSet, indices: Tensor | None = None) -> Iterator[str]:
    """What tells each image from others: a real path, REALPATH:OFFSET in a tar, pixels:HEX of images in memory.

    Of the set, or of its indices [M] in their order. Raises PoolError where the set does not know.
    """
    some = images if indices is None else images.select(indices)
    count = 0
    for identity in some.identities():
        count += 1
        if isinstance(identity, bytes):
            yield f"pixels:{identity.hex()}"
        else:
            yield ":".join(map(str, identity)) if isinstance(identity, tuple) else str(identity)
    if count != len(some):
        raise PoolError(f"images: expected a set that tells its images apart, which a {type(images).__name__} does not")


def knows_keys(images: ImageSet) -> bool:
    return next(iter(images.select(torch.tensor([0])).identities()), None) is not None


class Extraction:
    """What `extract` does, in two steps: the plan, which says what is missing, and the work.

    `missing` are this process's shards that are not there yet; `rows` how many images they are, `whole` whether the
    pool was complete when it was looked at. The first process has the folder locked from the plan to the end of `run`.
    """

    def __init__(
        self,
        classifier: Classifier,
        images: ImageSet,
        folder: str | os.PathLike,
        *,
        source: str = "",
        dtype: str = "float16",
        shard_rows: int = SHARD_ROWS,
        batch_size: int = 256,
        workers: int = 0,
        progress: bool = False,
        processes: Processes = ALONE,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(classifier, Classifier):
            raise TypeError(f"classifier: expected an oodkern.classifier.Classifier, got {type(classifier).__name__}")
        check_choice(dtype, "dtype", tuple(DTYPES))
        for name, value, least in (
            ("shard_rows", shard_rows, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
        ):
            check_count(value, name, least)
        if not len(images):
            raise ValueError("images: expected one at least, got none")
        self.classifier, self.images, self.folder = classifier, images, Path(folder)
        self.dtype, self.shard_rows, self.batch_size, self.workers = DTYPES[dtype], shard_rows, batch_size, workers
        self.progress, self.processes = progress, processes
        self.keys = knows_keys(images)
        facts = dict(facts or {})
        if isinstance(images, FileSet):
            facts["images"] = self._digest()
        head = classifier.head
        plan: Any = {
            "rows": len(images),
            "dimension": head.in_features,
            "dtype": dtype,
            "shard_rows": shard_rows,
            "fingerprint": fingerprint(classifier),
            "source": source,
            "facts": facts,
            "head": (head.weight.detach().cpu(), None if head.bias is None else head.bias.detach().cpu()),
            "keys": self.keys,
        }

        def planned() -> None:
            self.writer = StoreWriter(self.folder, **plan, exclusive=True)

        processes.once(planned)  # of several processes one locks the folder and writes the plan, the others find it
        if not processes.first:
            self.writer = StoreWriter(self.folder, **plan, first=False)
        try:
            self._look()
        except BaseException:
            self.writer.close()
            raise

    def _look(self) -> None:
        """What is missing. Whether a shard is there is known by its checksum: each process looks at some, for all."""
        own = range(self.processes.rank, self.writer.shards, self.processes.count)
        lists = self.processes.objects([shard for shard in own if not self.writer.done(shard)])
        lacking = sorted(shard for some in lists for shard in some)
        self.whole = self.processes.once(lambda: not lacking and self.writer.complete)
        self.missing = lacking[self.processes.rank :: self.processes.count]
        self.rows = sum(map(self.writer.planned_rows, self.missing))

    def _digest(self) -> str:
        """Of the keys: a folder that has other files by now is another plan, and its shards would be of two sets."""
        found = hashlib.sha256()
        for key in image_keys(self.images):
            found.update(key.encode(errors="surrogateescape") + b"\0")
        return found.hexdigest()

    def run(self) -> FeatureStore:
        """Makes what is missing; on every process the pool. See `extract`."""
        try:
            if not self.whole:
                with Heartbeat(self.processes) as heartbeat:
                    self._work(heartbeat)
                self._count_damage()
                self.processes.once(self._finish)
        finally:
            self.writer.close()
        return FeatureStore.open(self.folder, verify=False)

    @torch.no_grad()
    def _work(self, heartbeat: Heartbeat) -> None:
        from tqdm import tqdm

        device = next(self.classifier.parameters()).device
        batches = ReadableBatches(self.images, self.missing, self.shard_rows, self.batch_size)
        shown: Any = {"desc": "features", "unit": " images", "unit_scale": True, "leave": False}
        shown["disable"] = not (self.progress and self.processes.first)
        made: tuple[Tensor, Tensor] | None = None
        count = 0
        with evaluating(self.classifier), tqdm(total=self.rows, **shown) as bar:
            for shard, images, there, rows, last in batches.read(self.workers, pin_memory=device.type == "cuda"):
                if made is None:
                    made, count = self._empty(shard), 0
                if len(there):
                    found = self.classifier.features(images.to(device, non_blocking=True))
                    for kept, some in zip(made, (self._narrowed(found, there), there), strict=True):
                        kept[count : count + len(there)] = some
                    count += len(there)
                if last:
                    features, indices = (one[:count] for one in made)
                    keys = list(image_keys(self.images, indices)) if self.keys else None
                    self.writer.write(shard, features, keys)
                    made = None
                bar.update(rows)
                heartbeat.beat()

    def _empty(self, shard: int) -> tuple[Tensor, Tensor]:
        """Room for a shard's features and indices."""
        rows = min(self.shard_rows, len(self.images) - shard * self.shard_rows)
        return torch.empty(rows, self.classifier.head.in_features, dtype=self.dtype), torch.empty(
            rows, dtype=torch.int64
        )

    def _narrowed(self, features: Tensor, indices: Tensor) -> Tensor:
        """Features as they are stored, on the CPU."""
        if features.dim() != 2 or features.shape[1] != self.classifier.head.in_features:
            raise ValueError(
                f"classifier: expected features [N, {self.classifier.head.in_features}], what its head takes, got "
                f"{list(features.shape)}"
            )
        stored = features.to(self.dtype).cpu()
        if not stored.isfinite().all():
            self._complain(features.cpu(), stored, indices)
        return stored

    def _complain(self, features: Tensor, stored: Tensor, indices: Tensor) -> None:
        row = int((~stored.isfinite()).any(1).nonzero()[0])
        key = f"image {int(indices[row]):,}"
        if self.keys:
            key = next(image_keys(self.images, indices[row : row + 1]))
        if not features[row].isfinite().all():
            raise PoolError(f"{key}: its features are not finite; the model is broken, or its statistics are")
        raise PoolError(
            f"{key}: a feature of {float(features[row].abs().max()):,.0f} is beyond the range of "
            f"{str(self.dtype).removeprefix('torch.')} ({torch.finfo(self.dtype).max:,.0f}); take bfloat16"
        )

    def _count_damage(self) -> None:
        """Raises DataError, everywhere, where all processes together found more unreadable images than may be."""
        damage = getattr(self.images, "damage", None)
        if damage is not None:
            damage.note(*sorted({number for found in self.processes.objects(damage.found) for number in found}))

    def _finish(self) -> None:
        """The first process's part. Raises DataError where shards made before lack more images than may be."""
        damage = getattr(self.images, "damage", None)
        there = sum(read_object(self.folder / sidecar_file(s))["rows"] for s in range(self.writer.shards))
        if damage is not None and len(self.images) - there > damage.limit:
            raise DataError(
                f"{self.folder}: {len(self.images) - there:,} of {len(self.images):,} images could not be read, and "
                f"more than {damage.limit:,} are an error; remove the folder when they can be"
            )
        self.writer.finish()


def extract(
    classifier: Classifier,
    images: ImageSet,
    folder: str | os.PathLike,
    *,
    source: str = "",
    dtype: str = "float16",
    shard_rows: int = SHARD_ROWS,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
    processes: Processes = ALONE,
    facts: Mapping[str, Any] | None = None,
) -> FeatureStore:
    """Penultimate features [N, D] of images, in their order, as a pool in a folder.

    The classifier is in evaluation mode, each module's own mode is restored, and no gradient is formed. Images that
    cannot be read are left out and counted (see ImageSet): the keys of the rows tell which are there. A shard is
    written at once when its rows are known, so that a killed extraction leaves whole shards alone, and the same call
    makes those that are missing. Batches do not reach over the end of a shard: a shard's bytes depend neither on what
    was there before nor on who makes it. They may depend on batch_size, the device and the number of threads, which
    change how products are rounded: none of these is in the plan.

    Args:
        classifier: on its device; its head (weight, bias) goes into the pool, with the fingerprint of the rest.
        images: of the shape that it takes.
        folder: of the pool, made where it is not there.
        source: what the images are, for people.
        dtype: float16, bfloat16 or float32.
        shard_rows: images a shard.
        batch_size, workers: images a forward pass, and processes that decode them (0: this one).
        progress: shows a bar, in images.
        processes: which share the missing shards, one after another; the first completes the pool when all are there.
        facts: plain values that the pool keeps. They are part of the plan, as is a digest of the files' keys; `run` and
            `checkpoint`, where the model lay, are not.

    Returns:
        the pool, on every process.

    Raises ValueError or TypeError for an argument out of its range, before any work; PoolError for a folder with a
    pool of another plan, with other files, or that another process writes to, and naming the image whose features are
    not finite, or beyond float16's range; DataError for too many unreadable images; Elsewhere where another process
    failed.
    """
    given: Any = {"source": source, "dtype": dtype, "shard_rows": shard_rows, "batch_size": batch_size}
    given |= {"workers": workers, "progress": progress, "processes": processes, "facts": facts}
    return Extraction(classifier, images, folder, **given).run()
