"""Data sets with the four parts that training with auxiliary outliers needs."""

from oodkern.data.augment import vary
from oodkern.data.digits import load_digits
from oodkern.data.split import OODSplit
from oodkern.data.stream import stream

__all__ = ["OODSplit", "load_digits", "stream", "vary"]
