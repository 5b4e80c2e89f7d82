"""Base regression loss and K signed comparisons with other branches: one pass forward, one pass backward."""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from imbdiff.kernels import rows
from torch import Tensor


@triton.jit
def squared_difference(x, y):
    return (x - y) * (x - y)


@triton.jit
def means_and_terms(sums, row, exists, B, D, extra, outputs):
    """base, terms and distance of a row; extra = (weight [K, B], scales [K, 3], margin: K numbers)."""
    weight, scales, margin = extra
    base, terms, distance = outputs
    tl.store(base + row, sums[0] / D, mask=exists)
    for k in tl.static_range(1, len(sums)):
        at = (k - 1) * B + row
        apart = sums[k] / D
        short = margin[k - 1] - apart
        # Not tl.maximum, which would turn a NaN into 0.
        loss = tl.where(margin[k - 1] == 0, apart, tl.where(short < 0, 0.0, short))
        value = tl.load(scales + (k - 1) * 3 + 2) * tl.load(weight + at, mask=exists, other=0.0)
        tl.store(terms + at, value * loss, mask=exists)
        tl.store(distance + at, apart, mask=exists)


@triton.jit
def grad_kernel(
    own, target, others, grad_base, grad_terms, weight, scales, margin, distance, grad_own, grad_others, B, D,
    NEEDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, exists = rows.row_tile(B, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = exists[:, None] & (column < D)[None, :]
    out = row[:, None] * D + column[None, :]
    x = rows.load(own, row, column, mask)
    if NEEDS[0]:
        factor = tl.load(grad_base + row, mask=exists, other=0.0) * 2 / D
        total = factor[:, None] * (x - rows.load(target, row, column, mask))
    for k in tl.static_range(len(others)):
        if NEEDS[0] or NEEDS[k + 1]:
            at = k * B + row
            apart = tl.load(distance + at, mask=exists, other=0.0)
            bound = margin[k]
            # A NaN distance pushes, so that the NaN of the row is passed on.
            sign = tl.where(bound == 0, 1.0, tl.where(bound <= apart, 0.0, -1.0))
            chain = tl.load(grad_terms + at, mask=exists, other=0.0) * tl.load(weight + at, mask=exists, other=0.0)
            step = (chain * sign * 2 / D)[:, None] * (x - rows.load(others[k], row, column, mask))
            if NEEDS[0]:
                total += tl.load(scales + k * 3) * step
            if NEEDS[k + 1]:
                grad = -tl.load(scales + k * 3 + 1) * step
                tl.store(grad_others[k] + out, grad.to(grad_others[k].dtype.element_ty), mask=mask)
    if NEEDS[0]:
        tl.store(grad_own + out, total.to(grad_own.dtype.element_ty), mask=mask)


def two_branch(
    own: Tensor, target: Tensor, others: Sequence[Tensor], weight: Tensor, scales: Tensor, margin: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    (B, D), K = own.shape, len(others)
    base, terms, distance = (own.new_empty(shape, dtype=torch.float32) for shape in ((B,), (K, B), (K, B)))
    if D == 0:  # the mean of nothing
        return base.fill_(torch.nan), terms.fill_(torch.nan), distance.fill_(torch.nan)
    if B > 0:
        with torch.cuda.device_of(own):
            extra, outputs = (weight, scales, tuple(margin)), (base, terms, distance)
            rows.sum_rows(own, [target, *others], extra, outputs, squared_difference, means_and_terms)
    return base, terms, distance


def two_branch_bwd(
    grad_base: Tensor, grad_terms: Tensor, own: Tensor, target: Tensor, others: Sequence[Tensor], weight: Tensor,
    scales: Tensor, margin: Sequence[float], distance: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    B, D = own.shape
    grads = [own.new_empty((B, D) if need else (0,)) for need in needs]
    if any(needs) and own.numel() > 0:
        tile = rows.config(D)
        with torch.cuda.device_of(own):
            grad_kernel[triton.cdiv(B, tile.rows), triton.cdiv(D, tile.columns)](
                rows.pair(own), rows.pair(target), tuple(rows.pair(x) for x in others),
                grad_base, grad_terms, weight, scales, tuple(margin), distance, grads[0], tuple(grads[1:]), B, D,
                NEEDS=tuple(needs), ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return grads[0], grads[1:]
