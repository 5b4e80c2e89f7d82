"""contrast in CUDA, emulated; see emulated.py."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, Buffer, close, needs_compiler, pointers, rows

pytestmark = needs_compiler


def negative_distance(
    x: Tensor, y: Tensor, weight: Tensor | None, scale: float, include_self: bool, per_row: bool
) -> tuple[Tensor, Tensor]:
    N, columns = len(x), torch.cat([x, y.detach()])
    energy = scale * (x[:, None] - columns[None]).square().sum(2)
    minus = -energy if include_self else (-energy).masked_fill(torch.eye(N, len(columns), dtype=torch.bool), -math.inf)
    lse, c = minus.logsumexp(1), len(columns) - (not include_self)
    if not per_row:
        return lse.logsumexp(0) - math.log(N * c), lse
    return ((lse - math.log(c)) * (1 if weight is None else weight)).mean(), lse


def run_negative_distance(
    kernels: ctypes.CDLL, x: Buffer, y: Buffer, weight: Tensor | None, scale: float, include_self: bool, per_row: bool,
    split_k: bool, grad: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (N, D), M = x.view.shape, y.view.shape[0]
    code, dtype = DTYPES.index(x.whole.dtype), x.whole.dtype
    sizes = (ctypes.c_int64 * 2)()
    N_, M_, D_ = (ctypes.c_int64(n) for n in (N, M, D))
    kernels.contrast_scratch(N_, M_, D_, int(split_k), sizes)
    loss, lse, saved = Buffer((1,)), Buffer((N,)), Buffer((N, N + M) if split_k else (0,))
    grad_x = Buffer((N, D), dtype)
    scratch, scratch_bwd, upstream = Buffer((sizes[0],)), Buffer((sizes[1],)), Buffer((1,)).fill(torch.tensor(grad))
    w = None if weight is None else Buffer((N,)).fill(weight)
    common = (
        code, N_, M_, D_,
        ctypes.c_void_p(x.pointer), ctypes.c_int64(x.stride), ctypes.c_void_p(y.pointer), ctypes.c_int64(y.stride),
        ctypes.c_double(scale), int(include_self), int(per_row), int(split_k), ctypes.c_void_p(w and w.pointer),
    )  # fmt: skip
    kernels.contrast_forward(*common, pointers(loss, lse, saved), ctypes.c_void_p(scratch.pointer))
    kernels.contrast_backward(
        *common, pointers(upstream, lse, saved), ctypes.c_void_p(grad_x.pointer), ctypes.c_void_p(scratch_bwd.pointer)
    )
    for buffer in (x, y, loss, lse, saved, grad_x, scratch, scratch_bwd, upstream):
        assert buffer.untouched_around()
    return loss.view[0, 0], lse.view[0], grad_x.view


@pytest.mark.parametrize("split_k", [False, True], ids=["streaming", "split"])
@pytest.mark.parametrize(
    ("N", "M", "D", "dtype", "include_self", "per_row", "weighted"),
    [
        (5, 0, 9, torch.float32, True, False, False),
        (70, 9, 67, torch.float32, False, True, True),  # tiles cut on every side
        (70, 9, 67, torch.bfloat16, True, True, False),
        (33, 200, 40, torch.float16, False, False, False),
        (6, 3, 1100, torch.float32, False, False, False),  # the width in parts
        (130, 0, 35, torch.float32, True, False, False),  # tiles below the diagonal
        (1, 2, 3, torch.float32, False, True, True),
        (2, 0, 0, torch.float32, True, False, False),
        (3, 260, 5, torch.float32, False, True, True),  # several tiles in a part
    ],
)
def test_negative_distance(
    kernels: ctypes.CDLL, N: int, M: int, D: int, dtype: torch.dtype, include_self: bool, per_row: bool, weighted: bool,
    split_k: bool,
) -> None:  # fmt: skip
    x, y = rows((N, D), dtype, 1, gap=D % 3, shift=D % 2), rows((M, D), dtype, 2, gap=D % 5)
    x.view.add_(10)  # a common offset: what cancels in a Gram form
    y.view.add_(10)
    weight = torch.rand(N, generator=torch.Generator().manual_seed(3)) if weighted else None
    scale = 2.0 / max(D, 1)
    loss, lse, grad = run_negative_distance(kernels, x, y, weight, scale, include_self, per_row, split_k, grad=3.0)
    leaf = x.view.double().requires_grad_()
    want, want_lse = negative_distance(leaf, y.view.double(), weight, scale, include_self, per_row)
    close(loss, want.detach(), most=3e-6)
    close(lse, want_lse.detach(), most=3e-6)
    if D:
        (want_grad,) = torch.autograd.grad(3.0 * want, leaf)
        close(grad, want_grad, dtype, most=4e-6)


@pytest.mark.parametrize("split_k", [False, True], ids=["streaming", "split"])
def test_negative_distance_golden_values_and_limits(kernels: ctypes.CDLL, split_k: bool) -> None:
    i, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5)
    x, none = Buffer((4, 5)).fill(torch.sin(i + 2 * d)), Buffer((0, 5))
    for scale, include_self, per_row, want in [
        (0.4, True, False, -0.8729599714688224),
        (0.4, False, False, -1.4978172438078718),
        (1.0, False, True, -3.0389838674846428),
    ]:
        loss, _, _ = run_negative_distance(kernels, x, none, None, scale, include_self, per_row, split_k)
        assert loss.item() == pytest.approx(want, abs=1e-6)
    # Far apart, without the self term: exp(-E) underflows, its logarithm must not; nor may the diagonal overflow.
    for per_row in (False, True):
        loss, _, grad = run_negative_distance(kernels, x, none, None, 1e4, False, per_row, split_k)
        leaf = x.view.double().requires_grad_()
        want, _ = negative_distance(leaf, none.view.double(), None, 1e4, False, per_row)
        close(loss, want.detach())
        close(grad, torch.autograd.grad(want, leaf)[0], most=2e-2)  # E itself is 1e4, to seven digits
    # Equal rows have distance exactly 0; NaN in, NaN out.
    x.fill(torch.full((4, 5), 1 / 3))
    loss, _, grad = run_negative_distance(kernels, x, none, None, 1.0, True, False, split_k)
    assert abs(loss.item()) < 1e-6
    assert grad.abs().max() == 0
    x.view[2, 4] = math.nan
    loss, lse, grad = run_negative_distance(kernels, x, none, None, 1.0, True, False, split_k)
    assert loss.isnan()
    assert lse.isnan().all()
    assert grad.isnan().any(1).all()


def test_same_bits_every_time(kernels: ctypes.CDLL) -> None:
    """Whatever the threads' order, which is the machine's choice."""
    x, y = rows((66, 530), torch.float32, 1), rows((4, 530), torch.float32, 2)
    for split_k in (False, True):
        first, *rest = (run_negative_distance(kernels, x, y, None, 1e-3, True, True, split_k) for _ in range(2))
        assert all(torch.equal(a, b) for other in rest for a, b in zip(first, other, strict=True))
