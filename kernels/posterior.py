"""The posterior mean over a bank of rows: one product makes the logits, another is the weights times the bank.

    b_j  = bank_j - c,  a_i = x_i - signal_i c                                             c: the bank's mean
    l_ij = scale_i (a_i . b_j - signal_i |b_j|^2 / 2) + prior_j                            scale = signal / sigma^2
    mean = c + sum_j w_ij b_j                                                              w: softmax of l
    h_ij = g_i . b_j,  m_i = sum_j w_ij h_ij,  z_ij = scale_i w_ij (h_ij - m_i)            g: the mean's gradient
    of x = sum_j z_ij b_j
    of b = sum_i w_ij g_i + z_ij (a_i - signal_i b_j)

Logits reach 1e7 where sigma is small, so rows of every type are multiplied in float32. m is summed from the weights and
not taken from the mean, which is rounded: the z of a row add up to 0.

Time 4 B N D forward; 6 B N D backward for x alone, 8 for the bank alone, 10 for both. The rows of x are taken so many
at once that a matrix of them and the bank has a sixteenth of the bank's elements, or 2^25 where that is more; up to
four such matrices are held. Where the rows take several turns, gradients of the bank wait for the next in float32.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from imbdiff.kernels import engine, rows
from torch import Tensor

# Rows that come in 16 bits are multiplied as TF32 on sm_100, whatever is asked for, by tiles of 64 rows: so 32 rows.
PRODUCT = engine.Config(32, 64, 32, 4, 1, False)
GATHER = engine.Config(32, 32, 0, 8, 1, False, 128)
MATRIX = 2**25
AS_IT_IS: engine.Frame = (None, None, None)


@triton.jit
def product_kernel(
    x, bank, frames, x_vectors, bank_vectors, out, B, N, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x . bank; with vectors, (scale, signal) of x and (norm, prior) of the bank, the logits."""
    tiles = tl.cdiv(B, ROWS)
    own = engine.row_tile(tl.program_id(0) % tiles, x, B, ROWS)
    other = engine.row_tile(tl.program_id(0) // tiles, bank, N, COLUMNS)
    value = engine.products(own, other, D, frames[0], frames[1], tl.float32, ROWS, COLUMNS, DEPTH)
    if x_vectors is not None:
        scale, signal = engine.entries(x_vectors, own[3], own[2])
        norm, prior = engine.entries(bank_vectors, other[3], other[2])
        # Of 1e7 the last digit is worth a factor e: nothing is left to contraction.
        value = tl.fma(-0.5 * signal[:, None], norm[None, :], value)
        value = tl.fma(scale[:, None], value, prior[None, :])
    at = out + own[1].to(tl.int64)[:, None] * N + other[1][None, :]
    tl.store(at, value, mask=own[2][:, None] & other[2][None, :])


@triton.jit
def gather_kernel(
    out, terms, frames, bases, base_frames, count, others, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """out_i = sum of sum_j weight_ij row_j over terms (weights, their strides, rows), and of row i of each base."""
    _, i, here, _ = engine.row_tile(tl.program_id(0), out, count, ROWS)
    column = tl.program_id(1) * OUTPUT + tl.arange(0, OUTPUT)
    total = tl.zeros([ROWS, OUTPUT], tl.float32)
    for tile in range(tl.cdiv(others, COLUMNS)):
        for k in tl.static_range(len(terms)):
            weights, of, across, source = terms[k]
            other = engine.row_tile(tile, source, others, COLUMNS)
            at = weights + i.to(tl.int64)[:, None] * of + other[1].to(tl.int64)[None, :] * across
            weight = tl.load(at, mask=here[:, None] & other[2][None, :], other=0.0)
            total = engine.gather(total, weight, other, frames[k], column, D)
    for k in tl.static_range(len(bases)):
        total += engine.framed((bases[k], i, here, i), column, D, base_frames[k], tl.float32)
    at = out + i.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[:, None] & (column < D)[None, :])


Vectors = tuple[Tensor, ...] | None


def products(
    x: Tensor, bank: Tensor, frames: tuple[engine.Frame, ...], of_x: Vectors = None, of_bank: Vectors = None
) -> Tensor:
    (B, D), N = x.shape, len(bank)
    out = torch.empty((B, N), dtype=torch.float32, device=x.device)
    product_kernel[(triton.cdiv(B, PRODUCT.rows) * triton.cdiv(N, PRODUCT.columns),)](
        rows.pair(x), rows.pair(bank), frames, of_x, of_bank, out, B, N, D,
        ROWS=PRODUCT.rows, COLUMNS=PRODUCT.columns, DEPTH=PRODUCT.depth,
        num_warps=PRODUCT.warps, num_stages=PRODUCT.stages,
    )  # fmt: skip
    return out


def gather(
    out: Tensor, terms: Sequence[tuple[Tensor, Tensor, engine.Frame]], *bases: tuple[Tensor, engine.Frame]
) -> None:
    """Terms are (weights [rows of out, other rows], other rows, their frame)."""
    if out.numel():
        given = [(weights, *weights.stride(), rows.pair(x)) for weights, x, _ in terms]
        frames, base_frames = (tuple(each[-1] for each in some) for some in (terms, bases))
        (count, D), others = out.shape, len(terms[0][1])
        gather_kernel[triton.cdiv(count, GATHER.rows), triton.cdiv(D, GATHER.output)](
            out, tuple(given), frames, tuple(rows.pair(x) for x, _ in bases), base_frames, count, others, D,
            ROWS=GATHER.rows, COLUMNS=GATHER.columns, OUTPUT=GATHER.output,
            num_warps=GATHER.warps, num_stages=GATHER.stages,
        )  # fmt: skip


def height(N: int, D: int) -> int:
    """Rows of x at once."""
    return max(1, max(D // 16, MATRIX // N) // PRODUCT.rows) * PRODUCT.rows


def slices(
    x: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor
) -> Iterator[tuple[slice, Tensor, tuple[engine.Frame, ...], Tensor]]:
    """Rows of x: which, themselves, the frames of them and of the bank, their logits."""
    (B, D), N = x.shape, len(bank)
    frame: engine.Frame = (bank.mean(0, dtype=torch.float32), None, None)
    norm = engine.squared_norms(bank, bank[:0], frame, tl.float32)
    prior = log_prior if len(log_prior) else torch.zeros_like(norm)
    for first in range(0, B, height(N, D)):
        at = slice(first, first + height(N, D))
        frames, facts = ((frame[0], signal[at], None), frame), (signal[at] / sigma[at].square(), signal[at])
        yield at, x[at], frames, products(x[at], bank, frames, facts, (norm, prior))


def posterior_mean(
    x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor
) -> tuple[Tensor, Tensor]:
    B, D = x_t.shape
    out, lse = x_t.new_empty(B, D), x_t.new_empty(2, B, dtype=torch.float32)
    if B > 0:
        with torch.cuda.device_of(x_t):
            for at, _, frames, l in slices(x_t, bank, signal, sigma, log_prior):
                w, centre = l.softmax(1), frames[1][0]
                lse[0, at], lse[1, at] = l.amax(1), -w.amax(1).log()
                gather(out[at], [(w, bank, frames[1])], (centre.expand(len(w), D), AS_IT_IS))
    return out, lse


def posterior_mean_bwd(
    grad: Tensor, x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor, out: Tensor,
    lse: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`lse` is not read: the weights are the softmax of the logits as they are made here."""
    of_x, of_bank = (x.new_empty(x.shape if need else 0) for x, need in zip((x_t, bank), needs, strict=True))
    if x_t.numel() == 0:
        return of_x, of_bank.zero_()
    one = len(x_t) <= height(*bank.shape)
    total = of_bank if one else of_bank.new_empty(of_bank.shape, dtype=torch.float32)
    with torch.cuda.device_of(x_t):
        for at, x, frames, l in slices(x_t, bank, signal, sigma, log_prior):
            w, h = l.softmax(1), products(grad[at], bank, (AS_IT_IS, frames[1]))
            z = h.sub_((w * h).sum(1, keepdim=True) / w.sum(1, keepdim=True)).mul_(w)
            z *= (signal[at] / sigma[at].square())[:, None]
            gather(of_x[at], [(z, bank, frames[1])])
            pulled = (frames[1][0], None, -(z * signal[at, None]).sum(0))
            before = [(total, AS_IT_IS)] if at.start else []
            gather(total, [(w.T, grad[at], AS_IT_IS), (z.T, x, frames[0])], (bank, pulled), *before)
    return of_x, total.to(bank.dtype)
