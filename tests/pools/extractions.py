"""A small network, images of it on disk, and their features in shards of 10, by batches of 4."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from oodkern.classifier import Classifier
from oodkern.data import FolderSet
from oodkern.pools.extraction import extract

SHARD, BATCH = 10, 4


def network(scale=1.0):
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 5))
    made = Classifier(nn.Sequential(*layers), head="5", mean=[0.4] * 3, std=[0.3] * 3)
    with torch.no_grad():
        for _ in range(5):
            made(torch.rand(16, 3, 8, 8))
        made.model[1].weight *= scale
    return made


def folder_of(folder, count, damaged=()):
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    paths = [folder / f"{i:03d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(draws.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        if i in damaged:
            path.write_bytes(b"\x89PNG no image")
    return FolderSet(paths, torch.full((count,), -1), size=8)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def small(classifier, images, folder, **options):
    return extract(classifier, images, folder, **{"shard_rows": SHARD, "batch_size": BATCH, **options})
