"""Samples that form groups, some more and some less."""

import torch

from oodkern.pools import seeding


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(N, D, groups, seed, spread=0.3):
    generator = seeded(seed)
    middle = torch.randn(groups, D, generator=generator)
    return middle[torch.randint(groups, (N,), generator=generator)] + spread * torch.randn(N, D, generator=generator)


def sphere(N, D, seed):
    return torch.nn.functional.normalize(torch.randn(N, D, generator=seeded(seed)))


DATA = {
    "blobs": lambda seed: (blobs(300, 8, 20, seed), 20),
    "more blobs than clusters": lambda seed: (blobs(400, 24, 60, seed), 16),
    "sphere": lambda seed: (sphere(384, 32, seed), 64),
    "plane": lambda seed: (torch.rand(500, 2, generator=seeded(seed)) + 100, 30),
    "line of unequal steps": lambda seed: (torch.rand(200, 1, generator=seeded(seed)) ** 4, 12),
}


def begin_with(monkeypatch, seeds):
    """Every restart of k-means begins with these seeds [k]."""
    monkeypatch.setattr(seeding, "among", lambda distance, uniform: seeds.expand(uniform.shape[1], -1))
    monkeypatch.setattr(seeding, "greedy", lambda rows, N, uniform: seeds.expand(uniform.shape[1], -1))
