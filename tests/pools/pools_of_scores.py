"""Pools whose energies are known to the bit: the logit of a head of one class is the first feature, and E = -z."""

import numpy as np
import torch

from oodkern.pools.store import FeatureStore, StoreWriter

HEAD = (torch.tensor([[1.0, 0.0, 0.0, 0.0]]), None)


def scores_with(kind, N, seed):
    """Scores that every floating dtype has: multiples of a power of two."""
    random = np.random.default_rng(seed)
    if kind == "ties":
        return random.integers(-20, 20, N).astype(np.float32) / 4
    scores = random.permutation(N).astype(np.float32)
    high = np.float32(2.0) ** (scores // 128 - 3) * (128 + scores % 128)  # 8 bits of each, as bfloat16 has
    scores = np.where(random.integers(0, 2, N) == 0, high, -high).astype(np.float32)
    if kind == "NaN":
        scores[random.permutation(N)[: N // 5]] = np.nan
    return scores


def pool_of(scores, dtype=torch.float16, others=None):
    """A store whose rows have these energies under HEAD; `others` [N, 3] are the rest of their features."""
    features = torch.zeros(len(scores), 4)
    features[:, 0] = -torch.from_numpy(scores)
    if others is not None:
        features[:, 1:] = others
    return FeatureStore.of(features.to(dtype))


def sharded(folder, features, rows):
    """A store of shards of so many rows."""
    N, D = features.shape
    dtype = str(features.dtype).removeprefix("torch.")
    writer = StoreWriter(folder, rows=N, dimension=D, dtype=dtype, shard_rows=rows, keys=False)
    for shard in range(writer.shards):
        writer.write(shard, features[shard * rows : (shard + 1) * rows], None)
    writer.finish()
    return FeatureStore.open(folder)
