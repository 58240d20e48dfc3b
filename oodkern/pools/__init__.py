"""Pools of outliers: clusters of their features, and the samples that training takes from them."""

from oodkern.pools.clustering import KMeans, kmeans
from oodkern.pools.sampling import cluster_sample

__all__ = ["KMeans", "cluster_sample", "kmeans"]
