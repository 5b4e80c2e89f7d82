"""The row-wise plan: sums along the rows of tensors that are compared with a first one, in one pass over memory.

    sums[k][i] = sum_d TERM(first[i, d], rest[k][i, d]);    FINISH turns the sums of a row into outputs.

A program owns a tile of rows and a span of columns. Few rows of enormous width are split into parts, whose sums a
second kernel adds in order: what is added to what depends on sizes alone, so every run gives the same bits.
To a kernel, a tensor of rows is the pair (pointer, stride): any stride between rows, contiguous elements in a row.
Row numbers are 64-bit before they meet a stride.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """A tile of rows x columns. 1024 elements over 128 threads are whole 16-byte loads in every dtype."""

    rows: int
    columns: int
    warps: int


CONFIGS = (Config(8, 128, 4), Config(2, 512, 4), Config(1, 1024, 4))
FINISH_ROWS = 64
PROGRAMS = 512  # enough to fill an H200: about four for each multiprocessor
SPAN = 4096  # the sums of a narrower part cost more than it gains


def config(D: int) -> Config:
    """The first tile that holds a whole row, else the widest."""
    return next((c for c in CONFIGS if c.columns >= D), CONFIGS[-1])


def split(B: int, D: int) -> tuple[int, int]:
    """Number of parts that a row is cut into, and their width: functions of the sizes only."""
    tile = config(D)
    parts = max(1, min(triton.cdiv(D, SPAN), PROGRAMS // triton.cdiv(B, tile.rows)))
    span = triton.cdiv(triton.cdiv(D, parts), tile.columns) * tile.columns
    return triton.cdiv(D, span), span


def pair(x: Tensor) -> tuple[Tensor, int]:
    return x, x.stride(0)


@triton.jit
def row_tile(B, ROWS: tl.constexpr):
    """This program's row numbers, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < B


@triton.jit
def load(x, row, column, mask):
    """The tile x[row, column] in float32; zero where masked."""
    return tl.load(x[0] + row[:, None] * x[1] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def sum_kernel(
    first, rest, extra, outputs, partial, B, D, span,
    TERM: tl.constexpr, FINISH: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, exists = row_tile(B, ROWS)
    start = tl.program_id(1) * span
    tiles = [tl.zeros([ROWS, COLUMNS], tl.float32) for _ in rest]
    for at in range(start, tl.minimum(start + span, D), COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        mask = exists[:, None] & (column < D)[None, :]
        x = load(first, row, column, mask)
        added = ()
        for k in tl.static_range(len(rest)):
            term = TERM(x, load(rest[k], row, column, mask))
            added += (tiles[k] + tl.where(mask, term, 0.0),)
        tiles = added
    sums = [tl.sum(tile, axis=1) for tile in tiles]
    if SPLIT:
        part = tl.program_id(1).to(tl.int64)
        for k in tl.static_range(len(rest)):
            tl.store(partial + (part * len(rest) + k) * B + row, sums[k], mask=exists)
    else:
        FINISH(sums, row, exists, B, D, extra, outputs)


@triton.jit
def finish_kernel(
    extra, outputs, partial, parts, B, D, COUNT: tl.constexpr, FINISH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row, exists = row_tile(B, ROWS)
    sums = ()
    for k in tl.static_range(COUNT):
        total = tl.zeros([ROWS], tl.float32)
        for part in range(parts):
            total += tl.load(partial + (part * COUNT + k) * B + row, mask=exists, other=0.0)
        sums += (total,)
    FINISH(sums, row, exists, B, D, extra, outputs)


def sum_rows(
    first: Tensor,
    rest: Sequence[Tensor],
    extra: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    TERM: Any,
    FINISH: Any,
) -> None:
    """Fill `outputs`; one launch, or two where rows are split. B and D are at least 1; every stride is the caller's."""
    (B, D), count = first.shape, len(rest)
    tile, (parts, span) = config(D), split(B, D)
    partial = torch.empty((parts, count, B) if parts > 1 else 0, dtype=torch.float32, device=first.device)
    sum_kernel[triton.cdiv(B, tile.rows), parts](
        pair(first), tuple(pair(x) for x in rest), extra, outputs, partial, B, D, span,
        TERM=TERM, FINISH=FINISH, SPLIT=parts > 1, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    if parts > 1:
        finish_kernel[(triton.cdiv(B, FINISH_ROWS),)](
            extra, outputs, partial, parts, B, D, COUNT=count, FINISH=FINISH, ROWS=FINISH_ROWS, num_warps=2
        )
