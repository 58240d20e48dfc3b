"""Losses with auxiliary outliers: level 2 of use. Plain tensors in, a scalar out."""

from oodkern.losses.classification import ClassificationLoss
from oodkern.losses.edge import EDGELoss
from oodkern.losses.energy import EnergyLoss
from oodkern.losses.greg import GRegLoss
from oodkern.losses.oal import OALLoss
from oodkern.losses.outlier_exposure import OutlierExposureLoss
from oodkern.losses.separation import SeparationLoss

__all__ = [
    "ClassificationLoss",
    "EDGELoss",
    "EnergyLoss",
    "GRegLoss",
    "OALLoss",
    "OutlierExposureLoss",
    "SeparationLoss",
]
