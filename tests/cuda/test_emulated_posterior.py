"""posterior in CUDA, emulated; see emulated.py. Draws are those of float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, Buffer, needs_compiler, pointers, rows

pytestmark = [needs_compiler, pytest.mark.xdist_group("emulated_posterior")]

FULL, T2H, H2T = range(3)


def numbers(values: Tensor | None, dtype: torch.dtype = torch.float64) -> Buffer | None:
    return None if values is None else Buffer((len(values),), dtype).fill(values)


def draw(
    kernels: ctypes.CDLL, x: Buffer, bank: Buffer, signal: Tensor, sigma: Tensor, u: Tensor,
    prior: Tensor | None = None, gate: int = FULL, counts: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:  # fmt: skip
    """Where the gate refuses a draw: -1 - its row of x."""
    (B, D), N = x.view.shape, len(bank.view)
    sizes = (ctypes.c_int64 * 3)(B, N, D)
    strides = (ctypes.c_int64 * 2)(x.stride, bank.stride)
    small, counted = [numbers(v, torch.float32) for v in (signal, sigma, prior)], [numbers(v) for v in counts]
    uniform, own, drawn = Buffer((B,), torch.float64).fill(u), -1 - torch.arange(B), torch.full((B + 2,), 2**40)
    kernels.posterior_scratch.restype = ctypes.c_int64
    scratch = Buffer((kernels.posterior_scratch(sizes),), torch.float64)
    at = [ctypes.c_void_p(p) for p in (uniform.pointer, own.data_ptr(), drawn[1:].data_ptr(), scratch.pointer)]
    inputs = (sizes, pointers(x, bank), strides, pointers(*small), *at[:2], pointers(*counted))
    kernels.posterior_draw(DTYPES.index(x.whole.dtype), *inputs, gate, *at[2:])
    assert all(b.untouched_around() for b in (x, bank, uniform, scratch, *small, *counted) if b)
    assert drawn[0] == drawn[-1] == 2**40
    return drawn[1:-1]


def edges(x: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, prior: Tensor | None = None) -> Tensor:
    """[B, N] the posterior's distribution function, from the densities."""
    apart = (x.double()[:, None] - signal.double()[:, None, None] * bank.double()).square().sum(2)
    logits = -apart / (2 * sigma.double()[:, None].square())
    return (logits if prior is None else logits + prior.double()).softmax(1).cumsum(1)


def noised(bank: Tensor, B: int, dtype: torch.dtype, gap: int = 0) -> tuple[Buffer, Tensor, Tensor, Tensor]:
    """x [B, D] of rows of the bank, with signal, sigma from clean to noise alone, and u."""
    random = torch.Generator().manual_seed(5)
    angle = torch.linspace(0.02, math.pi / 2, B)[torch.randperm(B, generator=random)]
    signal, sigma = angle.cos(), angle.sin()
    signal[-1:] = 0
    x = rows((B, bank.shape[1]), dtype, 3, gap)
    x.view.copy_(signal[:, None] * bank[torch.randint(len(bank), (B,), generator=random)] + sigma[:, None] * x.view)
    return x, signal, sigma, torch.rand(B, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "N", "D"),
    [
        (5, 7, 9),
        (70, 131, 33),  # tiles cut on every side
        (3, 600, 5),  # several rounds in a stretch, the last stretches short or empty
        (40, 66, 300),  # the width in parts
        (270, 20, 6),  # more rows than are drawn at once
        (2, 1, 3),
        (2, 300, 0),
        (0, 4, 3),
    ],
)
def test_draw(kernels: ctypes.CDLL, dtype: torch.dtype, B: int, N: int, D: int) -> None:
    bank = rows((N, D), dtype, 1, gap=D % 5, shift=1)
    bank.view.mul_(min(0.5, 2 / math.sqrt(D + 1)))  # so near each other that every column counts
    x, signal, sigma, u = noised(bank.view, B, dtype, gap=D % 3)
    for prior in (None, torch.linspace(-2, 1, N)):
        cdf = edges(x.view, bank.view, signal, sigma, prior)
        assert torch.equal(draw(kernels, x, bank, signal, sigma, u, prior), torch.searchsorted(cdf, u[:, None])[:, 0])


