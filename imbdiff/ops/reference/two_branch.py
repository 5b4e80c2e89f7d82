"""Reference of `imbdiff.ops.two_branch_loss`: stop-gradients written with `.detach()`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator


def two_branch_loss(
    own: Tensor,
    target: Tensor,
    others: Sequence[Tensor],
    weight: Tensor,
    scales: Tensor,
    margin: Sequence[float | None],
) -> tuple[Tensor, Tensor]:
    acc = accumulator(own.dtype)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(acc) - b.to(acc)).flatten(1).square().mean(1)

    terms = []
    for k, other in enumerate(others):

        def term(d: Tensor, k: int = k) -> Tensor:
            m = margin[k]
            return weight[k].to(acc) * (d if m is None else (m - d).relu())

        g_own, g_other, value = scales[k].to(acc)
        to_own, to_other = term(distance(own, other.detach())), term(distance(own.detach(), other))
        # x - x.detach() is zero with x's gradient: value and both gradient scales stay independent of each other.
        gradients = g_own * (to_own - to_own.detach()) + g_other * (to_other - to_other.detach())
        terms.append(value * to_own.detach() + gradients)
    return distance(own, target), torch.stack(terms) if terms else own.new_zeros(0, len(own), dtype=acc)
