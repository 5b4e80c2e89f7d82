"""The memorisation ratio: copies, fresh images, and the mean over subsets by enumeration."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import pytest
import torch
from torch import Tensor

from imbdiff.data.images import ImageSet
from imbdiff.evaluation.memorisation import expected_nearest, memorisation


def images(counts: list[int], seed: int) -> ImageSet:
    g = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    pixels = torch.randint(0, 256, (len(labels), 1, 4, 4), generator=g, dtype=torch.uint8)
    return ImageSet(pixels, labels, tuple("abcdef"[: len(counts)]), f"set {seed}")


@pytest.mark.parametrize(("n", "size"), [(1, 1), (5, 1), (5, 2), (6, 5), (6, 6), (9, 4)])
def test_expectation_is_the_mean_over_all_subsets(n: int, size: int) -> None:
    distances = torch.rand(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    subsets = list(itertools.combinations(range(n), size))
    expected = torch.stack([distances[:, list(s)].amin(1) for s in subsets]).mean(0)
    torch.testing.assert_close(expected_nearest(distances, size), expected, rtol=1e-13, atol=0)


def test_weights_hold_where_binomials_overflow() -> None:
    n, size = 5000, 2500
    for k in (1, 2, 30):
        # The k-th candidate at distance one, all others at zero before it: picks out the tail sum of the weights.
        distances = torch.cat([torch.zeros(k - 1), torch.ones(n - k + 1)]).double()[None]
        exact = float(Fraction(comb(n - k + 1, size), comb(n, size)))  # none of the k - 1 nearest is drawn
        assert float(expected_nearest(distances, size)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("size", [0, 4])
def test_subset_size_is_checked(size: int) -> None:
    with pytest.raises(ValueError, match=r"size must lie in 1\.\.3"):
        expected_nearest(torch.zeros(1, 3), size)


def brute(fake: ImageSet, others: ImageSet, c: int) -> float:
    def unit(s: ImageSet) -> Tensor:
        return s.images[s.labels == c].flatten(1).double() / 127.5 - 1

    return float(torch.cdist(unit(fake), unit(others)).amin(1).mean())


def test_distances_are_those_of_pixels_in_minus_one_to_one() -> None:
    fake, train, held_out = images([5, 7], 0), images([4, 6], 1), images([4, 6], 2)
    found = memorisation(fake, train, held_out)
    a, b = ([brute(fake, s, c) for c in (0, 1)] for s in (train, held_out))
    assert found.to_train.tolist() == pytest.approx(a, rel=1e-12)
    assert found.to_held_out.tolist() == pytest.approx(b, rel=1e-12)
    assert found.ratio([1]) == pytest.approx(a[1] / b[1])
    assert found.ratio([0, 1]) == pytest.approx(sum(a) / sum(b))
    assert found.left_out == ()
    assert found.biased_low == ()


def test_copies_give_zero_exactly() -> None:
    train = images([3, 8], 3)
    fake = train.take(torch.tensor([0, 1, 2, 2, 5, 9]))
    assert memorisation(fake, train, images([20, 20], 4)).ratio([0, 1]) == 0.0


def test_fresh_images_give_one_whatever_the_sizes() -> None:
    # One law for all three sets. Nearest of 400 held-out images would be much closer than nearest of 4 training images.
    found = memorisation(images([300, 300], 5), images([4, 100], 6), images([400, 400], 7))
    assert found.ratio([0]) == pytest.approx(1, abs=0.06)
    assert found.ratio([1]) == pytest.approx(1, abs=0.03)
    uneven = float(torch.tensor(brute(images([300, 300], 5), images([400, 400], 7), 0)))
    assert float(found.to_train[0]) / uneven > 1.2


def test_classes_that_cannot_be_compared_are_named() -> None:
    found = memorisation(images([5, 5, 0, 5], 8), images([4, 4, 4, 0], 9), images([4, 0, 4, 4], 10))
    assert found.left_out == (1, 2, 3)
    assert found.ratio([1, 2, 3]) is None
    assert found.ratio([0, 1]) == found.ratio([0])


def test_fewer_held_out_than_training_images_are_flagged() -> None:
    assert memorisation(images([5, 5], 11), images([9, 4], 12), images([4, 9], 13)).biased_low == (0,)


def test_no_ratio_when_held_out_images_are_drawn_too() -> None:
    held_out = images([3], 14)
    assert memorisation(held_out, images([3], 15), held_out).ratio([0]) is None
