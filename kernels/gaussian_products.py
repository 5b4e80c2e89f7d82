"""KL and Jeffreys of all pairs of diagonal Gaussians as one product of matrices, and their slopes as another.

    wide(c, v) = (e^v + c^2, -2c),  sharp(c, v) = (e^-v, c e^-v)                          P = N(m, e^l), Q = N(n, e^k)
    2 KL = sum_d [ wide(m, l) . sharp(n, k) ] + sum_d [ -l - 1 ] + sum_d [ k + n^2 e^-k ]
    2 J  = sum_d [ wide(m, l) . sharp(n, k) + sharp(m, l) . wide(n, k) + m^2 e^-l - 1 + n^2 e^-k - 1 ]

What a row adds by itself is an operand that meets a 1, so all of 2 KL is one product A B^T; with G the gradient of the
matrix, G B and G^T A hold all that the slopes need. Rows are taken around the mean of all of them, in units of their
mean variance: that changes no divergence, and products cancel less and overflow later. Where two Gaussians nearly agree
they still cancel: such pairs are not `known`, nor are those of a row whose operands are not finite.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from imbdiff.kernels.matrices import AS_IT_IS, gather, products
from torch import Tensor

Side = tuple[Tensor, Tensor]
"""Means [L, N, D], and log-variances alike or [L, N, 1]."""

LN4 = math.log(4)


class Operands(NamedTuple):
    c: Tensor  # [L, N, D] the means in the frame
    v: Tensor  # and the log-variances
    numbers: Tensor  # [L, N, 2 or 4 times D and what rows add]
    size: Tensor  # [L, N] of what cancels


def operands(side: Side, frame: tuple[Tensor, ...], kind: int, left: bool) -> Operands:
    centre, offset, unit = frame
    c = (side[0].float() - centre) * unit
    v = (side[1].float() - offset).expand_as(c)
    precision = torch.exp(-v)
    wide, sharp = [v.exp() + c * c, -2 * c], [precision, c * precision]
    square = c * sharp[1]
    if kind:
        used, term, size = wide + sharp if left else sharp + wide, square - 1, 3 * square + 1
    else:
        used, term, size = (wide, -1 - v, 1 + v.abs()) if left else (sharp, v + square, 3 * square + v.abs())
    own = term.sum(2, keepdim=True)
    one, beyond = torch.ones_like(own), c.new_zeros(*c.shape[:2], -(len(used) * c.shape[2] + 2) % 16)
    numbers = torch.cat([*used, *((own, one) if left else (one, own)), beyond], 2)  # in lines of 64 bytes
    size = torch.where(numbers.isfinite().all(2), size.sum(2), torch.inf)
    return Operands(c, v, numbers.nan_to_num_(0, 0, 0), size)


class Products(NamedTuple):
    p: Operands
    q: Operands
    unit: Tensor  # [L, 1, D] or [L, 1, 1]
    kind: int

    def rows(self, at: slice) -> Products:
        """Of these rows of p."""
        return self._replace(p=Operands(*(x[:, at] for x in self.p)))

    def matrix(self) -> Tensor:
        """[L, N, M], NaN where a pair is not known."""
        out = products(self.p.numbers, self.q.numbers).div_(2)
        return out.masked_fill_(~self.known(out), torch.nan)

    def known(self, value: Tensor) -> Tensor:
        """Where rounding, which grows like the root of a sum's length, is far below 1e-4 (1 + value) and the value."""
        growth = 1.2e-7 * (2 + self.p.numbers.shape[2] ** 0.5 / 2)
        off = growth * (self.p.size[:, :, None] + self.q.size[:, None] + 4 * value.abs())
        return (off < 5e-5 * (1 + value)) & (16 * off < value)

    def add_slopes(self, grad: Tensor, left: bool, to: tuple[Tensor | None, ...]) -> None:
        """Of p or q; `grad` is 0 where a pair is not known."""
        own, other = (self.p, self.q) if left else (self.q, self.p)
        sums = gather(torch.empty_like(own.numbers), [(grad if left else grad.mT, other.numbers, AS_IT_IS)])
        c, v, end = own.c, own.v, (4 if self.kind else 2) * own.c.shape[2]
        h = sums[:, :, :end].unflatten(2, (-1, c.shape[2])).unbind(2)
        mass = sums[:, :, end + (not left), None]
        of_c, of_v = torch.zeros_like(c), torch.zeros_like(c)
        if self.kind or left:
            a, b = h[:2] if left else h[2:]
            of_c += c * a - b
            of_v += v.exp() * a - mass
        if self.kind or not left:
            a, b = h[2:] if left else h[:2]
            precision = torch.exp(-v)
            of_c += precision * (b / 2 + c * mass)
            of_v += mass - precision * (a + c * (b + c * mass))
        finite = own.size[:, :, None] < torch.inf
        for x, slope in zip(to, (of_c * self.unit, of_v / 2), strict=True):
            if x is not None:
                x += torch.where(finite, slope, 0)


def framed(p: Side, q: Side, kind: int) -> Products:
    total, count = [x.sum(1, True, dtype=torch.float32) for x in (*p, *q)], p[0].shape[1] + q[0].shape[1]
    centre, logvar = (total[0] + total[2]) / count, (total[1] + total[3]) / count
    # Infinity and NaN concern their own pairs only; ordinary rows keep their unit.
    centre = torch.nan_to_num(centre, 0, 0, 0)
    offset = torch.where(logvar.abs() < 160, (logvar / LN4).trunc() * LN4, 0)
    unit = torch.exp(offset.double() / -2).float()
    frame = (centre, offset, unit)
    return Products(operands(p, frame, kind, True), operands(q, frame, kind, False), unit, kind)
