"""Nearest neighbours for the manifold metrics: the two questions that precision, recall, density and coverage ask.

A Gram product screens, differences decide: |a|^2 + |b|^2 - 2 a.b of centred rows is fast but rounds, so whatever lies
within its error of the value it is compared with is computed again as sum (a - b)^2, bit-equal for equal pairs. So
copies of an image are at distance zero and ties at the radius stay ties, which a strict inequality must tell apart.
Cost: N*M*d multiplications in float64, memory chunk*M.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 512
# Rows that can be the k-th nearest after rounding: those screened just beyond it are looked at too.
SPARE = 4


def _direct(a: Tensor, b: Tensor) -> Tensor:
    """sum (a - b)^2 over the last dimension."""
    return (a - b).square().sum(-1)


def _screen(a: Tensor, b: Tensor, chunk: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, squared distances [chunk, M], their error bound [chunk, M]) of the rows of a [N, d] to b [M, d]."""
    centre = b.mean(0)
    b = b - centre
    norm_b = b.square().sum(1)
    # A dot product of d terms rounds by at most about d eps |a||b| <= d eps (|a|^2 + |b|^2) / 2.
    slack = 4 * (b.shape[1] + 8) * torch.finfo(b.dtype).eps
    for start in range(0, len(a), chunk):
        part = a[start : start + chunk] - centre
        scale = part.square().sum(1)[:, None] + norm_b
        yield start, torch.addmm(scale, part, b.T, alpha=-2), slack * scale


def knn_radius(x: Tensor, k: int, chunk: int = CHUNK) -> Tensor:
    """Squared distance [N] of each row of x [N, d] to its k-th nearest *other* row; a copy of the row is another row.

    Kynkaanniemi et al. 2019, section 2. Needs 1 <= k < N.
    """
    if not 1 <= k < len(x):
        raise ValueError(f"k must lie in 1..{len(x) - 1} for {len(x)} rows, got {k}")
    radius = x.new_empty(len(x))
    for start, squared, _ in _screen(x, x, chunk):
        rows = torch.arange(len(squared))
        squared[rows, start + rows] = torch.inf
        near = squared.topk(min(k + SPARE, len(x) - 1), largest=False).indices
        exact = _direct(x[start : start + chunk, None], x[near])
        radius[start : start + chunk] = exact.kthvalue(k).values
    return radius


def ball_count(query: Tensor, centre: Tensor, radius: Tensor, chunk: int = CHUNK) -> Tensor:
    """Balls, int64 [Q], that hold each row of query [Q, d]: ||query - centre_i||^2 < radius_i (squared, [N])."""
    count = torch.empty(len(query), dtype=torch.int64)
    for start, squared, error in _screen(query, centre, chunk):
        inside = squared < radius
        row, column = ((squared - radius).abs() <= error).nonzero(as_tuple=True)
        for r, c in zip(row.split(chunk * SPARE), column.split(chunk * SPARE), strict=True):
            inside[r, c] = _direct(query[start + r], centre[c]) < radius[c]
        count[start : start + chunk] = inside.sum(1)
    return count


def nearest(query: Tensor, rows: Tensor, chunk: int = CHUNK) -> Tensor:
    """Squared distance [Q] of each row of query [Q, d] to the nearest of rows [N, d]."""
    found = query.new_empty(len(query))
    for start, squared, _ in _screen(query, rows, chunk):
        near = squared.topk(min(1 + SPARE, len(rows)), largest=False).indices
        found[start : start + chunk] = _direct(query[start : start + chunk, None], rows[near]).amin(1)
    return found
