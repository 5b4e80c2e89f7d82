"""Labelled images in memory, their long-tailed splits and the order in which training sees them."""

from imbdiff.data.bundle import TrainingData, load_training_data
from imbdiff.data.config import DataConfig
from imbdiff.data.groups import class_groups, class_rank
from imbdiff.data.images import ImageSet, to_uint8, to_unit
from imbdiff.data.longtail import long_tail_counts, long_tail_indices, split_hash
from imbdiff.data.order import DataOrder
from imbdiff.data.sources import load_source

__all__ = [
    "DataConfig",
    "DataOrder",
    "ImageSet",
    "TrainingData",
    "class_groups",
    "class_rank",
    "load_source",
    "load_training_data",
    "long_tail_counts",
    "long_tail_indices",
    "split_hash",
    "to_uint8",
    "to_unit",
]
