"""product in CUDA, emulated; see emulated.py."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, Buffer, close, needs_compiler, pointers, rows

pytestmark = [needs_compiler, pytest.mark.xdist_group("emulated_product")]


def run(
    kernels: ctypes.CDLL, means: list[Buffer], logvars: list[Buffer], B: int, D: int, exponents: Tensor,
    upstream: tuple[Tensor, Tensor, Tensor], needs: list[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """Outputs, and the gradients of means and log-variances; a log-variance [B, 1] of float32 is one number a row."""
    K, dtype, factors = len(means), means[0].whole.dtype, [*means, *logvars]
    shared = [k >= K and b.view.shape[1] == 1 for k, b in enumerate(factors)]
    strides = [-1 if s else b.stride if len(b.view) == B else 0 for s, b in zip(shared, factors, strict=True)]
    sizes = (DTYPES.index(dtype), ctypes.c_int64(B), ctypes.c_int64(D), K)
    a = Buffer(exponents.shape).fill(exponents)
    common = (*sizes, pointers(*factors), (ctypes.c_int64 * (2 * K))(*strides), ctypes.c_void_p(a.pointer))
    kernels.product_scratch.restype = ctypes.c_int64
    scratch = [Buffer((kernels.product_scratch(sizes[1], sizes[2], ctypes.c_int64(n)),)) for n in (1, K)]
    outputs = [Buffer((B, D), dtype), Buffer((B, D)), Buffer((B,))]
    kernels.product_forward(*common, pointers(*outputs), ctypes.c_void_p(scratch[0].pointer))
    grads = [
        Buffer((B, 1 if s else D), torch.float32 if s else dtype) if need else None
        for s, need in zip(shared, needs, strict=True)
    ]
    small = [Buffer(g.shape, o.whole.dtype).fill(g) for g, o in zip(upstream, outputs, strict=True)]
    kernels.product_backward(*common, pointers(*small), pointers(*grads), ctypes.c_void_p(scratch[1].pointer))
    assert all(b.untouched_around() for b in [*factors, a, *outputs, *scratch, *grads, *small] if b)
    return [b.view for b in outputs], [b.view if b else None for b in grads]


def product(means: list[Tensor], logvars: list[Tensor], a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the definition, in precisions."""
    m = torch.stack(means)
    l = torch.stack([x.expand_as(m[0]) for x in logvars])
    lam = a[:, :, None] * (-l).exp()
    total = lam.sum(0)
    mean = (lam * m).sum(0) / total
    terms = (a[:, :, None] * l).sum(0) + total.log() + (lam * (m - mean).square()).sum(0)
    log_z = -(((a.sum(0) - 1) * math.log(2 * math.pi))[:, None] + terms).sum(1) / 2
    return mean, total.log(), log_z


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("K", "B", "D", "gap", "shift"),
    [
        (1, 3, 40, 0, 0),
        (2, 5, 1029, 0, 0),
        (2, 3, 129, 7, 1),  # odd rows, none of them aligned
        (3, 2, 9001, 0, 0),  # in parts
        (4, 2, 8200, 8, 3),
        (4, 4, 1, 0, 0),
        (2, 0, 5, 0, 0),
        (2, 2, 0, 0, 0),
    ],
)
def test_product(kernels: ctypes.CDLL, dtype: torch.dtype, K: int, B: int, D: int, gap: int, shift: int) -> None:
    # Each tensor has its own distance between rows; the last mean is a single row, expanded; every other log-variance
    # is one number a row.
    means = [rows((B, D), dtype, k, gap * k, shift * k) for k in range(K)]
    if K > 2 and D > 1:
        means[-1] = rows((1, D), dtype, 9)
    logvars = [
        rows((B, D), dtype, 20 + k, gap, shift * k) if k % 2 == 0 and D > 1 else rows((B, 1), torch.float32, 20 + k)
        for k in range(K)
    ]
    generator = torch.Generator().manual_seed(5)
    a = torch.rand(K, B, generator=generator) + 0.1
    upstream = tuple(
        torch.randn(s, generator=generator).to(t) for s, t in (((B, D), dtype), ((B, D), None), ((B,), None))
    )
    needs = [k != 1 for k in range(K)] + [k != 2 for k in range(K)]
    (mean, log_precision, log_z), grads = run(kernels, means, logvars, B, D, a, upstream, needs)

    leaves = [b.view.double().expand(B, -1).clone().requires_grad_() for b in [*means, *logvars]]
    want = product(leaves[:K], leaves[K:], a.double())
    close(mean, want[0].detach(), dtype)
    close(log_precision, want[1].detach())
    close(log_z.flatten(), want[2].detach())
    found = torch.autograd.grad(sum((w * g.double()).sum() for w, g in zip(want, upstream, strict=True)), leaves)
    for got, exact, need in zip(grads, found, needs, strict=True):
        assert (got is not None) == need
        if got is not None:
            close(got, exact, got.dtype, most=4e-6)


