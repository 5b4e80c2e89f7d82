"""Reference of `imbdiff.ops.gaussian_divergence` and `gaussian_overlap_loss`: every pair from its differences.

Differences of means and of log-variances need no centre and do not cancel where two Gaussians nearly agree, which is
where a hinge looks. They are taken tile by tile; each backward is the vjp of the tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator
from imbdiff.ops.reference._vjp import vjp

KINDS = ("kl", "jeffreys", "bhattacharyya")
FORMS = ("hinge", "reciprocal")
PAIRS = ("all", "different", "same")
"""An integer of the schema is the index of the name."""

_TILE = 2**21  # elements of a tile's differences


def pairwise(mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor, logvar_q: Tensor, kind: int) -> Tensor:
    """[..., N, M] divergences of one tile; with x = l - k and d = mu - nu for each pair and dimension

    kl             1/2 sum [ e^x - 1 - x + d^2 e^-k ]
    jeffreys       1/2 sum [ 2 (cosh x - 1) + d^2 (e^-l + e^-k) ]                    cosh x - 1 = 2 sinh^2(x/2)
    bhattacharyya  1/2 sum [ ln cosh(x/2) + d^2 / (2 (e^l + e^k)) ]           ln cosh y = log1p(2 sinh^2(y/2))
    """
    acc = accumulator(mean_p.dtype)
    d = mean_p.to(acc).unsqueeze(-2) - mean_q.to(acc).unsqueeze(-3)
    l, k = logvar_p.to(acc).unsqueeze(-2), logvar_q.to(acc).unsqueeze(-3)
    x = l - k
    match KINDS[kind]:
        case "kl":
            spread, shift = torch.expm1(x) - x, (d * (-k / 2).exp()).square()
        case "jeffreys":
            spread = 4 * (x / 2).sinh().square()
            shift = (d * (-l / 2).exp()).square() + (d * (-k / 2).exp()).square()
        case _:
            spread, shift = torch.log1p(2 * (x / 4).sinh().square()), d.square() / (2 * (l.exp() + k.exp()))
    # Log-variances [..., 1] stand for D equal ones.
    times = d.shape[-1] if x.shape[-1] == 1 else 1
    return (times * spread.sum(-1) + shift.sum(-1)) / 2


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, start + max(step, 1)) for start in range(0, size, max(step, 1))]


def _tiles(N: int, M: int, D: int) -> Iterator[tuple[slice, slice]]:
    columns = max(min(M, _TILE // max(D, 1)), 1)
    return itertools.product(_slices(N, _TILE // (columns * max(D, 1))), _slices(M, columns))


def gaussian_divergence(
    mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor, logvar_q: Tensor, kind: int
) -> tuple[Tensor, Tensor]:
    """[L, N, M] from [L, N, D], [L, N, D or 1], [L, M, D], [L, M, D or 1]; and what back ends with products keep."""
    (L, N, D), M = mean_p.shape, mean_q.shape[1]
    out = mean_p.new_zeros(L, N, M, dtype=accumulator(mean_p.dtype))
    for b in _slices(L, _TILE // max(N * M * D, 1)):
        for i, j in _tiles(N, M, D):
            out[b, i, j] = pairwise(mean_p[b, i], logvar_p[b, i], mean_q[b, j], logvar_q[b, j], kind)
    return out, out.new_empty(0)


def gaussian_divergence_bwd(
    grad: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    mean_q: Tensor,
    logvar_q: Tensor,
    kind: int,
    out: Tensor,
    sizes: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    (L, N, D), M = mean_p.shape, mean_q.shape[1]
    sums = _Gradients((mean_p, logvar_p, mean_q, logvar_q))
    for b in _slices(L, _TILE // max(N * M * D, 1)):
        for i, j in _tiles(N, M, D):
            sums.add([(b, i), (b, i), (b, j), (b, j)], partial(pairwise, kind=kind), grad[b, i, j])
    return sums.rounded(needs)


class _Gradients:
    """Sums the vjp of tiles, in the accumulator's precision, into gradients of the four arguments."""

    def __init__(self, arguments: tuple[Tensor, ...]) -> None:
        self.arguments = arguments
        self.sums = [torch.zeros_like(x, dtype=accumulator(x.dtype), memory_format=_DENSE) for x in arguments]

    def add(self, parts: Sequence[tuple[slice, ...]], of: Callable[..., Tensor], grad: Tensor) -> Tensor:
        """The tile's value."""
        rows = [x[part].to(total.dtype) for x, total, part in zip(self.arguments, self.sums, parts, strict=True)]
        found = vjp(of, *rows)
        for total, part, g in zip(self.sums, parts, found[1](grad), strict=True):
            total[part] += g
        return found[0].detach()

    def needed(self, needs: Sequence[bool]) -> list[Tensor]:
        return [total if need else total.new_empty(0) for total, need in zip(self.sums, needs, strict=True)]

    def rounded(self, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        return tuple(total.to(x.dtype) for x, total in zip(self.arguments, self.needed(needs), strict=True))


_DENSE = torch.contiguous_format


def _selected(
    i: slice, j: slice, N: int, M: int, labels_p: Tensor, labels_q: Tensor, mask: Tensor, pairs: int, same_set: bool
) -> Tensor:
    """[n, m] bool: the tile's pairs that count."""
    rows, columns = (torch.arange(size, device=mask.device) for size in (N, M))
    chosen = mask[i, j] if mask.numel() else torch.ones(1, 1, dtype=torch.bool, device=mask.device)
    if PAIRS[pairs] != "all":
        equal = labels_p[i, None] == labels_q[None, j]
        chosen = chosen & (equal if PAIRS[pairs] == "same" else ~equal)
    if same_set:
        chosen = chosen & (rows[i, None] != columns[None, j])
    return chosen.expand(len(rows[i]), len(columns[j]))


def _pushed(
    mean_p: Tensor,
    logvar_p: Tensor,
    mean_q: Tensor,
    logvar_q: Tensor,
    weight: Tensor,
    chosen: Tensor,
    kind: int,
    form: int,
    margin: float,
    scale: float,
) -> Tensor:
    """sum of w_i f(d_ij) over the chosen pairs of a tile, f(d) = max(0, margin - d) or 1 / (1 + d)."""
    d = scale * pairwise(mean_p, logvar_p, mean_q, logvar_q, kind)
    f = (margin - d).relu() if FORMS[form] == "hinge" else 1 / (1 + d)
    return (weight[:, None] * f).masked_fill(~chosen, 0).sum()


def gaussian_overlap(
    mean_p: Tensor,
    logvar_p: Tensor,
    mean_q: Tensor,
    logvar_q: Tensor,
    labels_p: Tensor,
    labels_q: Tensor,
    mask: Tensor,
    weight: Tensor,
    kind: int,
    form: int,
    margin: float,
    scale: float,
    pairs: int,
    mean: bool,
    same_set: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(loss [], normalizer [], four slopes); the normalizer is the number of selected pairs, at least 1; 1 for a sum.

    The slopes are the derivatives of loss * normalizer in the accumulator's type. An empty weight is all ones, an empty
    mask all true; labels are read unless pairs is "all".
    """
    (N, D), M = mean_p.shape, mean_q.shape[0]
    weight = weight if weight.numel() else mean_p.new_ones(N, dtype=accumulator(mean_p.dtype))
    total, count = weight.new_zeros(()), torch.zeros((), dtype=torch.int64, device=mean_p.device)
    slopes = _Gradients((mean_p, logvar_p, mean_q, logvar_q))
    for i, j in _tiles(N, M, D):
        chosen = _selected(i, j, N, M, labels_p, labels_q, mask, pairs, same_set)
        pushed = partial(_pushed, weight=weight[i], chosen=chosen, kind=kind, form=form, margin=margin, scale=scale)
        if any(needs):
            total = total + slopes.add([(i,), (i,), (j,), (j,)], pushed, weight.new_ones(()))
        else:
            total = total + pushed(mean_p[i], logvar_p[i], mean_q[j], logvar_q[j])
        count = count + chosen.sum()
    normalizer = count.clamp_min(1).to(weight.dtype) if mean else weight.new_ones(())
    return total / normalizer, normalizer, *slopes.needed(needs)
