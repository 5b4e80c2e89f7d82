"""knn_radius and ball_count against plain enumeration and scikit-learn, where copies and ties decide."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imbdiff import ops
from imbdiff.ops import _backends

from .rules import back_ends

F64 = torch.float64


def rows(n, d, seed, offset=0.0, dtype=F64):
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64) + offset).to(dtype)


def all_pairs(a, b):
    return torch.stack([torch.stack([(x.double() - y.double()).square().sum() for y in b]) for x in a])


def brute_radius(x, k):
    return torch.stack([torch.cat([p[:i], p[i + 1 :]]).sort().values[k - 1] for i, p in enumerate(all_pairs(x, x))])


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3, 29])
def test_radius_is_the_kth_other_distance(k, dtype):
    x = rows(30, 5, 0, dtype=dtype)
    acc = F64 if dtype == F64 else torch.float32
    squared = ops.knn_radius(x, k, squared=True)
    assert squared.dtype == acc
    torch.testing.assert_close(squared, brute_radius(x, k).to(acc), rtol=1e-15 if acc == F64 else 0, atol=0)
    torch.testing.assert_close(ops.knn_radius(x, k), squared.sqrt())


@pytest.mark.parametrize("k", [1, 5])
def test_against_scikit_learn(k):
    from sklearn.neighbors import NearestNeighbors

    x = rows(300, 24, 1, offset=2.0)
    theirs = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(x.numpy()).kneighbors(x.numpy())[0][:, k]
    torch.testing.assert_close(ops.knn_radius(x, k), torch.from_numpy(theirs), rtol=1e-7, atol=0)


@pytest.mark.parametrize("k", [1, 4])
def test_against_prdc(k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from prdc import compute_prdc

        real, fake = rows(90, 6, 2), rows(70, 6, 3, offset=0.4)
        theirs = compute_prdc(real.numpy(), fake.numpy(), k)
    balls, inhabitants = ops.ball_count(fake, real, ops.knn_radius(real, k, squared=True))
    back = ops.ball_count(real, fake, ops.knn_radius(fake, k, squared=True))[0]
    ours = {
        "precision": (balls > 0).double().mean(),
        "recall": (back > 0).double().mean(),
        "density": balls.double().mean() / k,
        "coverage": (inhabitants > 0).double().mean(),
    }
    assert {n: float(v) for n, v in ours.items()} == pytest.approx({n: float(v) for n, v in theirs.items()}, abs=1e-12)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_copy_is_another_row_far_from_the_origin_too(dtype):
    x = rows(6, 3, 1, offset=1e4, dtype=dtype)
    twice = torch.cat([x, x])
    assert not ops.knn_radius(twice, 1).any()
    assert (ops.knn_radius(twice, 2) > 0).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("d", [1, 2, 17, 64])
def test_a_tie_at_the_radius_is_outside(d, offset, dtype):
    # A set against itself: the ball of row i holds i and its k - 1 nearest; the k-th lies exactly on the radius.
    x = rows(600, d, 2, offset, dtype)
    radius = ops.knn_radius(x, 4, squared=True)
    balls, inhabitants = ops.ball_count(x, x, radius)
    pairs = all_pairs(x[:5], x).to(dtype)
    # In float64 a sum in another order moves the tie by its last digits; in float32 nothing does.
    inner = radius * (1 - 1e-14) if dtype == F64 else radius
    assert torch.equal(balls[:5], (pairs < inner).sum(1))
    # In one dimension and float32 a few rows share a distance, so that fewer lie strictly inside.
    ties = 600 * 4 - int(inhabitants.sum())
    assert ties == 0 if dtype == F64 or d > 2 else 0 <= ties < 60


def test_radii_that_differ_in_the_last_digit():
    """Rows 0.5 + j 2^-23 on a line: every distance is a multiple of the last digit, and each is told from the next."""
    x = (0.5 + torch.arange(40.0) * 2**-23)[:, None] * torch.ones(1, 4)
    squared = ops.knn_radius(x, 3, squared=True)
    assert torch.equal(squared, brute_radius(x, 3).float())
    balls, _ = ops.ball_count(x, x, squared)
    assert torch.equal(balls, (all_pairs(x, x).float() < squared).sum(1))


@pytest.mark.parametrize("n", [3100, 8300])
def test_blocks_of_every_size(n):
    """The reference's results to the last bit."""
    x = rows(n, 6, 4, dtype=torch.float32)
    with ops.use("reference"):
        want = ops.knn_radius(x, 3, squared=True)
        counts = ops.ball_count(x[:700], x, want)
    assert torch.equal(ops.knn_radius(x, 3, squared=True), want)
    for got, count in zip(ops.ball_count(x[:700], x, want), counts, strict=True):
        assert torch.equal(got, count)


