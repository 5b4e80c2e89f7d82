"""Reference of `imbdiff.ops.two_branch_loss`: stop-gradients written with `.detach()`, rows [B, D]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator
from imbdiff.ops.reference._vjp import vjp


def two_branch(
    own: Tensor, target: Tensor, others: Sequence[Tensor], weight: Tensor, scales: Tensor, margin: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """(base [B], terms [K, B], distance [K, B]); a margin of 0 is a pull."""
    acc = accumulator(own.dtype)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(acc) - b.to(acc)).square().mean(1)

    def term(k: int, d: Tensor) -> Tensor:
        return weight[k] * (d if margin[k] == 0 else (margin[k] - d).relu())

    terms, distances = [], []
    for k, other in enumerate(others):
        to_own, to_other = distance(own, other.detach()), distance(own.detach(), other)
        f_own, f_other = term(k, to_own), term(k, to_other)
        g_own, g_other, value = scales[k]
        # x - x.detach() is zero with x's gradient: value and both gradient scales stay independent of each other.
        gradients = g_own * (f_own - f_own.detach()) + g_other * (f_other - f_other.detach())
        terms.append(value * f_own.detach() + gradients)
        distances.append(to_own)
    none = own.new_zeros(0, len(own), dtype=acc)
    return (
        distance(own, target),
        torch.stack(terms) if terms else none,
        torch.stack(distances) if terms else none.clone(),
    )


def two_branch_bwd(
    grad_base: Tensor,
    grad_terms: Tensor,
    own: Tensor,
    target: Tensor,
    others: Sequence[Tensor],
    weight: Tensor,
    scales: Tensor,
    margin: Sequence[float],
    distance: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    def losses(own: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        return two_branch(own, target, others, weight, scales, margin)[:2]

    pullback = vjp(losses, own, *others)[1]
    all_grads = pullback((grad_base, grad_terms))
    grads = [g.contiguous() if need else g.new_empty(0) for g, need in zip(all_grads, needs, strict=True)]
    return grads[0], grads[1:]
