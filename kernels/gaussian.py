"""Divergences of all pairs of diagonal Gaussians, the loss on them, and the gradients of both.

KL and Jeffreys of many pairs come from products (gaussian_products.py). What those do not know, pairs of Gaussians that
nearly agree, is taken from d = m - n and x = l - k of every dimension in float32, with m, l of P and n, k of Q: exact
there, and without a centre, but an exponential a term. So are the Bhattacharyya distance, which is no product, and few
pairs, whose tiles of products would leave most of a device idle. 16-bit values are float32 before any exponential.
Here a program owns a tile of pairs, or the rows and columns of a gradient; sums run over a third axis. The loss makes
strips of the matrix, turns them into its slopes, and passes over the tiles of a strip where nothing pulls.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from imbdiff.kernels.gaussian_products import Products, Side, framed
from torch import Tensor

ROWS, COLUMNS, DEPTH, WARPS = 16, 16, 16, 8
PASSED = 256  # pairs of a row that are passed over at once
MANY = 2**18  # pairs whose tiles of products fill a device
PUSHED = 1024  # pairs of a row that are read at once
STRIP = 2**22  # pairs whose divergences wait for their gradient


@triton.jit
def excess(x):
    """e^x - 1 - x"""
    series = 1.0 + x * (1.0 / 9.0)
    for term in tl.static_range(6):
        series = 1.0 + series * x * (1.0 / (8 - term))
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def log_cosh(x):
    """ln cosh(x / 2)"""
    size = tl.abs(x)
    bent = 0.5 * (excess(0.5 * x) + excess(-0.5 * x))  # cosh(x / 2) - 1
    s = bent / (2.0 + bent)
    z = s * s
    near = 2.0 * s * (1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * (1.0 / 11))))))
    return tl.where(size < 1.0, near, 0.5 * size - 0.6931471805599453 + tl.log(1.0 + tl.exp(-size)))


@triton.jit
def twice(m, l, n, k, KIND: tl.constexpr):
    """Two times a dimension's term: of kl, jeffreys, bhattacharyya."""
    d, x = m - n, l - k
    if KIND == 2:
        total = log_cosh(x) + d * d / (2.0 * (tl.exp(l) + tl.exp(k)))
    else:
        near = d * tl.exp(-0.5 * k)
        total = excess(x) + near * near
        if KIND == 1:
            back = d * tl.exp(-0.5 * l)
            total += excess(-x) + back * back
    return total


@triton.jit
def derivatives(m, l, n, k, KIND: tl.constexpr, OF_P: tl.constexpr):
    """Of a dimension's term for its mean and its log-variance, those of P or of Q."""
    d, x = m - n, l - k
    if KIND == 2:
        size = tl.abs(x)
        drop = size - excess(-size)  # 1 - e^-|x|
        tilt = tl.where(x < 0, -0.5, 0.5) * drop / (2.0 - drop)  # tanh(x / 2) / 2
        inverse = 1.0 / (tl.exp(l) + tl.exp(k))
        pull = 0.5 * d * inverse
        of_p, of_q = d * pull * (tl.exp(l) * inverse), d * pull * (tl.exp(k) * inverse)
    else:
        tilt = x + excess(x)
        pull = d * tl.exp(-k)
        of_p, of_q = tl.zeros_like(x), d * pull
        if KIND == 1:
            back = d * tl.exp(-l)
            tilt += x - excess(-x)
            pull += back
            of_p = d * back
    if OF_P:
        mean, logvar = pull, 0.5 * (tilt - of_p)
    else:
        mean, logvar = -pull, -0.5 * (tilt + of_q)
    return mean, logvar


