"""What generated images are measured against, and the two rows that say what a number means.

Copies of the training images show what memorising would score; fresh real images, which no run trained on and the
reference does not hold, show what a perfect model would score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imbdiff.data import ImageSet, TrainingData
from imbdiff.errors import InputError
from imbdiff.evaluation.selection import shuffled

FEWEST = 10
"""A class with fewer unseen images than this gives none to the fresh row."""


@dataclass(frozen=True)
class ComparisonSets:
    """Disjoint but for `train`, which the reference of a run's own source holds too."""

    reference: ImageSet
    train: ImageSet
    held_out: ImageSet | None
    """Unseen images for the memorisation ratio; None where every image was trained on."""
    fresh: ImageSet | None


def comparison_sets(data: TrainingData, per_class: int, external: ImageSet | None = None) -> ComparisonSets:
    """For a run on `data`: measured against an external reference, or against its own source but the fresh images.

    The fresh images are at most as many as a run's `per_class` samples of each class, so that both rows have one N.
    """
    if external is not None and external.num_classes != data.pool.num_classes:
        raise InputError(
            f"the reference {external.name} has {external.num_classes} classes, the training data "
            f"{data.pool.num_classes}; they must be the same classes in the same order"
        )
    unseen = data.held_out if external is None else named_as(external, data.pool)
    unseen = unseen.take(shuffled(len(unseen), 0))
    if not len(unseen):
        return ComparisonSets(renamed(data.train, "the training images themselves"), data.train, None, None)
    fresh = fresh_index(unseen, data.groups, per_class)
    left = torch.ones(len(unseen), dtype=torch.bool)
    left[fresh] = False
    held_out = unseen.take(left.nonzero()[:, 0])
    if external is None:
        reference = renamed(joined(held_out, data.train), f"{data.pool.name}, all images but the fresh ones")
    else:
        reference = renamed(held_out, f"{external.name}, but the fresh images")
    return ComparisonSets(reference, data.train, held_out, unseen.take(fresh) if len(fresh) else None)


def fresh_index(unseen: ImageSet, groups: Mapping[str, Sequence[int]], per_class: int) -> Tensor:
    """The same number for each group, evenly over its classes; the group that has least gives two thirds of them."""
    counts = unseen.counts.tolist()
    able = {name: [c for c in classes if counts[c] >= FEWEST] for name, classes in groups.items()}
    if not all(able.values()):
        return torch.empty(0, dtype=torch.int64)
    spare = min(len(classes) * (2 * min(counts[c] for c in classes) // 3) for classes in able.values())
    total = min(spare, *(per_class * len(classes) for classes in groups.values()))
    chosen = []
    for classes in able.values():
        share, rest = divmod(total, len(classes))
        chosen += [(unseen.labels == c).nonzero()[: share + (i < rest), 0] for i, c in enumerate(classes)]
    return torch.cat(chosen)


def copies(train: ImageSet, per_class: int) -> ImageSet:
    """`per_class` training images of each class, in turn, again and again."""
    index = []
    for c in train.counts.nonzero()[:, 0].tolist():
        own = (train.labels == c).nonzero()[:, 0]
        index.append(own[torch.arange(per_class) % len(own)])
    return renamed(train.take(torch.cat(index)), "copies of training images")


def joined(a: ImageSet, b: ImageSet) -> ImageSet:
    return ImageSet(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels]), a.class_names, a.name)


def renamed(images: ImageSet, name: str) -> ImageSet:
    return ImageSet(images.images, images.labels, images.class_names, name)


def named_as(images: ImageSet, other: ImageSet) -> ImageSet:
    """The same images with the class names of `other`: files of one data set often name its classes differently."""
    return ImageSet(images.images, images.labels, other.class_names, images.name)
