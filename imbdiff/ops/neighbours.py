"""Nearest neighbours for manifold metrics: the radius of a row's neighbourhood, and who lies in whose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imbdiff.ops import _backends, _check
from imbdiff.ops._op import Op, call, register
from imbdiff.ops.reference import neighbours as reference


def knn_radius(x: Tensor, k: int, *, squared: bool = False) -> Tensor:
    r"""The distance of each row to its k-th nearest other row.

        out_i = k-th smallest over j != i of |x_i - x_j|               squared: of |x_i - x_j|^2

    Args:
        x: [N, ...] finite features, float32, float64, bfloat16 or float16; flattened to rows of D. A constant.
        k: 1 <= k < N. A copy of a row is another row, at distance 0.
        squared: leave out the square root. `ball_count` takes squared radii: a root that is squared again moves ties.
            A square that the type of the result does not hold is inf or 0, where its root may still be held.

    Returns:
        [N] float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, dtype or value; the message names it.

    Deterministic. A squared distance is that of the differences in float64, rounded once, so near ties come out alike
    on every back end. Time N^2 D, memory O(N) tiles. Equivalent torch code: `torch.cdist(x, x).kthvalue(k + 1).values`
    where that fits and no two rows are close; `imbdiff/ops/reference/neighbours.py`.
    Source: Kynkäänniemi et al. 2019, "Improved precision and recall", section 2. Used by the manifold metrics.
    """
    op = "knn_radius"
    _features(op, "x", x)
    N = len(x)
    if not 1 <= k < N:
        raise ValueError(f"{op}: k must lie in 1..N-1 = 1..{N - 1} for N = {N} rows, got {k!r}")
    _check.constant(op, "x", x)
    return call(op, _backends.choose(op, x, k), _check.rows(x), k, squared)[0]


def ball_count(points: Tensor, centers: Tensor, squared_radii: Tensor) -> tuple[Tensor, Tensor]:
    r"""How many balls hold each point, and how many points each ball holds.

        balls_per_point_i = #{j: |points_i - centers_j|^2 < squared_radii_j}
        points_per_ball_j = #{i: |points_i - centers_j|^2 < squared_radii_j}

    Args:
        points: [N, ...] finite features, float32, float64, bfloat16 or float16.
        centers: [M, ...] with points' row shape and dtype.
        squared_radii: [M], as `knn_radius(centers, k, squared=True)` gives them. They overflow where float32
            rows are 2e19 apart and vanish where they are 2e-23 apart, and so do distances, of which inf is then not
            inside inf, nor 0 inside 0: scale such rows first.

    Returns:
        [N] and [M] int64. No gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape or dtype; the message names it.

    Deterministic. The inequality is strict and a tie is outside: distances are computed and rounded as those of
    `knn_radius`, and compared in float32 (float64 for float64). Time N M D, memory O(N + M) tiles.
    Equivalent torch code: sums over `torch.cdist(points, centers).square() < squared_radii` where that fits;
    `imbdiff/ops/reference/neighbours.py`. Source: Kynkäänniemi et al. 2019, section 2; Naeem et al. 2020, "Reliable
    fidelity and diversity metrics", section 3. Used by precision, recall, density and coverage.
    """
    op = "ball_count"
    _features(op, "points", points)
    _check.tensor(op, "centers", centers, (None, *points.shape[1:]), "[M, ...] with points' row shape", like=points)
    _check.same_dtype(op, "points", points, "centers", centers)
    _features(op, "centers", centers)
    _check.tensor(op, "squared_radii", squared_radii, (len(centers),), "[M]", like=points)
    rows = [_check.rows(x.detach()) for x in (points, centers)]
    radii = squared_radii.detach().to(_check.accumulator(points.dtype)).contiguous()
    balls, inhabitants = call(op, _backends.choose(op, points), *rows, radii)
    return balls, inhabitants


def _features(op: str, name: str, x: Tensor) -> None:
    _check.tensor(op, name, x, symbols="[N, ...]")
    _check.finite(op, name, x)


def _fake_radius(backend: str, x: Tensor, k: int, squared: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=_check.accumulator(x.dtype))


def _fake_count(backend: str, points: Tensor, centers: Tensor, squared_radii: Tensor) -> Sequence[Tensor]:
    return tuple(x.new_empty(x.shape[0], dtype=torch.int64) for x in (points, centers))


register(Op("knn_radius", "neighbours", reference.knn_radius, _fake_radius))
register(Op("ball_count", "neighbours", reference.ball_count, _fake_count, outputs=2))
