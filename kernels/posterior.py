"""The posterior mean over a bank of rows: softmax-weighted sums tile by tile, nothing B x N is ever stored.

    b_j  = bank_j - c,  a_i = x_i - signal_i c                                             c: the bank's mean
    l_ij = scale_i (a_i . b_j - signal_i |b_j|^2 / 2) + prior_j                            scale = signal / sigma^2
    mean = c + sum_j w_ij b_j                                                              w: softmax of l
    h_ij = g_i . b_j,  m_i = sum_j w_ij h_ij,  z_ij = w_ij (h_ij - m_i)                    g: the mean's gradient
    of x = scale_i sum_j z_ij b_j
    of b = sum_i w_ij g_i + scale_i z_ij (a_i - signal_i b_j)

Logits reach 1e7 where sigma is small, so rows of every type are multiplied in float32. m is summed from the weights and
not taken from the mean, which is rounded: the z of a row add up to 0. A block of output columns makes its logits again.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from imbdiff.kernels import engine, rows
from torch import Tensor

LINE = engine.Config(32, 32, 32, 8, 1, False, 128)


@triton.jit
def logits(product, x_facts, bank_facts):
    """l of products; x_facts = (scale, signal, ...) and bank_facts = (norm, prior).

    Of 1e7 the last digit is worth a factor e: every kernel must round alike, and so nothing is left to contraction, and
    every product has its x in rows and its bank in columns.
    """
    around = tl.fma(-0.5 * x_facts[1][:, None], bank_facts[0][None, :], product)
    return tl.fma(x_facts[0][:, None], around, bank_facts[1][None, :])


@triton.jit
def weights(
    x, grad, bank, frames, x_facts, bank_facts, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """w and h of tiles; x_facts = (scale, signal, largest l, log of the sum of the others to it, ...)."""
    product, h = engine.two_products(
        x, grad, bank, D, frames[0], frames[2], frames[1], tl.float32, ROWS, COLUMNS, DEPTH
    )  # fmt: skip
    w = tl.exp(logits(product, x_facts, bank_facts) - x_facts[2][:, None] - x_facts[3][:, None])
    return tl.where(x[2][:, None] & bank[2][None, :], w, 0.0), h


@triton.jit
def store(to, some, column, D, value):
    mask = some[2][:, None] & (column < D)[None, :]
    tl.store(to + some[1].to(tl.int64)[:, None] * D + column[None, :], value.to(to.dtype.element_ty), mask=mask)


@triton.jit
def mean_kernel(
    x, bank, frames, x_vectors, bank_vectors, out, lse, B, N, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    own = engine.row_tile(tl.program_id(0), x, B, ROWS)
    x_facts = engine.entries(x_vectors, own[3], own[2])
    column = tl.program_id(1) * OUTPUT + tl.arange(0, OUTPUT)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, OUTPUT], tl.float32)
    for tile in range(tl.cdiv(N, COLUMNS)):
        other = engine.row_tile(tile, bank, N, COLUMNS)
        product = engine.products(own, other, D, frames[0], frames[1], tl.float32, ROWS, COLUMNS, DEPTH)
        l = logits(product, x_facts, engine.entries(bank_vectors, other[3], other[2]))
        l = tl.where(other[2][None, :], l, float("-inf"))
        best = tl.maximum(top, tl.max(l, axis=1))
        base = tl.where(best == float("-inf"), 0.0, best)  # nothing seen yet: keep inf - inf out
        weight, shrink = tl.exp(l - base[:, None]), tl.exp(top - base)
        mass = mass * shrink + tl.sum(weight, axis=1)
        total = engine.gather(total * shrink[:, None], weight, other, frames[1], column, D)
        top = best
    centre = tl.load(frames[1][0] + column, mask=column < D, other=0.0)
    store(out, own, column, D, centre[None, :] + total / mass[:, None])
    if tl.program_id(1) == 0:
        tl.store(lse + own[1], top, mask=own[2])
        tl.store(lse + B + own[1], tl.log(mass), mask=own[2])


@triton.jit
def inner_kernel(
    x, bank, grad, frames, x_vectors, bank_vectors, inner, B, N, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """m"""
    own = engine.row_tile(tl.program_id(0), x, B, ROWS)
    own_grad = engine.row_tile(tl.program_id(0), grad, B, ROWS)
    x_facts = engine.entries(x_vectors, own[3], own[2])
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(tl.cdiv(N, COLUMNS)):
        other = engine.row_tile(tile, bank, N, COLUMNS)
        bank_facts = engine.entries(bank_vectors, other[3], other[2])
        w, h = weights(own, own_grad, other, frames, x_facts, bank_facts, D, ROWS, COLUMNS, DEPTH)
        mass += tl.sum(w, axis=1)
        total += tl.sum(w * h, axis=1)
    tl.store(inner + own[1], total / tl.where(own[2], mass, 1.0), mask=own[2])


@triton.jit
def of_x_kernel(
    x, bank, grad, frames, x_vectors, bank_vectors, out, B, N, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """The last of x_vectors is m, here and below."""
    own = engine.row_tile(tl.program_id(0), x, B, ROWS)
    own_grad = engine.row_tile(tl.program_id(0), grad, B, ROWS)
    x_facts = engine.entries(x_vectors, own[3], own[2])
    column = tl.program_id(1) * OUTPUT + tl.arange(0, OUTPUT)
    total = tl.zeros([ROWS, OUTPUT], tl.float32)
    for tile in range(tl.cdiv(N, COLUMNS)):
        other = engine.row_tile(tile, bank, N, COLUMNS)
        bank_facts = engine.entries(bank_vectors, other[3], other[2])
        w, h = weights(own, own_grad, other, frames, x_facts, bank_facts, D, ROWS, COLUMNS, DEPTH)
        total = engine.gather(total, w * (h - x_facts[4][:, None]), other, frames[1], column, D)
    store(out, own, column, D, x_facts[0][:, None] * total)


@triton.jit
def of_bank_kernel(
    x, bank, grad, frames, x_vectors, bank_vectors, out, B, N, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    own = engine.row_tile(tl.program_id(0), bank, N, COLUMNS)
    bank_facts = engine.entries(bank_vectors, own[3], own[2])
    column = tl.program_id(1) * OUTPUT + tl.arange(0, OUTPUT)
    mass = tl.zeros([COLUMNS], tl.float32)
    total = tl.zeros([COLUMNS, OUTPUT], tl.float32)
    for tile in range(tl.cdiv(B, ROWS)):
        other = engine.row_tile(tile, x, B, ROWS)
        other_grad = engine.row_tile(tile, grad, B, ROWS)
        x_facts = engine.entries(x_vectors, other[3], other[2])
        w, h = weights(other, other_grad, own, frames, x_facts, bank_facts, D, ROWS, COLUMNS, DEPTH)
        pull = x_facts[0][:, None] * w * (h - x_facts[4][:, None])
        mass += tl.sum(pull * x_facts[1][:, None], axis=0)
        total = engine.gather(total, tl.trans(w), other_grad, frames[2], column, D)
        total = engine.gather(total, tl.trans(pull), other, frames[0], column, D)
    store(out, own, column, D, total - mass[:, None] * engine.framed(own, column, D, frames[1], tl.float32))


class Sides(NamedTuple):
    """What every kernel is told of x and of the bank."""

    frames: tuple[engine.Frame, engine.Frame, engine.Frame]  # of x, of the bank, of the gradient
    x_vectors: tuple[Tensor, ...]
    bank_vectors: tuple[Tensor, ...]


def sides(bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor, *vectors: Tensor) -> Sides:
    centre = bank.mean(0, dtype=torch.float32)
    frame: engine.Frame = (centre, None, None)
    norm = engine.squared_norms(bank, bank[:0], frame, tl.float32)
    prior = log_prior if len(log_prior) else torch.zeros_like(norm)
    frames = ((centre, signal, None), frame, (None, None, None))
    return Sides(frames, (signal / sigma.square(), signal, *vectors), (norm, prior))


def tiles(count: int, D: int, **output: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants; a row of nothing still has its logits. Rows and columns of a tile are equally many."""
    grid = triton.cdiv(count, LINE.rows), max(1, triton.cdiv(D, LINE.output)) if output else 1
    shape = {"ROWS": LINE.rows, "COLUMNS": LINE.columns, "DEPTH": LINE.depth, **output}
    return grid, {**shape, "num_warps": LINE.warps, "num_stages": LINE.stages}


