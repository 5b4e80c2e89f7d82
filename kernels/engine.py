"""The pairwise engine, streaming plan: scores of rows against rows, tile by tile, nothing N x N is ever stored.

    forward   state_i = UPDATE over tiles of s_ij = SCORE(q_i . k_j, ...),  output_i = FINISH(state_i)
    backward  grad_i  = factor * sum_j W_ij (x_i - x_j),  W = WEIGHT(s, ...) recomputed tile by tile
              of directions, the part of -factor * sum_j W_ij x_j / |x_i| at right angles to x_i

The rows i are x [N, D]; the partners j are the rows of x and then those of a second bank [M, D]. SCORE, START, UPDATE,
FINISH and WEIGHT are a family's @triton.jit functions; the state and the per-row vectors are tuples. A vector has N + M
entries and is read at i for the rows of a tile and at j for its columns.

Numerics. On load the column mean of x is subtracted, or, of directions, a row is multiplied by a power of two; then
values are rounded to the rows' dtype once, and products and norms see the same rounded values. float32 products are
float32 ("ieee", no TF32). A block of rows owns its output: no atomics, and the order of every sum depends on sizes and
dtype only.

Cost. Forward 2 N (N + M) D operations and ceil(N / rows) reads of the partners, mostly from L2. A block of gradient
columns (256 in 16 bits, 128 in float32) contracts over all of D again, so backward takes 1 + ceil(D / block) times the
forward: twice for narrow rows; few rows of great width belong to the split-K plan.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from imbdiff.kernels import rows
from torch import Tensor


class Config(NamedTuple):
    """A tile of `rows` x `columns` scores, contracted `depth` at a time, and the width of a gradient block."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    whole: bool  # depth, and output, hold all of D
    output: int = 0


# By the largest D that a line serves (0: any), for 16-bit rows on tensor cores and for exact float32. Chosen by the
# registers and shared memory that tests/kernels/test_aot.py reports, not yet by the clock.
FORWARD = {
    16: {64: Config(64, 64, 64, 4, 2, True), 128: Config(64, 64, 128, 4, 2, True), 256: Config(64, 64, 256, 8, 1, True),
         0: Config(128, 64, 32, 8, 2, False)},
    32: {0: Config(64, 64, 16, 8, 1, False)},
}  # fmt: skip
BACKWARD = {
    16: {64: Config(64, 32, 64, 4, 1, True, 64), 128: Config(64, 32, 128, 8, 1, True, 128),
         0: Config(64, 64, 64, 8, 1, False, 256)},
    32: {0: Config(32, 32, 16, 4, 1, False, 128)},
}  # fmt: skip
NORM = rows.Config(8, 128, 4)
SMALLEST_NORM = 1e-12


def config(table: dict[int, dict[int, Config]], dtype: torch.dtype, D: int) -> Config:
    lines = table[dtype.itemsize * 8]
    return next((line for width, line in lines.items() if width >= D), lines[0])


def operand(dtype: torch.dtype) -> Any:
    """What a tile is rounded to. Triton's interpreter computes bfloat16 on bit patterns, so there it stays float32."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and triton.knobs.runtime.interpret):
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


@triton.jit
def row_tile(tile, source, N, ROWS: tl.constexpr):
    """What the engine knows of a tile of rows: (pointer, stride), rows, which exist, their position."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return source, row, row < N, row


