"""Losses with auxiliary outliers: level 2 of use. Plain tensors in, a scalar out."""

from oodkern.losses.classification import ClassificationLoss
from oodkern.losses.energy import EnergyLoss
from oodkern.losses.outlier_exposure import OutlierExposureLoss

__all__ = ["ClassificationLoss", "EnergyLoss", "OutlierExposureLoss"]
