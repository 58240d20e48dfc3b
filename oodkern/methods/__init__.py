"""The training methods: which streams, which loss, which score. One file each."""

from oodkern.methods.base import BASELINE_SCORES, MULTI_LABEL_BASELINE_SCORES, Method, Setting, as_score
from oodkern.methods.cross_entropy import CrossEntropy
from oodkern.methods.edge import Edge
from oodkern.methods.energy import Energy
from oodkern.methods.greg import GReg, GRegPlus
from oodkern.methods.oal import OAL
from oodkern.methods.objective import Batch, Objective
from oodkern.methods.outlier_exposure import OutlierExposure
from oodkern.methods.separation import Separation

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (CrossEntropy, OutlierExposure, Energy, Edge, GReg, GRegPlus, Separation, OAL)
}

__all__ = [
    "BASELINE_SCORES",
    "METHODS",
    "MULTI_LABEL_BASELINE_SCORES",
    "OAL",
    "Batch",
    "CrossEntropy",
    "Edge",
    "Energy",
    "GReg",
    "GRegPlus",
    "Method",
    "Objective",
    "OutlierExposure",
    "Separation",
    "Setting",
    "as_score",
]
