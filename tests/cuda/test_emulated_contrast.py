"""contrast in CUDA, emulated; see emulated.py."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, Buffer, close, needs_compiler, pointers, rows

pytestmark = [needs_compiler, pytest.mark.xdist_group("emulated_contrast")]

DISTANCE, HINGE, COSINE, SUPCON = range(4)
PLANS = pytest.mark.parametrize("split_k", [False, True], ids=["streaming", "split"])


class Call(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_int) for name in ("dtype", "loss", "include_self", "per_row", "split_k")],
        *[(name, ctypes.c_int64) for name in ("N", "M", "D", "x_stride", "y_stride")],
        *[(name, ctypes.c_void_p) for name in ("x", "y")],
        *[(name, ctypes.c_double) for name in ("scale", "margin")],
        ("labels", ctypes.c_void_p),
        ("labels_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
    )


def run(
    kernels: ctypes.CDLL, loss: int, x: Buffer, y: Buffer, split_k: bool, scale: float, *, margin: float = 0,
    include_self: bool = False, per_row: bool = True, weight: Tensor | None = None, labels: Tensor | None = None,
    grad: float = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, lse and the gradient of x."""
    (N, D), M, dtype = x.view.shape, len(y.view), x.whole.dtype
    w = None if weight is None else Buffer((N,)).fill(weight)
    call = Call(
        DTYPES.index(dtype), loss, include_self, per_row, split_k, N, M, D, x.stride, y.stride, x.pointer, y.pointer,
        scale, margin, None if labels is None else labels.data_ptr(), 0 if labels is None else labels.stride(0),
        w and w.pointer,
    )  # fmt: skip
    kernels.contrast_scratch.restype = ctypes.c_int64
    scratch, scratch_bwd = (Buffer((kernels.contrast_scratch(ctypes.byref(call), bwd),)) for bwd in (0, 1))
    lengths = loss in (COSINE, SUPCON)
    out, lse, saved = Buffer((1,)), Buffer((N,)), Buffer((N + lengths, N + M) if split_k else (0,))
    grad_x, upstream = Buffer((N, D), dtype), Buffer((1,)).fill(torch.tensor(grad))
    kernels.contrast_forward(ctypes.byref(call), pointers(out, lse, saved), ctypes.c_void_p(scratch.pointer))
    kernels.contrast_backward(
        ctypes.byref(call), pointers(upstream, lse, saved), ctypes.c_void_p(grad_x.pointer),
        ctypes.c_void_p(scratch_bwd.pointer),
    )  # fmt: skip
    for buffer in (x, y, out, lse, saved, grad_x, scratch, scratch_bwd, upstream, *([w] if w else [])):
        assert buffer.untouched_around()
    return out.view[0, 0], lse.view[0], grad_x.view