def test_rows_that_little_noise_tells_apart(kernels: ctypes.CDLL) -> None:
    """Logits of 1e9 that differ by less than 10: float32 has no digit of it."""
    bank = Buffer((40, 50)).fill(300 + torch.randn(50, generator=torch.Generator().manual_seed(1)).expand(40, 50))
    bank.view[:, 7] += torch.arange(40) / 4096
    B = 64
    x = Buffer((B, 50)).fill(0.9 * bank.view[20].expand(B, 50))
    signal, sigma, u = torch.full((B,), 0.9), torch.full((B,), 2e-3), (torch.arange(B).double() + 0.5) / B
    want = torch.searchsorted(edges(x.view, bank.view, signal, sigma), u[:, None])[:, 0]
    assert len(want.unique()) > 20
    assert torch.equal(draw(kernels, x, bank, signal, sigma, u), want)


@pytest.mark.parametrize("N", [20, 700])
def test_no_row_of_probability_zero_is_drawn(kernels: ctypes.CDLL, N: int) -> None:
    """Whatever u; the ends of [0, 1) draw the first and the last of the others."""
    bank, possible = rows((N, 4), torch.float32, 1), torch.arange(N) % 3 == 1
    possible[-N // 3 :] = False
    prior = torch.where(possible, 0.0, -math.inf)
    B = 40
    x, signal, sigma, _ = noised(bank.view, B, torch.float32)
    sigma.add_(1)
    for end, want in [(0.0, possible.nonzero()[0]), (1 - 2.0**-53, possible.nonzero()[-1])]:
        assert (draw(kernels, x, bank, signal, sigma, torch.full((B,), end, dtype=torch.float64), prior) == want).all()
    edge = edges(x.view, bank.view, signal, sigma, prior)[torch.arange(B), torch.arange(B) % 13]
    for units in range(-3, 4):  # where a sum rounded otherwise steps over the edge
        u = (edge * (1 + units * 2.0**-53)).clamp_max(1 - 2.0**-53)
        assert possible[draw(kernels, x, bank, signal, sigma, u, prior)].all()


@pytest.mark.parametrize("N", [64, 1024])
def test_an_edge_belongs_to_the_next_row(kernels: ctypes.CDLL, N: int) -> None:
    bank, at = rows((N, 4), torch.float32, 1), torch.tensor([0, 1, 31, 32, 33, 63])
    at = torch.cat([at, N - 1 - at])
    x = rows((len(at), 4), torch.float32, 2)
    none, ones = torch.zeros(len(at)), torch.ones(len(at))  # no signal: all rows alike
    assert torch.equal(draw(kernels, x, bank, none, ones, at.double() / N), at)


def test_gates(kernels: ctypes.CDLL) -> None:
    bank = rows((30, 8), torch.float32, 1)
    x, signal, sigma, u = noised(bank.view, 50, torch.float32)
    counts = torch.arange(50).remainder(5).double() + 1, torch.arange(30).remainder(5).double() + 1
    free = draw(kernels, x, bank, signal, sigma, u)
    own = -1 - torch.arange(50)
    for gate, allowed in ((T2H, counts[1][free] >= counts[0]), (H2T, counts[1][free] <= counts[0])):
        assert allowed.any()
        assert not allowed.all()
        got = draw(kernels, x, bank, signal, sigma, u, gate=gate, counts=counts)
        assert torch.equal(got, torch.where(allowed, free, own))


def test_what_is_no_number_draws_the_last_row(kernels: ctypes.CDLL) -> None:
    bank = rows((9, 8), torch.float32, 1)
    x, signal, sigma, u = noised(bank.view, 6, torch.float32)
    want = draw(kernels, x, bank, signal, sigma, u)
    x.view[2, 5] = math.nan
    got, rest = draw(kernels, x, bank, signal, sigma, u), [0, 1, 3, 4, 5]
    assert got[2] == 8
    assert torch.equal(got[rest], want[rest])
    bank.view[4, 0] = math.nan
    assert (draw(kernels, x, bank, signal, sigma, u) == 8).all()
    bank = rows((700, 8), torch.float32, 1)
    bank.view[4, 0] = math.nan
    prior = torch.zeros(700)
    prior[-10:] = -math.inf
    assert (draw(kernels, x, bank, signal, sigma, u, prior) == 699).all()
