"""Training with auxiliary outliers: level 3 of use."""

from oodkern.training.evaluation import Evaluation, evaluate
from oodkern.training.trainer import NotFinite, Run, train

__all__ = ["Evaluation", "NotFinite", "Run", "evaluate", "train"]
