"""Cached features of the outliers to train with: given ones, or made and made anew by the model that is trained."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig
from oodkern.data import DataError, OODSplit
from oodkern.outlier_sets import evaluating
from oodkern.pools.extraction import extract, fingerprint, image_keys
from oodkern.pools.manifest import read_manifest
from oodkern.pools.store import FeatureStore
from oodkern.processes import Processes
from oodkern.schema import AUTO
from oodkern.training.evaluation import evenly_spaced
from oodkern.training.matching import digests, images_of

KNOWN = 4096  # ID images whose features a policy may be given
KEPT = 2  # own extractions: a checkpoint is of the last one, or of the one before
ROWS = 1 << 16  # whose keys are read at a time
DTYPES = ("float16", "bfloat16")


class PoolFeatures:
    """`store` has a row for each candidate: row i is of image `images[i]` of the training outliers.

    Candidates are the outliers that have a row in the given pool, or all of them; `opened` is that pool as it is, with
    what else is in it.
    """

    def __init__(
        self,
        config: TrainConfig,
        split: OODSplit,
        model: Classifier,
        processes: Processes,
        log: Callable[[str], None],
    ) -> None:
        """Opens what is given, if any. Raises ConfigError, naming the key."""
        self.config, self.split, self.processes, self.log = config, split, processes, log
        self.given = "" if config.outliers.pool == AUTO else config.outliers.pool
        self.folder = config.folder / "pool"
        self.candidates = torch.arange(len(split.outliers))
        self.epoch, self.own = 0, ""  # of the extraction, and its folder's name
        self.store: FeatureStore
        self.opened: FeatureStore | None = None
        if not self.given:
            return
        processes.once(lambda: self._open(model, verify=True) and None)  # one looks at all bytes, for all
        opened = self._open(model, verify=False)
        self._take(opened)
        if not len(self.images):
            raise ConfigError(
                f"outliers.pool: expected features of the outliers to train with, {len(split.outliers):,} images; "
                f"none of the {len(opened):,} rows in {self.given} is of one of them"
            )
        self.candidates = self.images.sort().values
        log(
            f"pool {self.given}: {len(opened):,} rows of {opened.dimension} features; {len(self.images):,} of the "
            f"{len(split.outliers):,} outliers to train with have one"
        )
        if config.pretrain.epochs == 0:  # the model is the starting one
            self.check_fingerprint(model)

    def _open(self, model: Classifier, verify: bool) -> FeatureStore:
        try:
            store = FeatureStore.open(Path(self.given).expanduser(), verify=verify)
        except (DataError, OSError, ImportError) as error:
            raise ConfigError(f"outliers.pool: {error}") from None
        if store.dimension != model.head.in_features:
            raise ConfigError(
                f"outliers.pool: expected features of dimension {model.head.in_features}, which the model's head "
                f"takes, got {store.dimension} in {self.given}"
            )
        if not store.has_keys:
            raise ConfigError(
                f"outliers.pool: expected the images' keys beside features, as `oodkern extract` writes them, got none "
                f"in {self.given}"
            )
        return store

    def _take(self, store: FeatureStore) -> None:
        """Of a store the rows whose images are candidates."""
        count = len(self.candidates)
        if store.has_keys:
            try:
                ours = digests(image_keys(self.split.outliers, self.candidates), count)
            except DataError as error:
                raise ConfigError(f"outliers.pool: data.outliers: {error}") from None
            keys = (key for rows in torch.arange(len(store)).split(ROWS) for key in store.keys(rows))
            found = torch.from_numpy(images_of(digests(keys, len(store)), ours))
        else:  # made here, of images in memory, none of which is ever left out
            found = torch.arange(count)
        rows = (found >= 0).nonzero().flatten()
        self.opened, self.images = store, self.candidates[found[rows]]
        self.store = store if len(rows) == len(store) else store.subset(rows)

    def check_fingerprint(self, model: Classifier) -> None:
        """Whether the given features are those of the starting model."""
        assert self.opened is not None
        if self.opened.fingerprint == fingerprint(model):
            return
        theirs = "another model" if self.opened.fingerprint else "an unknown model"
        if self.config.outliers.policy == "poem":
            raise ConfigError(
                f"outliers.policy: poem sets outliers beside ID images, and the features in {self.given} are of "
                f"{theirs} than the starting one; expected outliers.pool=auto, or another policy"
            )
        self.log(f"pool {self.given}: its features are of {theirs}; they are scored by the head of the trained one")

    def due(self, epoch: int) -> bool:
        """Whether they are made anew before a choice in an epoch, the first choice apart."""
        every = self.config.outliers.extract_every
        return bool(every) and epoch // every != self.epoch // every

    def begin(self, model: Classifier) -> None:
        """Before the first choice, with the starting model."""
        if not self.given:
            self.extract(model, 0)
        elif self.config.pretrain.epochs:
            self.check_fingerprint(model)

    def extract(self, model: Classifier, epoch: int) -> None:
        """Made anew by a model; a killed run goes on with the shards that are there."""
        self.epoch, self.own = epoch, f"epoch-{epoch}"
        self.processes.once(lambda: self._forget(fingerprint(model)))
        outliers = self.split.outliers
        dtype = "float16" if self.opened is None else str(self.opened.dtype).removeprefix("torch.")
        store = extract(
            model,
            outliers if len(self.candidates) == len(outliers) else outliers.select(self.candidates),
            self.folder / self.own,
            source=self.config.data.outliers or self.split.name,
            dtype=dtype if dtype in DTYPES else "float32",
            workers=self.config.data.workers,
            processes=self.processes,
        )
        self._take(store)

    def _forget(self, now: str) -> None:
        """Own features that no checkpoint needs, since every epoch ends with one; and begun ones of another model."""
        epochs = (path.name.removeprefix("epoch-") for path in self.folder.glob("epoch-*"))
        before = sorted((int(one) for one in epochs if one.isdecimal() and int(one) < self.epoch), reverse=True)
        for one in before[KEPT - 1 :]:
            shutil.rmtree(self.folder / f"epoch-{one}", ignore_errors=True)
        try:
            theirs = json.loads((self.folder / self.own / "manifest.json").read_text())["fingerprint"]
        except (OSError, ValueError, LookupError, TypeError):
            theirs = ""
        if theirs != now:
            shutil.rmtree(self.folder / self.own, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        opened = self.opened
        shape = [] if opened is None else [len(opened), opened.dimension]
        return {
            "epoch": self.epoch,
            "own": self.own,
            "shape": shape,
            "fingerprint": "" if opened is None else opened.fingerprint,
            "digest": "" if opened is None else digest_of(opened),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError where the features that the state goes on with are gone, or others."""
        self.epoch, self.own = state["epoch"], state["own"]
        if self.own:
            try:
                self._take(FeatureStore.open(self.folder / self.own, verify=False))
            except DataError as error:
                raise ConfigError(f"outliers.pool: the run goes on with features that are gone: {error}") from None
        if state != (now := self.state_dict()):
            before, found = (
                f"{one['shape']} of the model {one['fingerprint'][:12] or 'that is unknown'}, SHA-256 "
                f"{one['digest'][:12]}"
                for one in (state, now)
            )
            where = self.folder / self.own if self.own else self.given
            raise ConfigError(
                f"outliers.pool: the run in {self.config.folder} has features {before}, got {found} in {where}"
            )


def digest_of(store: FeatureStore) -> str:
    """SHA-256, in hex, of the checksums of what a pool has in which row."""
    shards = read_manifest(store.path).shards
    return hashlib.sha256(
        "".join(f"{one.rows} {one.sha256} {one.keys_sha256}\n" for one in shards).encode()
    ).hexdigest()


@torch.no_grad()
def features_of(model: Classifier, split: OODSplit, batch_size: int = 256) -> Tensor:
    """Features [n, D] of at most KNOWN ID images to train with, evenly spaced, on the model's device."""
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for some in evenly_spaced(len(split.train), KNOWN).split(batch_size):
            images, there = split.train.readable(some)
            if len(there):
                found.append(model.features(images.to(device)).float())
    return torch.cat(found)
