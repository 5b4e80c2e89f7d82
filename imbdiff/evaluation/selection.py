"""Which images a row of the report is computed from: equally many in every group, evenly over its classes.

FID, precision, recall, density and coverage all depend on N, so a tail group measured on fewer images than the head
would differ from it for that reason alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imbdiff import random


def most_even(available: Sequence[int]) -> int:
    """The largest N that splits over classes with so many images each with no two counts further apart than one."""
    return len(available) * min(available) + sum(n > min(available) for n in available) if available else 0


def even_counts(available: Sequence[int], total: int) -> list[int]:
    """`total` split over the classes as evenly as it goes; the remainder to the first classes that have one more."""
    base, rest = divmod(total, len(available))
    if total > most_even(available):
        raise ValueError(f"{total} images cannot be split evenly over classes with {list(available)}")
    counts = []
    for n in available:
        extra = int(rest > 0 and n > base)
        rest -= extra
        counts.append(base + extra)
    return counts


def shuffled(count: int, seed: int) -> Tensor:
    """A permutation of 0 .. count - 1 by the seed: files often lie in an order, by writer or by date."""
    return random.permutation(seed, "evaluation/order", count)


def take_evenly(labels: Tensor, classes: Sequence[int], total: int, order: Tensor) -> Tensor:
    """Positions, int64 [total], of the first images of each class in `order`, dealt in turn: one of each, then next.

    Dealt, because the splits of an inception score follow this order and must each hold every class.
    """
    if not total:
        return torch.empty(0, dtype=torch.int64)
    where = [order[labels[order] == c] for c in classes]
    counts = even_counts([len(w) for w in where], total)
    index = torch.cat([w[:n] for w, n in zip(where, counts, strict=True)])
    turn = torch.cat([torch.arange(n) for n in counts])
    return index[turn.argsort(stable=True)]