def energies(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return scale * (x[:, None] - torch.cat([x, y])[None]).square().sum(2)


def own(matrix: Tensor) -> Tensor:
    return torch.eye(*matrix.shape, dtype=torch.bool)


def weighted(terms: Tensor, weight: Tensor | None) -> Tensor:
    return terms if weight is None else weight * terms


def negative_distance(
    x: Tensor, y: Tensor, weight: Tensor | None, scale: float, include_self: bool, per_row: bool
) -> tuple[Tensor, Tensor]:
    minus = -energies(x, y, scale)
    lse = (minus if include_self else minus.masked_fill(own(minus), -math.inf)).logsumexp(1)
    N, c = len(x), minus.shape[1] - (not include_self)
    if not per_row:
        return lse.logsumexp(0) - math.log(N * c), lse
    return weighted(lse - math.log(c), weight).mean(), lse


@PLANS
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
    options: dict[str, Any] = {"include_self": include_self, "per_row": per_row, "weight": weight, "grad": 3.0}
    loss, lse, grad = run(kernels, DISTANCE, x, y, split_k, scale, **options)
    leaf = x.view.double().requires_grad_()
    want, want_lse = negative_distance(leaf, y.view.double(), weight, scale, include_self, per_row)
    close(loss, want.detach(), most=3e-6)
    close(lse, want_lse.detach(), most=3e-6)
    if D:
        (want_grad,) = torch.autograd.grad(3.0 * want, leaf)
        close(grad, want_grad, dtype, most=4e-6)


@PLANS
def test_negative_distance_golden_values_and_limits(kernels: ctypes.CDLL, split_k: bool) -> None:
    i, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5)
    x, none = Buffer((4, 5)).fill(torch.sin(i + 2 * d)), Buffer((0, 5))

    def distances(scale: float, include_self: bool, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
        return run(kernels, DISTANCE, x, none, split_k, scale, include_self=include_self, per_row=per_row)

    for scale, include_self, per_row, want in [
        (0.4, True, False, -0.8729599714688224),
        (0.4, False, False, -1.4978172438078718),
        (1.0, False, True, -3.0389838674846428),
    ]:
        loss, _, _ = distances(scale, include_self, per_row)
        assert loss.item() == pytest.approx(want, abs=1e-6)
    # Far apart, without the self term: exp(-E) underflows, its logarithm must not; nor may the diagonal overflow.
    for per_row in (False, True):
        loss, _, grad = distances(1e4, False, per_row)
        leaf = x.view.double().requires_grad_()
        want, _ = negative_distance(leaf, none.view.double(), None, 1e4, False, per_row)
        close(loss, want.detach())
        close(grad, torch.autograd.grad(want, leaf)[0], most=2e-2)  # E itself is 1e4, to seven digits
    # Equal rows have distance exactly 0; NaN in, NaN out.
    x.fill(torch.full((4, 5), 1 / 3))
    loss, _, grad = distances(1.0, True, False)
    assert abs(loss.item()) < 1e-6
    assert grad.abs().max() == 0
    x.view[2, 4] = math.nan
    loss, lse, grad = distances(1.0, True, False)
    assert loss.isnan()
    assert lse.isnan().all()
    assert grad.isnan().any(1).all()


SHAPES = [
    (70, 67, torch.float32),  # tiles cut on every side
    (9, 67, torch.bfloat16),
    (33, 40, torch.float16),
    (6, 1100, torch.float32),  # the width in parts
    (200, 9, torch.float32),  # tiles below the diagonal, several tiles in a part
    (2, 2, torch.float32),
]


@PLANS
@pytest.mark.parametrize(("N", "D", "dtype"), [*SHAPES, (3, 0, torch.float32)])
def test_distance_hinge(kernels: ctypes.CDLL, N: int, D: int, dtype: torch.dtype, split_k: bool) -> None:
    x, scale = rows((N, D), dtype, 1, gap=D % 3, shift=D % 2), 2.0 / max(D, 1)
    x.view.add_(10)
    # In 1100 dimensions every energy is nearly 4: what it lacks to 4 would have no digits.
    margin = 6.0 if D > 1000 else 4.0
    loss, _, grad = run(kernels, HINGE, x, Buffer((0, D)), split_k, scale, margin=margin, grad=3.0)
    leaf = x.view.double().requires_grad_()
    short = (margin - energies(leaf, leaf[:0].detach(), scale)).clamp_min(0)
    want = short.masked_fill(own(short), 0).square().sum() / (N * (N - 1))
    close(loss, want.detach(), most=3e-6)
    if D:
        close(grad, torch.autograd.grad(3.0 * want, leaf)[0], dtype, most=4e-6)


def logits(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """(cos - 1) / tau of unit rows, 0 where a row has no direction; -inf on the diagonal."""

    def unit(rows: Tensor) -> Tensor:
        norm = rows.norm(dim=1, keepdim=True)
        return torch.where(norm <= 1e-12, 0, rows / norm)

    cosines = unit(x) @ unit(torch.cat([x, y])).T
    return ((cosines - 1) / tau).masked_fill(own(cosines), -math.inf)


def cosine_contrastive(
    x: Tensor, y: Tensor, weight: Tensor | None, tau: float, include_self: bool
) -> tuple[Tensor, Tensor]:
    others = logits(x, y, tau).logsumexp(1)
    if include_self:
        lse = torch.logaddexp(others, torch.zeros_like(others))
        return weighted(lse, weight).mean(), lse
    return weighted(others + 1 / tau - math.log(len(x) + len(y) - 1), weight).mean(), others


def supcon(x: Tensor, labels: Tensor, weight: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    s = logits(x, x[:0], tau)
    positive = (labels[:, None] == labels) & ~own(s)
    lse, count = s.logsumexp(1), positive.sum(1)
    terms = lse - torch.where(positive, s, 0).sum(1) / count.clamp_min(1)
    return weighted(terms, weight)[count > 0].sum() / (count > 0).sum().clamp_min(1), lse


@PLANS
@pytest.mark.parametrize(
    ("N", "D", "dtype", "M", "include_self"),
    [(*shape, M, M % 4 == 1) for shape, M in zip(SHAPES, [9, 0, 201, 3, 0, 1], strict=True)]
    + [(1, 5000, torch.float32, 1, False)],  # norms in parts
)
def test_cosine_contrastive(
    kernels: ctypes.CDLL, N: int, D: int, dtype: torch.dtype, M: int, include_self: bool, split_k: bool
) -> None:
    x, y = rows((N, D), dtype, 1, gap=D % 3, shift=D % 2), rows((M, D), dtype, 2, gap=D % 5)
    x.view.mul_(30)
    y.view.mul_(0.1)
    weight = torch.rand(N, generator=torch.Generator().manual_seed(3)) if N % 2 else None
    tau = 0.3
    options: dict[str, Any] = {"include_self": include_self, "weight": weight, "grad": 3.0}
    loss, lse, grad = run(kernels, COSINE, x, y, split_k, 0.5 / tau, **options)
    leaf = x.view.double().requires_grad_()
    want, want_lse = cosine_contrastive(leaf, y.view.double(), weight, tau, include_self)
    # Without the self term the loss is lse less a constant of its size, and has the digits of the larger.
    size = 1.0 if include_self else max(1.0, (want_lse.abs().mean() / want.abs()).item())
    close(loss, want.detach(), most=3e-6 * size)
    close(lse, want_lse.detach(), most=3e-6)
    close(grad, torch.autograd.grad(3.0 * want, leaf)[0], dtype, most=4e-6)


@PLANS
@pytest.mark.parametrize(("N", "D", "dtype"), SHAPES)
def test_supcon(kernels: ctypes.CDLL, N: int, D: int, dtype: torch.dtype, split_k: bool) -> None:
    x, none, tau = rows((N, D), dtype, 1, gap=D % 3, shift=D % 2), Buffer((0, D)), 0.3
    generator = torch.Generator().manual_seed(3)
    # Every other number of a longer tensor; one row is alone with its label.
    labels = torch.randint(-3, 0, (2 * N,), generator=generator)[::2]
    labels[0] = labels[1] if N == 2 else 1 << 40
    weight = torch.rand(N, generator=generator) if N % 2 else None
    loss, lse, grad = run(kernels, SUPCON, x, none, split_k, 0.5 / tau, labels=labels, weight=weight, grad=3.0)
    leaf = x.view.double().requires_grad_()
    want, want_lse = supcon(leaf, labels, weight, tau)
    close(loss, want.detach(), most=3e-6)
    close(lse, want_lse.detach(), most=3e-6)
    close(grad, torch.autograd.grad(3.0 * want, leaf)[0], dtype, most=4e-6)


@PLANS
def test_cosines_golden_values_and_limits(kernels: ctypes.CDLL, split_k: bool) -> None:
    i, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5)
    x, none, labels = Buffer((4, 5)).fill(torch.sin(i + 2 * d)), Buffer((0, 5)), torch.tensor([0, 1, 0, 1])

    def cosines(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run(kernels, COSINE, x, none, split_k, 5.0, **options)

    loss, lse, _ = cosines(include_self=True)
    assert loss.item() == pytest.approx(0.01770066607182752, rel=3e-6)
    assert lse.tolist() == pytest.approx([0.004449534, 0.0147547724, 0.0308676842, 0.0207306738], rel=3e-6)
    loss, _, _ = run(kernels, SUPCON, x, none, split_k, 5.0, labels=labels)
    assert loss.item() == pytest.approx(9.89375507533001, rel=3e-6)
    # No two rows of one label: nothing to pull, nothing to learn.
    loss, _, grad = run(kernels, SUPCON, x, none, split_k, 5.0, labels=torch.arange(4))
    assert loss.item() == 0
    assert grad.abs().max() == 0
    # Opposite rows: the loss is a few e^(-2/tau), and keeps its digits.
    x.fill(torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * torch.arange(1.0, 6.0))
    x.view[2:] = torch.tensor([[2.0, -1, 0, 0, 0], [-2.0, 1, 0, 0, 0]])
    loss, _, _ = cosines(include_self=True)
    assert loss.item() == pytest.approx(
        cosine_contrastive(x.view.double(), none.view.double(), None, 0.1, True)[0].item(), rel=1e-5
    )
    # A row without a direction has cosine 0 with all and no gradient; a row of NaN spoils all of them.
    x.fill(torch.sin(i + 2 * d))
    x.view[1] = 0
    x.view[3] = 1e-14
    for include_self in (False, True):
        loss, lse, grad = cosines(include_self=include_self)
        leaf = x.view.double().requires_grad_()
        want, want_lse = cosine_contrastive(leaf, none.view.double(), None, 0.1, include_self)
        (want_grad,) = torch.autograd.grad(want, leaf)
        close(loss, want.detach())
        close(lse, want_lse.detach())
        close(grad[::2], want_grad[::2], most=4e-6)
        assert grad[1::2].abs().max() == 0
    x.view[2, 4] = math.nan
    loss, lse, grad = cosines(include_self=True)
    assert loss.isnan()
    assert lse.isnan().all()
    assert grad[[0, 2]].isnan().all(1).all()


@PLANS
@pytest.mark.parametrize("loss", [COSINE, SUPCON])
@pytest.mark.parametrize("length", [1e-30, 1e25, 1e30])
def test_squares_that_float32_does_not_hold(kernels: ctypes.CDLL, loss: int, length: float, split_k: bool) -> None:
    x, none, labels, tau = rows((6, 1100), torch.float32, 1), Buffer((0, 1100)), torch.tensor([0, 0, 1, 1, 0, 1]), 0.3
    x.view[1], x.view[3] = 2 * x.view[0], -x.view[2]  # one direction, opposite ones
    x.view[4] *= length / x.view[4].norm()
    got, lse, grad = run(kernels, loss, x, none, split_k, 0.5 / tau, labels=labels if loss == SUPCON else None)
    leaf = x.view.double().requires_grad_()
    cosines = (leaf, none.view.double(), None, tau, False)
    want, want_lse = supcon(leaf, labels, None, tau) if loss == SUPCON else cosine_contrastive(*cosines)
    close(got, want.detach(), most=6e-6)
    close(lse, want_lse.detach(), most=3e-6)
    size = leaf.detach().norm(dim=1, keepdim=True)
    close((grad * size).float(), torch.autograd.grad(want, leaf)[0] * size, most=4e-6)


@PLANS
@pytest.mark.parametrize("loss", [DISTANCE, COSINE, SUPCON])
def test_same_bits_every_time(kernels: ctypes.CDLL, split_k: bool, loss: int) -> None:
    """Whatever the threads' order, which is the machine's choice."""
    x, y = rows((66, 530), torch.float32, 1), rows((0 if loss == SUPCON else 4, 530), torch.float32, 2)
    labels = torch.arange(66) % 5 if loss == SUPCON else None
    first, second = (run(kernels, loss, x, y, split_k, 1e-3, labels=labels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
