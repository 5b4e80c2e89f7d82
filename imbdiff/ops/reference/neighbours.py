"""Reference of `imbdiff.ops.knn_radius` and `ball_count`: a Gram product screens, differences decide.

|a|^2 + |b|^2 - 2 a.b of centred rows in float64 is fast but rounds, so whatever lies within its error of the value that
it is compared with is computed again as sum (a - b)^2 in float64 and rounded once to the type of the result. So a copy
of a row is at distance zero, ties at a radius stay ties, which a strict inequality must tell apart, and the order of a
sum cannot be seen in float32. Cost: N M D multiplications, memory chunk * M.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator

_CHUNK = 512
# Rows that can be the k-th nearest after rounding: those screened just beyond it are looked at too.
_SPARE = 4


def _direct(a: Tensor, b: Tensor) -> Tensor:
    """sum (a - b)^2 over the last dimension."""
    return (a.double() - b.double()).square().sum(-1)


def _screen(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, squared distances [n, M], their error bound [n, M]) of the rows of a [N, D] to b [M, D]."""
    b = b.double()
    centre = b.mean(0)
    b = b - centre
    norm_b = b.square().sum(1)
    # A dot product of D terms rounds by at most about D eps |a||b| <= D eps (|a|^2 + |b|^2) / 2.
    slack = 4 * (b.shape[1] + 8) * torch.finfo(b.dtype).eps
    for start in range(0, len(a), _CHUNK):
        part = a[start : start + _CHUNK].double() - centre
        scale = part.square().sum(1)[:, None] + norm_b
        yield slice(start, start + len(part)), torch.addmm(scale, part, b.T, alpha=-2), slack * scale


def knn_radius(x: Tensor, k: int, squared: bool) -> Tensor:
    """[N] distance of each row to its k-th nearest other row, 1 <= k < N; a copy of the row is another row."""
    radius = x.new_empty(len(x), dtype=torch.float64)
    for rows, distance, _ in _screen(x, x):
        i = torch.arange(len(distance), device=x.device)
        distance[i, rows.start + i] = torch.inf
        near = distance.topk(min(k + _SPARE, len(x) - 1), largest=False).indices
        # A few rows at a time: the candidates' rows together are k + 4 times the chunk.
        exact = [_direct(x[rows][part, None], x[near[part]]) for part in i.split(32)]
        radius[rows] = torch.cat(exact).kthvalue(k).values
    return (radius if squared else radius.sqrt()).to(accumulator(x.dtype))


def ball_count(points: Tensor, centers: Tensor, squared_radii: Tensor) -> tuple[Tensor, Tensor]:
    """(balls that hold each point [N], points in each ball [M]), int64: |point - centre|^2 < squared radius."""
    acc = accumulator(points.dtype)
    balls, inhabitants = (x.new_zeros(len(x), dtype=torch.int64) for x in (points, centers))
    if len(centers) == 0:
        return balls, inhabitants
    radii, of_acc = squared_radii.to(acc), torch.finfo(acc)
    rounding = of_acc.eps * radii.double().clamp_min(of_acc.tiny)  # subnormal numbers lie equally far apart
    for rows, distance, error in _screen(points, centers):
        inside = distance < radii
        close = (distance - radii).abs() <= error + rounding
        for r, c in zip(*(index.split(_CHUNK) for index in close.nonzero(as_tuple=True)), strict=True):
            inside[r, c] = _direct(points[rows][r], centers[c]).to(acc) < radii[c]
        balls[rows] = inside.sum(1)
        inhabitants += inside.sum(0)
    return balls, inhabitants
