"""The nearest-neighbour core against plain enumeration, where copies and ties decide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imbdiff.evaluation.manifold import ball_count, knn_radius, nearest


def rows(n: int, d: int, seed: int, offset: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def all_pairs(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.stack([(x - y).square().sum() for y in b]) for x in a])


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("k", [1, 3, 29])
def test_radius_is_the_kth_other_distance(k: int, chunk: int) -> None:
    x = rows(30, 5, 0)
    pairs = all_pairs(x, x)
    expected = torch.stack([torch.cat([p[:i], p[i + 1 :]]).sort().values[k - 1] for i, p in enumerate(pairs)])
    torch.testing.assert_close(knn_radius(x, k, chunk), expected, rtol=1e-15, atol=0)


def test_a_copy_is_another_row() -> None:
    x = rows(6, 3, 1)
    twice = torch.cat([x, x])
    assert torch.equal(knn_radius(twice, 1), torch.zeros(12, dtype=torch.float64))
    assert (knn_radius(twice, 2) > 0).all()


@pytest.mark.parametrize("k", [0, 6, 7])
def test_radius_refuses_impossible_k(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.5"):
        knn_radius(rows(6, 2, 0), k)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("chunk", [3, 64, 512])
@pytest.mark.parametrize("d", [1, 2, 17, 64])
def test_a_tie_at_the_radius_is_outside(d: int, chunk: int, offset: float) -> None:
    # A set against itself: the ball of row i holds i and its k - 1 nearest; the k-th lies exactly on the radius.
    x = rows(200, d, 2, offset)
    radius = knn_radius(x, 4, chunk)
    pairs = all_pairs(x[:20], x)
    assert torch.equal(ball_count(x, x, radius, chunk)[:20], (pairs < radius).sum(1))
    assert int(ball_count(x, x, radius, chunk).sum()) == 4 * 200


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 3), st.integers(0, 10**6))
def test_counts_on_a_grid_full_of_ties(n: int, m: int, d: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    centre, query = (torch.randint(0, 4, (size, d), generator=g).double() / 3 + 100 for size in (n, m))
    radius = knn_radius(centre, 1 + seed % (n - 1))
    pairs = all_pairs(query, centre)
    assert torch.equal(ball_count(query, centre, radius), (pairs < radius).sum(1))
    assert torch.equal(nearest(query, centre), pairs.amin(1))


def test_nearest_is_zero_for_a_copy_far_from_the_origin() -> None:
    x = rows(50, 32, 3, offset=1e5)
    assert torch.equal(nearest(x[10:12], x, chunk=1), torch.zeros(2, dtype=torch.float64))
    others = torch.cat([x[:10], x[11:]])
    torch.testing.assert_close(nearest(x[10:11], others), all_pairs(x[10:11], others).amin(1), rtol=1e-15, atol=0)
