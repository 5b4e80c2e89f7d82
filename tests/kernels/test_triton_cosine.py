"""The streaming plans of cosine_contrastive and supcon in Triton, interpreted, against float64 code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the triton back end needs triton")
from imbdiff.kernels import contrast

NONE = torch.empty(0)
EPS = torch.finfo(torch.float32).eps
LOW = [torch.float32, torch.bfloat16, torch.float16]
# Rows, negatives, width: a row alone with negatives, two rows, more than a tile of either, odd widths, several steps.
SIZES = [(1, 3, 4), (2, 0, 5), (17, 9, 129), (66, 65, 20), (5, 3, 300), (33, 1, 1)]


def logits(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """(cos - 1) / tau of different rows; a row that is next to nothing has cosine 0."""
    lengths = [v.square().sum(1).sqrt() for v in (x, y)]
    units = [torch.where(l[:, None] <= 1e-12, 0 * v, v / l[:, None]) for v, l in zip((x, y), lengths, strict=True)]
    return ((units[0] @ units[1].T - 1) / tau).masked_fill(torch.eye(len(x), len(y), dtype=torch.bool), -math.inf)


def cosine(x: Tensor, negatives: Tensor, weight: Tensor, tau: float, include_self: bool) -> Tensor:
    s = logits(x, torch.cat([x, negatives]), tau)
    row = s.exp().sum(1).log1p() if include_self else s.logsumexp(1) + 1 / tau - math.log(s.shape[1] - 1)
    return ((weight if len(weight) else 1) * row).mean()


def supcon(x: Tensor, labels: Tensor, weight: Tensor, tau: float) -> Tensor:
    s, terms = logits(x, x, tau), []
    for i, label in enumerate(labels):
        near = [s[i, j] for j in range(len(x)) if j != i and labels[j] == label]
        if near:
            terms.append((weight[i] if len(weight) else 1) * (s[i].logsumexp(0) - torch.stack(near).mean()))
    return torch.stack(terms).mean()


def kernel(op: str, grad: float, x: Tensor, other: Tensor, weight: Tensor, *form: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    loss, lse, saved = getattr(contrast, op)(x, other, weight, *form)
    got = getattr(contrast, f"{op}_bwd")(torch.tensor(grad), x, other, weight, lse, saved, *form)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    assert loss.dtype == lse.dtype == torch.float32
    assert (lse.shape, saved.shape) == (x.shape[:1], (0,))
    return loss, got


def exactly(op: str, grad: float, dtype: torch.dtype, x: Tensor, other: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    x = x.to(dtype, copy=True).requires_grad_()
    loss = {"cosine_contrastive": cosine, "supcon": supcon}[op](
        x, other.to(dtype) if other.is_floating_point() else other, rest[0].to(dtype), *rest[1:]
    )
    return loss.detach(), torch.autograd.grad(loss, x, torch.tensor(grad, dtype=dtype))[0]


def compare(close: Any, op: str, x: Tensor, *rest: Any, grad: float = 0.7) -> None:
    loss, got = kernel(op, grad, x, *rest)
    exact, plain = (exactly(op, grad, dtype, x, *rest) for dtype in (torch.float64, torch.float32))
    slack = EPS * (2 / rest[2] + math.log(len(x) + 8))
    heaviest = max(1.0, rest[1].abs().max().item() if len(rest[1]) else 1.0)
    close(loss, exact[0], plain[0], slack=slack * heaviest)
    # Of a pull of this size only what is at right angles to the row remains: nothing at all where D = 1.
    pull = 2 * grad * heaviest / (max(len(x) - 1, 1) * rest[2] * x.double().norm(dim=1).min().item())
    close(got, exact[1], plain[1].to(x.dtype), factor=3, slack=slack * exact[1].abs().max().item() + EPS * pull)


def drawn(n: int, D: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 0.3).to(dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("include_self", [False, True])
def test_cosine_contrastive(include_self, dtype, guard, bands, close):
    for N, M, D in SIZES if dtype == torch.float32 else SIZES[2:5:2]:
        x, negatives = (guard(drawn(n, D, dtype, N + M + D + gap), gap) for n, gap in ((N, 3), (M, 1)))
        weight = guard(drawn(N, 1, torch.float32, N)[:, 0].abs()) if N % 2 else NONE
        compare(close, "cosine_contrastive", x, negatives, weight, 0.2, include_self)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_supcon(dtype, guard, bands, close):
    for N, D in [(2, 5), (17, 129), (66, 20), (5, 300), (33, 1)][:: 1 if dtype == torch.float32 else 2]:
        labels = guard(torch.arange(N) * torch.arange(N) % 7 // 2 + 2**40)  # a label of its own, and equal in 32 bits
        labels[-1] = labels[0] if N == 2 else 2**40 + 2**33
        weight = guard(drawn(N, 1, torch.float32, 0)[:, 0].abs()) if N % 2 else NONE
        compare(close, "supcon", guard(drawn(N, D, dtype, N), 3), labels, weight, 0.2)


def test_golden_values():
    mu = torch.tensor([[math.sin(i + 2 * d) for d in range(5)] for i in range(4)])
    assert abs(kernel("cosine_contrastive", 1.0, mu, mu[:0], NONE, 0.1, True)[0].item() - 0.01770066607182752) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_far_below_the_self_term_keeps_its_digits(dtype):
    x = drawn(20, 400, torch.float32, 1).to(dtype) - 0.3
    rest = (x[:0], drawn(20, 1, torch.float32, 0)[:, 0].abs(), 0.04, True)
    loss, got = kernel("cosine_contrastive", 1e9, x, *rest)
    exact = exactly("cosine_contrastive", 1e9, torch.float64, x, *rest)
    assert 0 < exact[0] < 1e-7
    assert abs(loss - exact[0]) < 1e-4 * exact[0]
    assert (got - exact[1]).abs().max() < (1e-4 if dtype == torch.float32 else 4e-3) * exact[1].abs().max()


@pytest.mark.parametrize("op", ["cosine_contrastive", "supcon"])
def test_rows_of_any_length(op, close):
    x = drawn(24, 40, torch.float64, 2)
    other = (drawn(3, 40, torch.float32, 3), NONE, 0.2, True) if op == "cosine_contrastive" else (LABELS, NONE, 0.2)
    for low, high, dtype, eps in [(-8, 25, torch.float32, 1e-5), (-3, 3, torch.float16, 3e-3)]:
        rows = (x * torch.logspace(low, high, 24, dtype=torch.float64)[:, None]).to(dtype)
        rest = (other[0].to(dtype) if op == "cosine_contrastive" else other[0], *other[1:])
        length = rows.double().norm(dim=1, keepdim=True)
        # An upstream gradient at which those of the longest rows are not subnormal yet.
        loss, got = kernel(op, 10.0 ** (high - 2), rows, *rest)
        exact = exactly(op, 10.0 ** (high - 2), torch.float64, rows, *rest)
        assert abs(loss - exact[0]) < eps
        fits = got.isfinite() & (got != 0) & (got.abs() > 10 * torch.finfo(dtype).tiny)
        assert fits.double().mean() > 0.5
        error = ((got - exact[1]) * length)[fits].abs().max()
        assert error < eps * (exact[1] * length).abs().max()


LABELS = torch.tensor([0, 1, 2, 1, 0, 3, 3, 1]).repeat(3)


@pytest.mark.parametrize("op", ["cosine_contrastive", "supcon"])
def test_rows_without_a_direction(op, close):
    x = drawn(24, 7, torch.float32, 4)
    x[2], x[5], x[6] = 0, 0.9e-12 * x[5] / x[5].norm(), 1.1e-12 * x[6] / x[6].norm()
    negatives = drawn(3, 7, torch.float32, 5)
    negatives[1] = 0
    rest = (negatives, NONE, 0.2, False) if op == "cosine_contrastive" else (LABELS, NONE, 0.2)
    loss, got = kernel(op, 1.0, x, *rest)
    exact, gradient = exactly(op, 1.0, torch.float64, x, *rest)
    assert abs(loss - exact) < 1e-5
    assert (got[[2, 5]] == 0).all()
    assert (got[6] - gradient[6]).abs().max() < 1e-5 * gradient[6].abs().max()
    rest_of = [i for i in range(24) if i not in (2, 5, 6)]
    close(got[rest_of], gradient[rest_of], gradient[rest_of].float(), slack=1e-6)


def test_rows_that_coincide(close):
    x = drawn(6, 8, torch.float32, 6).repeat(2, 1)
    compare(close, "cosine_contrastive", x, x[:2], NONE, 0.1, True)
    compare(close, "supcon", x, LABELS[:12], NONE, 0.1)


def test_rows_more_than_2_to_the_31_elements_apart(close):
    stride = 2**30 + 16  # the memory between the rows is never touched
    x = (
        torch.empty(2 * stride + 8, dtype=torch.bfloat16)
        .as_strided((3, 5), (stride, 1))
        .copy_(drawn(3, 5, torch.bfloat16, 9))
    )
    compare(close, "cosine_contrastive", x, x[:2], NONE, 0.3, False)
    compare(close, "supcon", x, torch.tensor([0, 1, 0]), NONE, 0.3)


def test_expanded_rows(close):
    x = drawn(5, 8, torch.float32, 8)
    compare(close, "cosine_contrastive", x, x[:1].expand(3, 8), NONE, 0.3, True)
    compare(close, "supcon", x[:1].expand(5, 8), LABELS[:5], NONE, 0.3)


def test_weights_of_any_size_in_float16(close):
    x = drawn(20, 16, torch.float16, 7)
    for size in (1e-6, 1e6):
        weight = size * torch.randn(20, generator=torch.Generator().manual_seed(0))
        compare(close, "cosine_contrastive", x, x[:0], weight, 0.2, False, grad=1 / size)
        compare(close, "supcon", x, LABELS[:20], weight, 0.2, grad=1 / size)
    for op, other in [
        ("cosine_contrastive", (x[:0], torch.zeros(20), 0.2, True)),
        ("supcon", (LABELS[:20], torch.zeros(20), 0.2)),
    ]:
        loss, grad = kernel(op, 1.0, x, *other)
        assert loss == 0
        assert (grad == 0).all()


@pytest.mark.parametrize("include_self", [False, True])
def test_nan_in_nan_out(include_self):
    for spoil in range(2):
        x, negatives = torch.randn(3, 4), torch.randn(2, 4)
        (x, negatives)[spoil][1, 2] = torch.nan
        loss, grad = kernel("cosine_contrastive", 1.0, x, negatives, NONE, 0.2, include_self)
        assert loss.isnan()
        assert grad.isnan().all()
    loss, grad = kernel("supcon", 1.0, torch.tensor([[1.0, 2], [torch.nan, 1], [0, 3]]), LABELS[:3] % 2, NONE, 0.2)
    assert loss.isnan()
    assert grad.isnan().all()


def test_nothing_to_compare():
    for N, M, D in [(0, 0, 3), (0, 4, 3), (1, 0, 3), (0, 0, 0)]:
        for include_self in (False, True):
            x = torch.randn(N, D)
            loss, grad = kernel("cosine_contrastive", 1.0, x, torch.randn(M, D), NONE, 0.2, include_self)
            assert loss == 0
            assert torch.equal(grad, torch.zeros(N, D))
    for N in (0, 1, 3):  # in the last no label comes twice
        loss, grad = kernel("supcon", 1.0, torch.randn(N, 4), torch.arange(N), torch.full((N,), torch.nan), 0.2)
        assert loss == 0
        assert torch.equal(grad, torch.zeros(N, 4))
    loss, _ = kernel("cosine_contrastive", 1.0, torch.empty(3, 0), torch.empty(2, 0), NONE, 0.5, False)
    assert loss.abs() < 1e-6
