"""neighbours in CUDA, emulated; see emulated.py. Radii and counts are those of float64, to the last bit."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, Buffer, needs_compiler, rows

pytestmark = [needs_compiler, pytest.mark.xdist_group("emulated_neighbours")]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.double()[:, None] - b.double()[None]).square().sum(2)


def radius(kernels: ctypes.CDLL, x: Buffer, k: int, squared: bool = True) -> Tensor:
    (N, D), code = x.view.shape, DTYPES.index(x.whole.dtype)
    sizes = ctypes.c_int64(N), ctypes.c_int64(D)
    kernels.neighbours_scratch.restype = ctypes.c_int64
    out, scratch = Buffer((N,)), Buffer((kernels.neighbours_scratch(sizes[0], k),), torch.float64)
    common = (code, *sizes, ctypes.c_void_p(x.pointer), ctypes.c_int64(x.stride), k, int(squared))
    kernels.neighbours_radius(*common, ctypes.c_void_p(out.pointer), ctypes.c_void_p(scratch.pointer))
    assert all(b.untouched_around() for b in (x, out, scratch))
    return out.view[0]


def count(kernels: ctypes.CDLL, x: Buffer, y: Buffer, squared_radii: Tensor) -> tuple[Tensor, Tensor]:
    (N, D), M = x.view.shape, len(y.view)
    radii, balls, inhabitants = Buffer((M,)).fill(squared_radii), *(torch.zeros(n, dtype=torch.int64) for n in (N, M))
    sizes = [ctypes.c_int64(n) for n in (N, M, D)]
    at = [f(n) for b in (x, y) for f, n in ((ctypes.c_void_p, b.pointer), (ctypes.c_int64, b.stride))]
    to = [ctypes.c_void_p(p) for p in (radii.pointer, balls.data_ptr(), inhabitants.data_ptr())]
    kernels.neighbours_count(DTYPES.index(x.whole.dtype), *sizes, *at, *to)
    assert all(b.untouched_around() for b in (x, y, radii))
    return balls, inhabitants


def expected(x: Tensor, k: int) -> Tensor:
    return squared_distances(x, x).fill_diagonal_(math.inf).sort(1).values[:, k - 1]


@pytest.mark.parametrize(
    ("N", "D", "dtype", "k"),
    [
        (2, 3, torch.float32, 1),
        (70, 9, torch.float32, 3),  # tiles cut on every side, the columns in parts
        (70, 9, torch.bfloat16, 3),
        (66, 131, torch.float16, 32),
        (33, 20, torch.float32, 32),  # all others
        (100, 40, torch.float32, 2),  # differences that float32 rounds
        (140, 1, torch.float32, 5),  # several tiles in a part
        (3, 0, torch.float32, 2),
    ],
)
def test_radius(kernels: ctypes.CDLL, N: int, D: int, dtype: torch.dtype, k: int) -> None:
    x = rows((N, D), dtype, 1, gap=D % 5, shift=D % 2)
    x.view.add_(30 * (D % 2))  # a common offset: what cancels in a Gram form
    want = expected(x.view, k)
    assert torch.equal(radius(kernels, x, k), want.float())
    assert torch.equal(radius(kernels, x, k, squared=False), want.sqrt().float())


def test_ties_and_copies(kernels: ctypes.CDLL) -> None:
    """On a grid most distances are tied, and a copy of a row is a row at distance zero."""
    grid = torch.randint(0, 3, (150, 6), generator=torch.Generator().manual_seed(2)) / 3
    x, y = Buffer((150, 6)).fill(grid), Buffer((90, 6)).fill(grid[30:120])
    for k in (1, 4):
        assert torch.equal(radius(kernels, x, k), expected(x.view, k).float())
    radii = radius(kernels, y, 6)
    inside = squared_distances(x.view, y.view).float() < radii
    assert (squared_distances(x.view, y.view).float() == radii).any()  # outside, though as far as the radius
    balls, inhabitants = count(kernels, x, y, radii)
    assert torch.equal(balls, inside.sum(1))
    assert torch.equal(inhabitants, inside.sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "M", "D"), [(5, 3, 7), (70, 131, 20), (64, 64, 16), (1, 200, 33), (4, 0, 2), (0, 4, 2), (3, 4, 0)]
)
def test_count(kernels: ctypes.CDLL, dtype: torch.dtype, N: int, M: int, D: int) -> None:
    x, y = rows((N, D), dtype, 1, gap=3), rows((M, D), dtype, 2, gap=D % 4, shift=1)
    radii = 2 * D * torch.rand(M, generator=torch.Generator().manual_seed(3))
    inside = squared_distances(x.view, y.view).float() < radii
    balls, inhabitants = count(kernels, x, y, radii)
    assert torch.equal(balls, inside.sum(1))
    assert torch.equal(inhabitants, inside.sum(0))


def test_nan_is_near_nothing(kernels: ctypes.CDLL) -> None:
    x = rows((6, 10), torch.float32, 1)
    x.view[2, 9] = math.nan
    got, rest = radius(kernels, x, 3), [0, 1, 3, 4, 5]
    assert got[2].isnan()
    assert torch.equal(got[rest], expected(x.view[rest], 3).float())
    assert radius(kernels, x, 5).isnan().all()  # there are but four others
    balls, inhabitants = count(kernels, x, x, torch.full((6,), 1e9))
    assert balls.tolist() == inhabitants.tolist() == [5, 5, 0, 5, 5, 5]