def posterior_mean(
    x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor
) -> tuple[Tensor, Tensor]:
    (B, D), N = x_t.shape, len(bank)
    out, lse = x_t.new_empty(B, D), x_t.new_empty(2, B, dtype=torch.float32)
    if B > 0:
        with torch.cuda.device_of(x_t):
            grid, constants = tiles(B, D, OUTPUT=LINE.output)
            known = sides(bank, signal, sigma, log_prior)
            mean_kernel[grid](rows.pair(x_t), rows.pair(bank), *known, out, lse, B, N, D, **constants)
    return out, lse


def posterior_mean_bwd(
    grad: Tensor, x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor, out: Tensor,
    lse: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, D), N = x_t.shape, len(bank)
    of_x, of_bank = (x.new_empty(x.shape if need else 0) for x, need in zip((x_t, bank), needs, strict=True))
    if B == 0 or D == 0:
        return of_x, of_bank.zero_()
    with torch.cuda.device_of(x_t):
        inner = torch.empty(B, dtype=torch.float32, device=x_t.device)
        known = sides(bank, signal, sigma, log_prior, *lse, inner)
        three = [rows.pair(x) for x in (x_t, bank, grad)]
        grid, constants = tiles(B, D)
        inner_kernel[grid](*three, *known._replace(x_vectors=known.x_vectors[:4]), inner, B, N, D, **constants)
        for kernel, to, count in ((of_x_kernel, of_x, B), (of_bank_kernel, of_bank, N)):
            if to.numel():
                grid, constants = tiles(count, D, OUTPUT=LINE.output)
                kernel[grid](*three, *known, to, B, N, D, **constants)
    return of_x, of_bank