def test_golden_values_and_limits(kernels: ctypes.CDLL) -> None:
    i, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5)
    means = [Buffer((1, 5)).fill(row) for row in torch.sin(i + 2 * d)]
    logvars = [Buffer((1, 5)).fill(row) for row in 0.5 * torch.cos(2 * i - d)]
    one, none = torch.ones(4, 1), (torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1))

    def outputs(a: Tensor = one) -> list[Tensor]:
        return run(kernels, means, logvars, 1, 5, a, none, [False] * 8)[0]

    mean, log_precision, log_z = outputs()
    assert mean[0].tolist() == pytest.approx(
        [0.6203845479, -0.3152349393, -0.2124402217, 0.3066646573, 0.0713660129], abs=2e-7
    )
    assert log_precision.exp()[0].tolist() == pytest.approx(
        [3.8431193205, 4.0347881328, 4.4556921782, 4.8075124008, 4.4556921782], rel=1e-6
    )
    assert log_z.item() == pytest.approx(-21.420515696902044, rel=1e-6)
    # Exponent 0 leaves a factor out; one factor alone comes back as it is, with ln Z = 0.
    mean, log_precision, log_z = outputs(torch.tensor([[0.0], [1.0], [0.0], [0.0]]))
    close(mean, means[1].view.double())
    close(log_precision, -logvars[1].view.double())
    assert abs(log_z.item()) < 1e-6
    # Variances of e^200 and e^-200: precisions that float32 does not hold. A common offset costs no digit.
    for k in range(4):
        means[k].view.add_(1000)
        logvars[k].view.add_(200 * (-1) ** k)
    (mean, log_precision, _), (grad, *_) = run(
        kernels, means, logvars, 1, 5, one, (torch.ones(1, 5), torch.zeros(1, 5), torch.zeros(1)), [True] + [False] * 7
    )
    want = product([b.view.double() for b in means], [b.view.double() for b in logvars], one.double())
    close(mean - 1000, want[0] - 1000, most=1e-4)  # 1000 itself has four digits behind the point
    close(log_precision, want[1])
    assert grad.abs().max() == 0
    # NaN in one row reaches that row's outputs and gradients, and no other's.
    x = [rows((2, 20), torch.float32, n) for n in range(4)]
    x[1].view[1, 3] = math.nan
    upstream = (torch.ones(2, 20), torch.ones(2, 20), torch.ones(2))
    (mean, log_precision, log_z), grads = run(kernels, x[:2], x[2:], 2, 20, torch.ones(2, 2), upstream, [True] * 4)
    assert mean.isnan().sum(1).tolist() == [0, 1]
    assert log_precision.isfinite().all()
    assert log_z.isnan().flatten().tolist() == [False, True]
    assert all(g is not None and g.isnan().sum(1).tolist() == [0, 1] for g in grads)


def test_quadratic_term_that_overflows_does_not_show_without_its_gradient(kernels: ctypes.CDLL) -> None:
    means = [Buffer((1, 3)).fill(torch.full((1, 3), value)) for value in (0.0, 1e15)]
    logvars = [Buffer((1, 1)).fill(torch.tensor([[-40.0]])) for _ in range(2)]
    upstream = (torch.ones(1, 3), torch.ones(1, 3), torch.zeros(1))
    _, grads = run(kernels, means, logvars, 1, 3, torch.ones(2, 1), upstream, [True] * 4)
    assert all(g is not None and g.isfinite().all() for g in grads)
    close(grads[0], torch.full((1, 3), 0.5, dtype=torch.float64))