@pytest.mark.parametrize("backend", back_ends("knn_radius", "cpu"))
@pytest.mark.parametrize("scale", [1e25, 1e19, 1e-22, 1e-25, 0.0])
def test_squares_that_float32_does_not_hold(scale, backend):
    """What overflows or vanishes while rows are screened is decided by differences in float64 all the same.

    At the outermost scales radii are inf or 0, and of other rows none is inside: what rounds to the radius is a tie.
    """
    x = (rows(300, 5, 5) * scale).float()
    pairs = (x.double()[:, None] - x.double()).square().sum(2)
    with ops.use(backend):
        radius, root = (ops.knn_radius(x, 4, squared=squared) for squared in (True, False))
        balls, inhabitants = ops.ball_count(x, x, radius)
    others = pairs.masked_fill(torch.eye(len(x), dtype=torch.bool), torch.inf)
    fourth = others.sort(1).values[:, 3]
    assert torch.equal(radius, fourth.float())
    torch.testing.assert_close(root.double(), fourth.sqrt(), rtol=1e-7, atol=0)
    if scale in (1e25, 1e-25):
        assert torch.equal(balls, (pairs.diagonal() < radius).long())
    inside = pairs.float() < radius
    assert torch.equal(balls, inside.sum(1))
    assert torch.equal(inhabitants, inside.sum(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 3), st.integers(0, 10**6))
def test_counts_on_a_grid_full_of_ties(n, m, d, seed):
    g = torch.Generator().manual_seed(seed)
    centers, points = (torch.randint(0, 4, (size, d), generator=g).double() / 4 + 100 for size in (n, m))
    radius = ops.knn_radius(centers, 1 + seed % (n - 1), squared=True)
    assert torch.equal(radius, brute_radius(centers, 1 + seed % (n - 1)))
    inside = all_pairs(points, centers) < radius
    balls, inhabitants = ops.ball_count(points, centers, radius)
    assert torch.equal(balls, inside.sum(1))
    assert torch.equal(inhabitants, inside.sum(0))


def test_images_and_nothing_at_all():
    x = torch.randn(6, 2, 3, 3)
    assert torch.equal(ops.knn_radius(x, 2), ops.knn_radius(x.flatten(1), 2))
    for n, m in ((0, 6), (6, 0), (0, 0)):
        balls, inhabitants = ops.ball_count(x[:n], x[:m], torch.ones(m))
        assert (balls.tolist(), inhabitants.tolist()) == ([0] * n, [0] * m)


y = torch.randn(5, 3)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((y, 0), ValueError, r"k must lie in 1..N-1 = 1..4 for N = 5 rows, got 0"),
        ((y, 5), ValueError, "for N = 5 rows, got 5"),
        ((y[:1], 1), ValueError, "for N = 1 rows, got 1"),
        (([1.0], 1), TypeError, "x must be a tensor"),
        ((y.long(), 1), TypeError, "x must be one of float32"),
        ((torch.full((3, 2), torch.nan), 1), ValueError, "x must be finite, got nan"),
        ((y.clone().requires_grad_(), 1), ValueError, r"x is a constant of this operation; pass x.detach\(\)"),
    ],
)
def test_refusals_of_the_radius(args, error, text):
    with pytest.raises(error, match=f"knn_radius: .*{text}"):
        ops.knn_radius(*args)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((y, y[:, :2], torch.ones(5)), ValueError, "centers must be .* = \\[any, 3\\]"),
        ((y, y.double(), torch.ones(5)), TypeError, "centers must have points's dtype"),
        ((y, y, torch.ones(4)), ValueError, r"squared_radii must be \[M\] = \[5\]"),
        ((y, y / 0, torch.ones(5)), ValueError, "centers must be finite, got"),
        ((y, y.to("meta"), torch.ones(5)), ValueError, "centers must be on cpu"),
    ],
)
def test_refusals_of_the_count(args, error, text):
    with pytest.raises(error, match=f"ball_count: {text}"):
        ops.ball_count(*args)


def test_a_back_end_that_limits_k_refuses_more(monkeypatch):
    limited = _backends.Capability("cpu", (torch.float32,), most=(3, "neighbours"))
    monkeypatch.setitem(_backends.CAPABILITIES["knn_radius"], "cpu", limited)
    x = torch.randn(9, 2)
    with ops.use("cpu"), pytest.raises(ValueError, match="takes at most 3 neighbours, got 4"):
        ops.knn_radius(x, 4)
    with ops.use("reference"):
        want = ops.knn_radius(x, 4)
    assert torch.equal(ops.knn_radius(x, 4), want)  # another takes it
