"""Pools of outliers: their features on disk, clusters of these, and the samples that training takes from them."""

from oodkern.pools.clustering import KMeans, kmeans
from oodkern.pools.sampling import cluster_sample
from oodkern.pools.store import CHUNK_ROWS, FeatureStore, PoolError, Shard, StoreWriter

__all__ = [
    "CHUNK_ROWS",
    "FeatureStore",
    "KMeans",
    "PoolError",
    "Shard",
    "StoreWriter",
    "cluster_sample",
    "kmeans",
]
