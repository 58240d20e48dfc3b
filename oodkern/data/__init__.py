"""Data sets with the parts that training with auxiliary outliers needs, and the streams that training reads."""

from oodkern.data.augment import AUGMENTATIONS, Augmentation, augmentation, random_numbers
from oodkern.data.images import ArraySet, DataError, FolderSet, ImageSet, SampleSet, read_image
from oodkern.data.options import DataConfig
from oodkern.data.sources import build_split, open_source
from oodkern.data.split import OODSplit
from oodkern.data.stream import Batches, stream

__all__ = [
    "AUGMENTATIONS",
    "ArraySet",
    "Augmentation",
    "Batches",
    "DataConfig",
    "DataError",
    "FolderSet",
    "ImageSet",
    "OODSplit",
    "SampleSet",
    "augmentation",
    "build_split",
    "open_source",
    "random_numbers",
    "read_image",
    "stream",
]
