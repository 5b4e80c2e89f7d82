"""Everything a run needs to know of its data, from one DataConfig."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imbdiff.data.config import DataConfig
from imbdiff.data.groups import class_groups
from imbdiff.data.images import ImageSet
from imbdiff.data.longtail import long_tail_indices, ranked_classes, split_hash
from imbdiff.data.sources import load_source
from imbdiff.errors import InputError


@dataclass(frozen=True)
class TrainingData:
    """The images of a source and the long-tailed split of them that the run trains on."""

    pool: ImageSet
    """All images of the source."""
    train_index: Tensor
    """Positions in the pool of the training images, int64."""
    counts: Tensor
    """Training images of each class, int64 [C]."""
    groups: dict[str, tuple[int, ...]]
    """Classes of "head", "medium" and "tail"."""
    split_hash: str
    """SHA-256 of the split: two runs with the same hash saw the same images."""

    @cached_property
    def train(self) -> ImageSet:
        return self.pool.take(self.train_index)

    @cached_property
    def held_out(self) -> ImageSet:
        """Images of the source that are not in the split, in file order; empty for the profile "given"."""
        free = torch.ones(len(self.pool), dtype=torch.bool)
        free[self.train_index] = False
        return self.pool.take(free.nonzero()[:, 0])


def load_training_data(config: DataConfig) -> TrainingData:
    """Load the source and cut the split that `config` describes."""
    if config.profile == "given" and (config.class_order or config.rotate):
        raise InputError(
            "profile 'given' keeps the class counts of the data, so --data.class-order and --data.rotate have no "
            "effect: leave them out or set --data.profile"
        )
    pool = load_source(config)
    index = long_tail_indices(
        pool.labels,
        pool.num_classes,
        ratio=config.ratio,
        profile=config.profile,
        class_order=ranked_classes(pool.num_classes, config.class_order, config.rotate),
        seed=config.split_seed,
        class_names=pool.class_names,
    )
    labels = pool.labels[index]
    counts = torch.bincount(labels, minlength=pool.num_classes)
    return TrainingData(pool, index, counts, class_groups(counts, config.groups), split_hash(index, labels))
