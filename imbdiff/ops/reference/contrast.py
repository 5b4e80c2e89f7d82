"""Reference of `imbdiff.ops.negative_distance_loss`, rows [N, D] and negatives [M, D]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator


def negative_distance(
    x: Tensor, negatives: Tensor, weight: Tensor, scale: float, include_self: bool, per_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], lse [N], saved [0]); an empty weight is all ones."""
    acc = accumulator(x.dtype)
    N, M = x.shape[0], negatives.shape[0]
    count = N + M - (not include_self)
    rows, saved = x.to(acc), x.new_empty(0, dtype=acc)
    if N == 0 or count == 0:
        return rows.sum() * 0, rows.sum(1) * 0, saved
    columns = torch.cat([rows, negatives.to(acc)])
    # Distances do not change under a shift, their Gram form does: without the centre it cancels.
    centre = rows.detach().mean(0)
    a, b = rows - centre, columns - centre
    squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    own = torch.eye(N, N + M, dtype=torch.bool, device=x.device)
    energy = scale * squared.clamp_min(0).masked_fill(own, 0)
    lse = (-energy if include_self else (-energy).masked_fill(own, -torch.inf)).logsumexp(1)
    if not per_row:
        return lse.logsumexp(0) - math.log(N * count), lse, saved
    terms = lse - math.log(count)
    return (terms if weight.numel() == 0 else weight * terms).sum() / N, lse, saved


def negative_distance_bwd(grad: Tensor, x: Tensor, negatives: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _, _, scale, include_self, per_row = rest

    def loss(x: Tensor) -> Tensor:
        return negative_distance(x, negatives, weight, scale, include_self, per_row)[0]

    return torch.func.vjp(loss, x)[1](grad)[0].contiguous()