@triton.jit
def values(source, batch, row, exists, column, D):
    """A tile in float32; `source` is (pointer, strides of batch, row and column)."""
    at = batch * source[1] + row.to(tl.int64)[:, None] * source[2] + column[None, :] * source[3]
    return tl.load(source[0] + at, mask=exists[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def place(tile, count, SIZE: tl.constexpr):
    """What lies before a tile of rows, the rows, and which of them exist."""
    tiles = tl.cdiv(count, SIZE)
    row = tile % tiles * SIZE + tl.arange(0, SIZE)
    return tile // tiles, row, row < count


@triton.jit
def matrix_kernel(
    p, q, out, N, M, D, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """In place of NaN; p and q are (mean, logvar)."""
    above, j, there = place(tl.program_id(0), M, COLUMNS)
    batch, i, here = place(above, N, ROWS)
    batch = batch.to(tl.int64)
    at = out + (batch * N + i[:, None]) * M + j[None, :]
    found = tl.load(at, mask=here[:, None] & there[None, :], other=0.0)
    if tl.max((found != found).to(tl.int32)) > 0:
        total = tl.zeros([ROWS, COLUMNS, DEPTH], tl.float32)
        for start in range(0, D, DEPTH):
            column = start + tl.arange(0, DEPTH)
            # Beyond D all four are 0, and so is the term.
            m = values(p[0], batch, i, here, column, D)[:, None, :]
            l = values(p[1], batch, i, here, column, D)[:, None, :]
            n = values(q[0], batch, j, there, column, D)[None, :, :]
            k = values(q[1], batch, j, there, column, D)[None, :, :]
            total += twice(m, l, n, k, KIND)
        tl.store(at, 0.5 * tl.sum(total, axis=2), mask=found != found)


@triton.jit
def pulls(grad, batch, i, here, j, others):
    """G; grad is (pointer, strides of batch, own and other rows)."""
    at = batch * grad[1] + i.to(tl.int64)[:, None] * grad[2] + j.to(tl.int64)[None, :] * grad[3]
    return tl.load(grad[0] + at, mask=here[:, None] & (j < others)[None, :], other=0.0)


@triton.jit
def slope_kernel(
    own, other, grad, to, count, others, D, KIND: tl.constexpr, OF_P: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PASSED: tl.constexpr,
):  # fmt: skip
    """Adds to (mean, logvar), None where it is not wanted."""
    batch, i, here = place(tl.program_id(0), count, ROWS)
    batch = batch.to(tl.int64)
    column = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    a = values(own[0], batch, i, here, column, D)[:, None, :]
    b = values(own[1], batch, i, here, column, D)[:, None, :]
    mean = tl.zeros([ROWS, COLUMNS, DEPTH], tl.float32)
    logvar = tl.zeros([ROWS, COLUMNS, DEPTH], tl.float32)
    for first in range(0, others, PASSED):
        end = first
        if tl.max((pulls(grad, batch, i, here, first + tl.arange(0, PASSED), others) != 0).to(tl.int32)) > 0:
            end = tl.minimum(first + PASSED, others)  # of a hinge's tiles, and of near pairs', few are looked at
        for start in range(first, end, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            g = pulls(grad, batch, i, here, j, others)[:, :, None]
            if tl.max((g != 0).to(tl.int32)) > 0:
                u = values(other[0], batch, j, j < others, column, D)[None, :, :]
                v = values(other[1], batch, j, j < others, column, D)[None, :, :]
                if OF_P:
                    of_mean, of_logvar = derivatives(a, b, u, v, KIND, OF_P)
                else:
                    of_mean, of_logvar = derivatives(u, v, a, b, KIND, OF_P)
                # A pair that does not count may be infinitely far.
                mean += tl.where(g == 0, 0.0, g * of_mean)
                logvar += tl.where(g == 0, 0.0, g * of_logvar)
    to_at = (batch * count + i[:, None]) * D + column[None, :]
    mask = here[:, None] & (column < D)[None, :]
    for which in tl.static_range(2):
        if to[which] is not None:
            value = tl.sum(mean if which == 0 else logvar, axis=1)
            tl.store(to[which] + to_at, value + tl.load(to[which] + to_at, mask=mask, other=0.0), mask=mask)


@triton.jit
def push_kernel(
    matrix, labels_p, labels_q, mask, weight, sums, numbers, first, M, margin, scale,
    FORM: tl.constexpr, PAIRS: tl.constexpr, SAME_SET: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row's sum and number of what counts, and in place of its divergences the slopes; it starts at row `first`."""
    row = tl.program_id(0).to(tl.int64)
    i = first + row
    heft = 1.0
    if weight is not None:
        heft = tl.load(weight + i)
    total = tl.zeros([COLUMNS], tl.float32)
    number = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, M, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        chosen = j < M
        at = matrix + row * M + j
        d = scale * tl.load(at, mask=j < M, other=0.0)
        if mask is not None:
            chosen = chosen & (tl.load(mask + i * M + j, mask=j < M, other=0) != 0)
        if PAIRS != 0:
            same = tl.load(labels_p + i) == tl.load(labels_q + j, mask=j < M, other=0)
            chosen = chosen & (same if PAIRS == 2 else ~same)
        if SAME_SET:
            chosen = chosen & (i != j)
        if FORM == 0:
            value = tl.where(margin <= d, 0.0, margin - d)  # NaN passes
            slope = tl.where(margin <= d, 0.0, -1.0)
        else:
            value = 1.0 / (1.0 + d)
            slope = -value * value
        total += tl.where(chosen, heft * value, 0.0)
        number += chosen.to(tl.int32)
        tl.store(at, tl.where(chosen, heft * scale * slope, 0.0), mask=j < M)
    tl.store(sums + i, tl.sum(total, axis=0))
    tl.store(numbers + i, tl.sum(number, axis=0))


def pointers(side: Side) -> tuple[Any, ...]:
    return tuple((x, x.stride(0), x.stride(1), int(x.shape[2] > 1)) for x in side)


def by_products(p: Side, q: Side, kind: int) -> Products | None:
    """Where there are such and enough pairs."""
    return framed(p, q, kind) if kind < 2 and p[0].shape[:2].numel() * q[0].shape[1] >= MANY else None


def matrix(p: Side, q: Side, kind: int, product: Products | None) -> Tensor:
    (L, N, D), M = p[0].shape, q[0].shape[1]
    out = product.matrix() if product else p[0].new_full((L, N, M), torch.nan, dtype=torch.float32)
    if out.numel():
        matrix_kernel[(L * triton.cdiv(N, ROWS) * triton.cdiv(M, COLUMNS),)](
            pointers(p), pointers(q), out, N, M, D,
            KIND=kind, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=WARPS,
        )  # fmt: skip
    return out


def add_slopes(
    grad: Tensor, p: Side, q: Side, kind: int, product: Products | None, known: Tensor | None,
    to: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """To those of the means and log-variances of p and of q: [L, N, D] each, None where it is not wanted."""
    (L, N, D), M = p[0].shape, q[0].shape[1]
    far, near = (grad, grad) if known is None else (grad.masked_fill(~known, 0), grad.masked_fill(known, 0))
    for own, other, (of, across), count, others, into in (
        (p, q, (M, 1), N, M, tuple(to[:2])), (q, p, (1, M), M, N, tuple(to[2:])),
    ):  # fmt: skip
        if L * count * others * D == 0 or all(x is None for x in into):
            continue
        if product:
            product.add_slopes(far, own is p, into)
        slope_kernel[L * triton.cdiv(count, ROWS), triton.cdiv(D, DEPTH)](
            pointers(own), pointers(other), (near, N * M, of, across), into, count, others, D, KIND=kind,
            OF_P=own is p, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, PASSED=PASSED, num_warps=WARPS,
        )  # fmt: skip


def zeros(arguments: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    means = (arguments[0], arguments[0], arguments[2], arguments[2])
    return [m.new_zeros(m.shape, dtype=torch.float32) if need else None for m, need in zip(means, needs, strict=True)]


def finished(found: Sequence[Tensor | None], arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One log-variance for a row has the sum of its dimensions' slopes; what is not wanted is empty."""
    return tuple(
        x.new_empty(0, dtype=torch.float32) if g is None else g if g.shape == x.shape else g.sum(-1, keepdim=True)
        for g, x in zip(found, arguments, strict=True)
    )


def gaussian_divergence(
    mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor, logvar_q: Tensor, kind: int
) -> tuple[Tensor, Tensor]:
    p, q = (mean_p, logvar_p), (mean_q, logvar_q)
    with torch.cuda.device_of(mean_p):
        out = matrix(p, q, kind, by_products(p, q, kind))
    return out, out.new_empty(0)


def gaussian_divergence_bwd(
    grad: Tensor, mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor, logvar_q: Tensor, kind: int, out: Tensor,
    sizes: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    arguments = (mean_p, logvar_p, mean_q, logvar_q)
    p, q, to = arguments[:2], arguments[2:], zeros(arguments, needs)
    with torch.cuda.device_of(mean_p):
        product = by_products(p, q, kind)
        add_slopes(grad, p, q, kind, product, product and product.known(out), to)
    return tuple(g.to(x.dtype) for g, x in zip(finished(to, arguments), arguments, strict=True))


def gaussian_overlap(
    mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor, logvar_q: Tensor, labels_p: Tensor, labels_q: Tensor,
    mask: Tensor, weight: Tensor, kind: int, form: int, margin: float, scale: float, pairs: int, mean: bool,
    same_set: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """By strips of rows of p, whose divergences become what their gradients are multiplied by."""
    N, M = len(mean_p), len(mean_q)
    given = (mean_p, logvar_p, mean_q, logvar_q)
    whole_p, q = (mean_p[None], logvar_p[None]), (mean_q[None], logvar_q[None])
    sums = mean_p.new_zeros(N, dtype=torch.float32)
    numbers = mean_p.new_zeros(N, dtype=torch.int32)
    found = zeros((*whole_p, *q), needs)
    height = max(1, STRIP // max(M, 1) // ROWS) * ROWS
    with torch.cuda.device_of(mean_p):
        product = by_products(whole_p, q, kind)
        for first in range(0, N if M else 0, height):
            at = slice(first, first + height)
            p, part = (whole_p[0][:, at], whole_p[1][:, at]), product and product.rows(at)
            strip = matrix(p, q, kind, part)
            known = part.known(strip) if part and any(needs) else None
            push_kernel[(strip.shape[1],)](
                strip, labels_p, labels_q, mask.view(torch.uint8) if mask.numel() else None,
                weight if len(weight) else None, sums, numbers, first, M, margin, scale,
                FORM=form, PAIRS=pairs, SAME_SET=same_set, COLUMNS=PUSHED, num_warps=4,
            )  # fmt: skip
            to = [None if g is None else g[:, at] for g in found[:2]] + found[2:]
            add_slopes(strip, p, q, kind, part, known, to)
    normalizer = numbers.sum().clamp_min(1).float() if mean else sums.new_ones(())
    return sums.sum() / normalizer, normalizer, *finished([None if g is None else g[0] for g in found], given)
