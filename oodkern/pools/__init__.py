"""Pools of outliers: their features on disk, scores and clusters of these, and the samples that training takes.

store = FeatureStore.open("pool")
scores = score_pool(store, model.fc)
index = POLICIES["gregplus"]().select(store, model.fc, 10_000, torch.Generator().manual_seed(0))
"""

from oodkern.pools.clustering import KMeans, kmeans
from oodkern.pools.extraction import extract, fingerprint, image_keys
from oodkern.pools.minibatch import Assignment, assign, minibatch_kmeans
from oodkern.pools.policies import (
    DOS,
    NTOM,
    POEM,
    POLICIES,
    EnergyWindow,
    GRegPlus,
    LowestMargin,
    Policy,
    TopScore,
    Uniform,
)
from oodkern.pools.ranks import rank_slice
from oodkern.pools.sampling import cluster_sample
from oodkern.pools.scoring import PoolScores, score_pool
from oodkern.pools.store import CHUNK_ROWS, FeatureStore, PoolError, Shard, StoreWriter
from oodkern.pools.streaming import staged_chunks

__all__ = [
    "CHUNK_ROWS",
    "DOS",
    "NTOM",
    "POEM",
    "POLICIES",
    "Assignment",
    "EnergyWindow",
    "FeatureStore",
    "GRegPlus",
    "KMeans",
    "LowestMargin",
    "Policy",
    "PoolError",
    "PoolScores",
    "Shard",
    "StoreWriter",
    "TopScore",
    "Uniform",
    "assign",
    "cluster_sample",
    "extract",
    "fingerprint",
    "image_keys",
    "kmeans",
    "minibatch_kmeans",
    "rank_slice",
    "score_pool",
    "staged_chunks",
]
