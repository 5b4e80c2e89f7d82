"""Head, medium and tail: the groups of classes that long-tailed results are reported by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from imbdiff.data.config import GroupRule
from imbdiff.errors import InputError


def class_rank(counts: Sequence[int] | Tensor) -> list[int]:
    """Classes from most to least frequent; of two as frequent the lower label first."""
    sizes = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    return sorted(range(len(sizes)), key=lambda c: -sizes[c])


def class_groups(counts: Sequence[int] | Tensor, rule: GroupRule) -> dict[str, tuple[int, ...]]:
    """Classes of "head", "medium" and "tail", most frequent first; empty groups are left out.

    "thirds": equal thirds of the classes by rank, the remainder to the tail (10 classes: 3/3/4); two classes are head
    and tail, one is head. "counts" (OLTR): more than 100 images, 20..100, fewer than 20.
    """
    sizes = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    ranked = class_rank(sizes)
    if rule == "counts":
        groups = {
            "head": [c for c in ranked if sizes[c] > 100],
            "medium": [c for c in ranked if 20 <= sizes[c] <= 100],
            "tail": [c for c in ranked if sizes[c] < 20],
        }
    elif rule == "thirds":
        third = len(ranked) // 3
        # Fewer than three classes have no thirds; the most frequent one is the head all the same.
        head, medium = max(third, 1), max(third, 1) + third
        groups = {"head": ranked[:head], "medium": ranked[head:medium], "tail": ranked[medium:]}
    else:
        raise InputError(f"unknown rule of class groups {rule!r}: expected 'thirds' or 'counts'; set --data.groups")
    return {name: tuple(classes) for name, classes in groups.items() if classes}