@triton.jit
def partner_tile(tile, x, bank, N, M, COLUMNS: tl.constexpr):
    """The same of a tile of x's rows or, after those, the bank's; the position is that among N + M."""
    own_tiles = tl.cdiv(N, COLUMNS)
    own = tile < own_tiles
    row = tl.where(own, tile, tile - own_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    source = (tl.where(own, x[0], bank[0]), tl.where(own, x[1], bank[1]))
    return source, row, row < tl.where(own, N, M), row + tl.where(own, 0, N)


@triton.jit
def framed(some, column, D, frame, OPERAND: tl.constexpr):
    """Rows less their share of the centre, times their root; rounded once, zero outside. `some` is a tile of rows."""
    source, row, exists, position = some
    centre, share, root = frame
    mask = exists[:, None] & (column < D)[None, :]
    value = rows.load(source, row.to(tl.int64), column, mask)
    if centre is not None:
        shift = tl.load(centre + column, mask=column < D, other=0.0)[None, :]
        if share is not None:
            shift = shift * tl.load(share + position, mask=exists, other=0.0)[:, None]
        value -= shift
    if root is not None:
        value *= tl.load(root + position, mask=exists, other=0.0)[:, None]
    return tl.where(mask, value, 0.0).to(OPERAND)


@triton.jit
def entries(vectors, position, exists):
    return [tl.load(vector + position, mask=exists, other=0.0) for vector in vectors]


@triton.jit
def products(
    own, other, D, own_frame, other_frame,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """q k^T, contracted in steps of DEPTH."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, DEPTH):
        column = start + tl.arange(0, DEPTH)
        q = framed(own, column, D, own_frame, OPERAND)
        k = framed(other, column, D, other_frame, OPERAND)
        total = tl.dot(q, tl.trans(k), total, input_precision="ieee")
    return total


@triton.jit
def gather(total, weight, other, frame, column, D):
    """total + weight rows, in float32"""
    return tl.dot(weight, framed(other, column, D, frame, tl.float32), total, input_precision="ieee")


@triton.jit
def norm_kernel(
    x, bank, frame, norm, N, M, D, OPERAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    some = partner_tile(tl.program_id(0), x, bank, N, M, ROWS)
    total = tl.zeros([ROWS, COLUMNS], norm.dtype.element_ty)
    for start in range(0, D, COLUMNS):
        value = framed(some, start + tl.arange(0, COLUMNS), D, frame, OPERAND).to(norm.dtype.element_ty)
        total += value * value
    tl.store(norm + some[3], tl.sum(total, axis=1), mask=some[2])


@triton.jit
def forward_kernel(
    x, bank, frame, vectors, outputs, scale, N, M, D,
    SCORE: tl.constexpr, START: tl.constexpr, UPDATE: tl.constexpr, FINISH: tl.constexpr, SELF: tl.constexpr,
    OPERAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    own = row_tile(tl.program_id(0), x, N, ROWS)
    i, here = own[1], own[2]
    left = entries(vectors, i, here)
    if WHOLE:
        q = framed(own, tl.arange(0, DEPTH), D, frame, OPERAND)
    state = START(ROWS)
    for tile in range(tl.cdiv(N, COLUMNS) + tl.cdiv(M, COLUMNS)):
        other = partner_tile(tile, x, bank, N, M, COLUMNS)
        _, _, there, position = other
        if WHOLE:
            k = framed(other, tl.arange(0, DEPTH), D, frame, OPERAND)
            product = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            product = products(own, other, D, frame, frame, OPERAND, ROWS, COLUMNS, DEPTH)
        same = i[:, None] == position[None, :]
        right = entries(vectors, position, there)
        score = SCORE(product, left, right, same, scale)
        counted = here[:, None] & there[None, :]
        if not SELF:
            counted = counted & (i[:, None] != position[None, :])
        state = UPDATE(state, tl.where(counted, score, float("-inf")), left, right)
    FINISH(state, i, here, outputs)


@triton.jit
def backward_kernel(
    x, bank, frame, vectors, factor, grad, scale, N, M, D,
    SCORE: tl.constexpr, WEIGHT: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OUTPUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    own = row_tile(tl.program_id(0), x, N, ROWS)
    i, here = own[1], own[2]
    left = entries(vectors, i, here)
    column = tl.program_id(1) * OUTPUT + tl.arange(0, OUTPUT)
    if WHOLE:
        q = framed(own, column, D, frame, OPERAND)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, OUTPUT], tl.float32)
    for tile in range(tl.cdiv(N, COLUMNS) + tl.cdiv(M, COLUMNS)):
        other = partner_tile(tile, x, bank, N, M, COLUMNS)
        _, _, there, position = other
        k = framed(other, column, D, frame, OPERAND)
        if WHOLE:
            product = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            product = products(own, other, D, frame, frame, OPERAND, ROWS, COLUMNS, DEPTH)
        same = i[:, None] == position[None, :]
        right = entries(vectors, position, there)
        weight = WEIGHT(SCORE(product, left, right, same, scale), left, right)
        # A row does not pull on itself. The mass is that of the rounded weights, so that a common shift cancels.
        counted = here[:, None] & there[None, :] & (i[:, None] != position[None, :])
        weight = tl.where(counted, weight, 0.0).to(OPERAND)
        if frame[2] is None:
            mass += tl.sum(weight.to(tl.float32), axis=1)
        else:
            mass += tl.sum(weight.to(tl.float32) * product, axis=1)
        total = tl.dot(weight, k, total, input_precision="ieee")
    if not WHOLE:
        q = framed(own, column, D, frame, OPERAND)
    each = tl.load(factor) + tl.zeros([ROWS], tl.float32)
    if frame[2] is not None:
        # The mass so far is q . total; what is left of the total is at right angles to the row.
        mass *= left[0] * left[0]
        each *= left[0] * tl.load(frame[2] + i, mask=here, other=0.0)
    value = each[:, None] * (mass[:, None] * q.to(tl.float32) - total)
    at = grad + i.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(at, value.to(grad.dtype.element_ty), mask=here[:, None] & (column < D)[None, :])


Frame = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(centre [D], share [rows], root [rows]), each or None: what `framed` does to rows."""


def squared_norms(x: Tensor, bank: Tensor, frame: Frame, rounded_to: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N + M] of the framed, rounded rows, summed in this dtype."""
    (N, D), M = x.shape, len(bank)
    norm = torch.empty(N + M, dtype=dtype, device=x.device)
    norm_kernel[(triton.cdiv(N, NORM.rows) + triton.cdiv(M, NORM.rows),)](
        rows.pair(x), rows.pair(bank), frame, norm, N, M, D,
        OPERAND=rounded_to, ROWS=NORM.rows, COLUMNS=NORM.columns, num_warps=NORM.warps,
    )  # fmt: skip
    return norm


def centred(x: Tensor, bank: Tensor) -> tuple[Frame, Tensor]:
    """The frame of distances, and the squared norms in it."""
    frame = (x.mean(0, dtype=torch.float32), None, None)
    return frame, squared_norms(x, bank, frame, operand(x.dtype))


def directions(x: Tensor, bank: Tensor) -> tuple[Frame, Tensor]:
    """The frame of cosines, and the inverse lengths in it; both are 0 of a row without a direction.

    Roots are powers of two, which round nothing, and leave lengths between 1/2 and 1.
    """
    # In float64, where the squares of float32 rows do not overflow.
    length = squared_norms(x, bank, (None, None, None), operand(x.dtype), torch.float64).sqrt().float()
    mantissa, exponent = torch.frexp(length)
    directed = ~(length <= SMALLEST_NORM)  # a row of nan stays one
    root = torch.where(directed, torch.ldexp(torch.ones_like(length), -exponent), 0)
    return (None, None, root), torch.where(directed, 1 / mantissa, 0)


def forward(
    x: Tensor, bank: Tensor, frame: Frame, vectors: tuple[Tensor, ...], outputs: tuple[Tensor, ...], scale: float,
    **functions: Any,
) -> None:  # fmt: skip
    """Fill `outputs`. `functions`: SCORE, START, UPDATE, FINISH, and SELF, whether a row is its own partner."""
    (N, D), M = x.shape, len(bank)
    tile = config(FORWARD, x.dtype, D)
    forward_kernel[(triton.cdiv(N, tile.rows),)](
        rows.pair(x), rows.pair(bank), frame, vectors, outputs, scale, N, M, D, **functions, OPERAND=operand(x.dtype),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WHOLE=tile.whole,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def backward(
    x: Tensor, bank: Tensor, frame: Frame, vectors: tuple[Tensor, ...], factor: Tensor, scale: float, **functions: Any
) -> Tensor:
    """factor * sum_j W_ij (x_i - x_j), `factor` a tensor of one element. `functions`: SCORE and WEIGHT."""
    (N, D), M = x.shape, len(bank)
    tile = config(BACKWARD, x.dtype, D)
    grad = x.new_empty(N, D)
    backward_kernel[triton.cdiv(N, tile.rows), triton.cdiv(D, tile.output)](
        rows.pair(x), rows.pair(bank), frame, vectors, factor, grad, scale, N, M, D, **functions,
        OPERAND=operand(x.dtype), ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, OUTPUT=tile.output,
        WHOLE=tile.whole, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad
