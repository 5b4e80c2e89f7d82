from __future__ import annotations

import pytest
import torch

from imbdiff.data import class_groups, long_tail_counts
from imbdiff.errors import InputError


def test_thirds_leave_the_remainder_to_the_tail() -> None:
    counts = long_tail_counts(5000.0, 10, 100, "exponential")
    assert class_groups(counts, "thirds") == {"head": (0, 1, 2), "medium": (3, 4, 5), "tail": (6, 7, 8, 9)}
    hundred = class_groups(long_tail_counts(500.0, 100, 100, "exponential"), "thirds")
    assert hundred == {"head": tuple(range(33)), "medium": tuple(range(33, 66)), "tail": tuple(range(66, 100))}


def test_images_in_the_thirds_are_the_published_ones() -> None:
    for n_max, classes, images in ((5000.0, 10, [9793, 2109, 504]), (500.0, 100, [8615, 1841, 391])):
        counts = long_tail_counts(n_max, classes, 100, "exponential")
        assert [sum(counts[c] for c in group) for group in class_groups(counts, "thirds").values()] == images


def test_counts_rule() -> None:
    hundred = class_groups(long_tail_counts(500.0, 100, 100, "exponential"), "counts")
    assert {name: len(group) for name, group in hundred.items()} == {"head": 35, "medium": 35, "tail": 30}
    assert class_groups([101, 100, 20, 19], "counts") == {"head": (0,), "medium": (1, 2), "tail": (3,)}


def test_counts_rule_leaves_empty_groups_out() -> None:
    ten = class_groups(long_tail_counts(5000.0, 10, 100, "exponential"), "counts")
    assert ten == {"head": tuple(range(8)), "medium": (8, 9)}


def test_ranked_by_count_and_stable() -> None:
    assert class_groups(torch.tensor([5, 9, 5, 7, 5, 1]), "thirds") == {
        "head": (1, 3),
        "medium": (0, 2),
        "tail": (4, 5),
    }


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3], {"head": (0,)}),
        ([3, 8], {"head": (1,), "tail": (0,)}),
        ([3, 8, 5], {"head": (1,), "medium": (2,), "tail": (0,)}),
        ([4, 3, 2, 1], {"head": (0,), "medium": (1,), "tail": (2, 3)}),
    ],
)
def test_few_classes(counts: list[int], expected: dict[str, tuple[int, ...]]) -> None:
    assert class_groups(counts, "thirds") == expected


def test_unknown_rule() -> None:
    with pytest.raises(InputError, match=r"'halves'.*--data\.groups"):
        class_groups([1, 2], "halves")  # type: ignore[arg-type]
