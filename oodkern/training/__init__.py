"""Training with auxiliary outliers: level 3 of use."""

from oodkern.detector import Detector, Prediction
from oodkern.detector import load as load_run
from oodkern.training.evaluation import Evaluation, evaluate
from oodkern.training.launch import train
from oodkern.training.run import Run
from oodkern.training.stage import NotFinite

__all__ = ["Detector", "Evaluation", "NotFinite", "Prediction", "Run", "evaluate", "load_run", "train"]
