"""Reference of the contrast losses, rows [N, D]; an empty weight is all ones, no row to compare with gives 0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator
from imbdiff.ops.reference._vjp import vjp

SMALLEST_NORM = 1e-12


def negative_distance(
    x: Tensor, negatives: Tensor, weight: Tensor, scale: float, include_self: bool, per_row: bool, split_k: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], lse [N], saved [0]); split_k is the plan of back ends that have more than one."""
    acc = accumulator(x.dtype)
    N, M = x.shape[0], negatives.shape[0]
    count = N + M - (not include_self)
    rows, saved = x.to(acc), x.new_empty(0, dtype=acc)
    if N == 0 or count == 0:
        return rows.sum() * 0, rows.sum(1) * 0, saved
    energy = scale * _squared_distances(rows, negatives.to(acc))
    lse = (-energy if include_self else (-energy).masked_fill(_own(energy), -torch.inf)).logsumexp(1)
    if not per_row:
        return lse.logsumexp(0) - math.log(N * count), lse, saved
    return _weighted(lse - math.log(count), weight).sum() / N, lse, saved


def negative_distance_bwd(grad: Tensor, x: Tensor, negatives: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _, _, scale, include_self, per_row, _ = rest

    def loss(x: Tensor) -> Tensor:
        return negative_distance(x, negatives, weight, scale, include_self, per_row)[0]

    return vjp(loss, x)[1](grad)[0].contiguous()


def distance_hinge(x: Tensor, margin: float, scale: float, split_k: bool = False) -> tuple[Tensor, Tensor]:
    """(loss [], saved [0]): mean over i != j of max(0, margin - scale |x_i - x_j|^2)^2."""
    acc = accumulator(x.dtype)
    rows, N, saved = x.to(acc), x.shape[0], x.new_empty(0, dtype=acc)
    if N < 2:
        return rows.sum() * 0, saved
    short = (margin - scale * _squared_distances(rows, rows[:0])).relu()
    return short.masked_fill(_own(short), 0).square().sum() / (N * (N - 1)), saved


def distance_hinge_bwd(grad: Tensor, x: Tensor, saved: Tensor, margin: float, scale: float, split_k: bool) -> Tensor:
    return vjp(lambda x: distance_hinge(x, margin, scale)[0], x)[1](grad)[0].contiguous()


def cosine_contrastive(
    x: Tensor, negatives: Tensor, weight: Tensor, tau: float, include_self: bool, split_k: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], lse [N], saved [0]), lse_i = log sum_j e^((c_ij - 1)/tau) over the terms that count.

    With the self term, whose logit is 0, the loss is log1p of the others' sum: digits that lse - 1/tau would lose.
    """
    acc = accumulator(x.dtype)
    N, M = x.shape[0], negatives.shape[0]
    rows, saved = x.to(acc), x.new_empty(0, dtype=acc)
    if N == 0 or N + M == 1:
        return rows.sum() * 0, rows.sum(1) * 0, saved
    others = _cosine_logits(rows, negatives.to(acc), tau).logsumexp(1)
    lse = torch.logaddexp(others, torch.zeros_like(others)) if include_self else others
    terms = lse if include_self else lse + (1 / tau - math.log(N + M - 1))
    return _weighted(terms, weight).sum() / N, lse, saved


def cosine_contrastive_bwd(grad: Tensor, x: Tensor, negatives: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _, _, tau, include_self, _ = rest

    def loss(x: Tensor) -> Tensor:
        return cosine_contrastive(x, negatives, weight, tau, include_self)[0]

    return vjp(loss, x)[1](grad)[0].contiguous()


def supcon(
    x: Tensor, labels: Tensor, weight: Tensor, tau: float, split_k: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], lse [N], saved [0]), lse_i = log sum_(j != i) e^((c_ij - 1)/tau)."""
    acc = accumulator(x.dtype)
    rows, saved = x.to(acc), x.new_empty(0, dtype=acc)
    if len(x) < 2:
        return rows.sum() * 0, rows.sum(1) * 0, saved
    logits = _cosine_logits(rows, rows[:0], tau)
    lse = logits.logsumexp(1)
    positive = (labels[:, None] == labels).masked_fill(_own(logits), 0)
    count = positive.sum(1)
    near = logits.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
    terms = _weighted(lse - near, weight).masked_fill(count == 0, 0)
    return terms.sum() / (count > 0).sum().clamp_min(1), lse, saved


def supcon_bwd(grad: Tensor, x: Tensor, labels: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _, _, tau, _ = rest
    return vjp(lambda x: supcon(x, labels, weight, tau)[0], x)[1](grad)[0].contiguous()


def _squared_distances(rows: Tensor, negatives: Tensor) -> Tensor:
    """[N, N + M] of the rows to themselves and the negatives, exactly 0 on the diagonal."""
    # Distances do not change under a shift, their Gram form does: without the centre it cancels.
    centre = rows.detach().mean(0)
    a, b = rows - centre, torch.cat([rows, negatives]) - centre
    squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squared.clamp_min(0).masked_fill(_own(squared), 0)


def _cosine_logits(rows: Tensor, negatives: Tensor, tau: float) -> Tensor:
    """[N, N + M] (c_ij - 1) / tau, -inf on the diagonal."""
    cosine = _unit(rows) @ _unit(torch.cat([rows, negatives])).T
    return ((cosine - 1) / tau).masked_fill(_own(cosine), -torch.inf)


def _unit(rows: Tensor) -> Tensor:
    """h / |h|; a row without a direction is 0 and has no gradient."""
    # In float64, where the squares of float32 rows do not overflow.
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)
    directed = ~(norm <= SMALLEST_NORM)  # a row of nan stays one
    return torch.where(directed, rows, 0) / torch.where(directed, norm, 1)


def _own(matrix: Tensor) -> Tensor:
    return torch.eye(*matrix.shape, dtype=torch.bool, device=matrix.device)


def _weighted(terms: Tensor, weight: Tensor) -> Tensor:
    return terms if weight.numel() == 0 else weight * terms
