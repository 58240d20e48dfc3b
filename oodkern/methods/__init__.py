"""The training methods: which streams, which loss, which score. One file each."""

from oodkern.methods.base import BASELINE_SCORES, MULTI_LABEL_BASELINE_SCORES, Method, as_score
from oodkern.methods.cross_entropy import CrossEntropy
from oodkern.methods.energy import Energy
from oodkern.methods.outlier_exposure import OutlierExposure

METHODS: dict[str, type[Method]] = {method.name: method for method in (CrossEntropy, OutlierExposure, Energy)}

__all__ = [
    "BASELINE_SCORES",
    "METHODS",
    "MULTI_LABEL_BASELINE_SCORES",
    "CrossEntropy",
    "Energy",
    "Method",
    "OutlierExposure",
    "as_score",
]
