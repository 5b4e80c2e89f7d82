"""Products whose matrix is stored, in exact float32: rows with rows, and a matrix of weights with rows.

    products  out_ij = x_i . y_j, or FINISH of it
    gather    out_i = sum over terms of sum_j weight_ij row_j, and row i of each base

Rows are [N, D], or [L, N, D] with a matrix for each l; frames are the engine's, for one l.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from imbdiff.kernels import engine
from torch import Tensor

# Rows that come in 16 bits are multiplied as TF32 on sm_100, whatever is asked for, by tiles of 64 rows: so 32 rows.
PRODUCT = engine.Config(32, 64, 32, 8, 1, False)
GATHER = engine.Config(32, 16, 0, 8, 1, False, 128)
AS_IT_IS: engine.Frame = (None, None, None)


@triton.jit
def tile_of(tile, source, batch, count, SIZE: tl.constexpr):
    """A tile of the engine's; `source` is (pointer, strides of batch and row)."""
    return engine.row_tile(tile, (source[0] + batch * source[1], source[2]), count, SIZE)


@triton.jit
def product_kernel(
    x, y, frames, x_vectors, y_vectors, out, N, M, D,
    FINISH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(N, ROWS), tl.cdiv(M, COLUMNS)
    batch = (tl.program_id(0) // (down * across)).to(tl.int64)
    own = tile_of(tl.program_id(0) % down, x, batch, N, ROWS)
    other = tile_of(tl.program_id(0) // down % across, y, batch, M, COLUMNS)
    value = engine.products(own, other, D, frames[0], frames[1], tl.float32, ROWS, COLUMNS, DEPTH)
    if FINISH is not None:
        left, right = engine.entries(x_vectors, own[3], own[2]), engine.entries(y_vectors, other[3], other[2])
        value = FINISH(value, left, right)
    at = (batch * N + own[1][:, None]) * M + other[1][None, :]
    tl.store(out + at, value, mask=own[2][:, None] & other[2][None, :])


@triton.jit
def gather_kernel(
    out, terms, frames, bases, base_frames, N, M, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """Terms are (weights, their strides, rows)."""
    tiles = tl.cdiv(N, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    _, i, here, _ = engine.row_tile(tl.program_id(0) % tiles, out, N, ROWS)
    column = tl.program_id(1) * OUTPUT + tl.arange(0, OUTPUT)
    total = tl.zeros([ROWS, OUTPUT], tl.float32)
    for tile in range(tl.cdiv(M, COLUMNS)):
        for k in tl.static_range(len(terms)):
            weights, strides, source = terms[k]
            other = tile_of(tile, source, batch, M, COLUMNS)
            at = i.to(tl.int64)[:, None] * strides[1] + other[1].to(tl.int64)[None, :] * strides[2]
            weight = tl.load(weights + batch * strides[0] + at, mask=here[:, None] & other[2][None, :], other=0.0)
            if tl.max((weight != 0).to(tl.int32)) > 0:  # of a sharp softmax and of a hinge few tiles are
                total = engine.gather(total, weight, other, frames[k], column, D)
    for k in tl.static_range(len(bases)):
        base = tile_of(tl.program_id(0) % tiles, bases[k], batch, N, ROWS)
        total += engine.framed(base, column, D, base_frames[k], tl.float32)
    at = (batch * N + i[:, None]) * D + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=here[:, None] & (column < D)[None, :])


def source(x: Tensor) -> tuple[Tensor, int, int]:
    return x, x.stride(0) if x.ndim == 3 else 0, x.stride(-2)


def products(
    x: Tensor, y: Tensor, frames: tuple[engine.Frame, ...] = (AS_IT_IS, AS_IT_IS),
    x_vectors: tuple[Tensor, ...] = (), y_vectors: tuple[Tensor, ...] = (), FINISH: Any = None,
) -> Tensor:  # fmt: skip
    """FINISH(product, entries of the vectors at its rows, at its columns)."""
    (N, D), M = x.shape[-2:], y.shape[-2]
    out = torch.empty((*x.shape[:-1], M), dtype=torch.float32, device=x.device)
    tiles = x.shape[:-2].numel() * triton.cdiv(N, PRODUCT.rows) * triton.cdiv(M, PRODUCT.columns)
    product_kernel[(tiles,)](
        source(x), source(y), frames, x_vectors, y_vectors, out, N, M, D, FINISH=FINISH,
        ROWS=PRODUCT.rows, COLUMNS=PRODUCT.columns, DEPTH=PRODUCT.depth,
        num_warps=PRODUCT.warps, num_stages=PRODUCT.stages,
    )  # fmt: skip
    return out


def gather(
    out: Tensor, terms: Sequence[tuple[Tensor, Tensor, engine.Frame]], *bases: tuple[Tensor, engine.Frame]
) -> Tensor:
    """Terms are (weights [rows of out, other rows], other rows, their frame)."""
    if out.numel():
        given = [(w, w.stride() if w.ndim == 3 else (0, *w.stride()), source(x)) for w, x, _ in terms]
        frames, base_frames = (tuple(each[-1] for each in some) for some in (terms, bases))
        (N, D), M = out.shape[-2:], terms[0][1].shape[-2]
        tiles = out.shape[:-2].numel() * triton.cdiv(N, GATHER.rows)
        gather_kernel[tiles, triton.cdiv(D, GATHER.output)](
            out, tuple(given), frames, tuple(source(x) for x, _ in bases), base_frames, N, M, D,
            ROWS=GATHER.rows, COLUMNS=GATHER.columns, OUTPUT=GATHER.output,
            num_warps=GATHER.warps, num_stages=GATHER.stages,
        )  # fmt: skip
    return out
