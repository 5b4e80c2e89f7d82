"""Divergences of Gaussians and the loss on them in Triton, interpreted, against float64 code from the contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the triton back end needs triton")
from imbdiff.kernels import gaussian

KINDS = range(3)  # kl, jeffreys, bhattacharyya
NEEDS = [True] * 4
NONE = torch.empty(0)


@pytest.fixture(autouse=True)
def small_sizes_go_every_way(monkeypatch):
    monkeypatch.setattr(gaussian, "MANY", 0)
    monkeypatch.setattr(gaussian, "PASSED", 32)


def divergences(m: Tensor, l: Tensor, n: Tensor, k: Tensor, kind: int) -> Tensor:
    """[..., N, M] of rows [..., N, D] and [..., M, D]; the log-variances may be [..., 1]."""
    d, l, k = m[..., :, None, :] - n[..., None, :, :], l[..., :, None, :], k[..., None, :, :]
    x = l - k
    if kind == 2:
        spread, shift = (x / 2).cosh().log(), d.square() / (2 * (l.exp() + k.exp()))
    else:
        spread, shift = x.exp() - 1 - x, d.square() * (-k).exp()
        if kind == 1:
            spread, shift = spread + (-x).exp() - 1 + x, shift + d.square() * (-l).exp()
    return (spread + shift).sum(-1) / 2


def problem(L: int, N: int, M: int, D: int, dtype: torch.dtype, shared: tuple[bool, bool]) -> list[Tensor]:
    """[L, N, D] and [L, M, D]; one log-variance for a row is float32."""
    g = torch.Generator().manual_seed(L + 10 * N + 100 * M + D)
    p, q = ([torch.randn(L, rows, D, generator=g).to(dtype) for _ in range(2)] for rows in (N, M))
    for side, one in ((p, shared[0]), (q, shared[1])):
        if one:
            side[1] = side[1][..., :1].float()
    return [*p, *q]


def compare_matrix(close: Any, four: list[Tensor], kind: int) -> None:
    g = torch.Generator().manual_seed(1)
    got, sizes = gaussian.gaussian_divergence(*four, kind)
    grad = torch.randn(got.shape, generator=g)
    of_four = gaussian.gaussian_divergence_bwd(grad, *four, kind, got, sizes, NEEDS)
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in four]
        value = divergences(*leaves, kind)
        found.append([value.detach(), *torch.autograd.grad(value, leaves, grad.to(dtype))])
    assert got.dtype == torch.float32
    for x, exact, plain in zip((got, *of_four), *found, strict=True):
        assert x.is_contiguous()
        close(x, exact, plain.to(x.dtype), factor=2 if x is got else 3)
    assert [x.dtype for x in of_four] == [x.dtype for x in four]


# Sizes, one log-variance for a row of p, of q: single ones, odd ones, more than a tile of rows, columns and dimensions.
SIZES = [
    ((2, 3, 5, 7), (False, False)), ((1, 17, 18, 19), (False, True)), ((2, 1, 33, 1), (True, False)),
    ((1, 4, 3, 40), (True, True)),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matrix_and_gradients(kind, dtype, guard, bands, close):
    for size, shared in SIZES if dtype == torch.float32 else SIZES[:1]:
        four = problem(*size, dtype, shared)
        # Each row of every batch between bands; batches are not dense.
        inside = [guard(x.flatten(0, 1), 2 if x.shape[2] > 1 else 0).unflatten(0, x.shape[:2]) for x in four]
        compare_matrix(close, inside, kind)


def near(logvar: float, offset: float, D: int = 200) -> list[Tensor]:
    """Each row of p lies next to one of q, and far from the others."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(9, D, generator=g) + offset / D**0.5
    p = q[:7] + 0.05 * math.exp(logvar / 2) * torch.randn(7, D, generator=g)
    return [p, logvar + 0.02 * torch.randn(7, D, generator=g), q, logvar + 0.02 * torch.randn(9, D, generator=g)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("logvar", "offset"), [(math.log(1e-4), 0), (0, 100), (-30, 0), (30, 0)])
def test_close_pairs_keep_their_digits(kind, logvar, offset):
    four = near(logvar, offset)
    exact = divergences(*[x.double() for x in four], kind)
    got = gaussian.gaussian_divergence(*[x[None] for x in four], kind)[0][0]
    close = exact < 20
    assert close.sum() >= 7
    assert ((got.double() - exact).abs() <= 1e-6 * (1e-3 + exact))[close].all()
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_products_know_what_they_say(kind, monkeypatch):
    """Pairs at all distances: what is known is right, the distant ones are, and both ways to the slopes agree."""
    g = torch.Generator().manual_seed(0)
    apart = torch.logspace(-4, 0.5, 24)[:, None]
    q = [torch.randn(24, 130, generator=g), 0.3 * torch.randn(24, 130, generator=g)]
    four = [x[None] for x in (*(x + apart * torch.randn(24, 130, generator=g) for x in q), *q)]
    exact = divergences(*[x.double() for x in four], kind)
    product = gaussian.by_products(tuple(four[:2]), tuple(four[2:]), kind)
    value = product.matrix()
    known = value.isfinite()
    assert ((value - exact).abs() <= 1e-4 * (1 + exact))[known].all()
    assert not known[0].diagonal()[:5].any()
    assert known[exact > 150].all()
    found = []
    for many in (0, 2**40):
        monkeypatch.setattr(gaussian, "MANY", many)
        found.append(gaussian.gaussian_divergence_bwd(torch.ones(1, 24, 24), *four, kind, exact.float(), NONE, NEEDS))
    for some, direct in zip(*found, strict=True):
        assert (some - direct).abs().max() <= 1e-5 * direct.abs().max()
    assert gaussian.by_products(tuple(four[:2]), tuple(four[2:]), kind) is None


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("kind", KINDS[:2])
def test_rows_whose_operands_overflow(kind, close):
    four = problem(1, 40, 40, 4, torch.float32, (False, False))
    level = torch.tensor([54.0] + [-40.0] * 39)[:, None]
    four = [x + level if logvar else x * math.exp(-20) for logvar, x in zip((0, 1, 0, 1), four, strict=True)]
    grad = (level == level.mT).float()[None]  # others are infinitely far from each other, or from one side
    leaves = [x.double().requires_grad_() for x in four]
    exact = divergences(*leaves, kind)
    got, sizes = gaussian.gaussian_divergence(*four, kind)
    close(got[grad > 0], exact[grad > 0].detach(), exact[grad > 0].detach().float())
    found = gaussian.gaussian_divergence_bwd(grad, *four, kind, got, sizes, NEEDS)
    for x, want in zip(found, torch.autograd.grad(exact, leaves, grad.double()), strict=True):
        for row in range(40):
            assert (x[0, row] - want[0, row]).abs().max() <= 1e-5 * want[0, row].abs().max()


def loss_of(
    four: list[Tensor], kind: int, form: int, margin: float, scale: float, chosen: Tensor, weight: Tensor
) -> Tensor:
    """Times the normalizer."""
    d = scale * divergences(*four, kind)
    f = (margin - d).relu() if form == 0 else 1 / (1 + d)
    return torch.where(chosen, f * (weight[:, None] if len(weight) else 1), 0).sum()


def compare_loss(close: Any, four: list[Tensor], rest: tuple[Any, ...], chosen: Tensor) -> None:
    weight, kind, form, margin, scale, _, mean, _ = rest[3:]
    loss, normalizer, *slopes = gaussian.gaussian_overlap(*four, *rest, NEEDS)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert normalizer == (chosen.sum().clamp_min(1) if mean else 1)
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in four]
        value = loss_of(leaves, kind, form, margin, scale, chosen, weight.to(dtype))
        found.append([value.detach() / normalizer, *torch.autograd.grad(value, leaves)])
    for x, exact, plain in zip((loss, *slopes), *found, strict=True):
        assert x.dtype == torch.float32
        close(x, exact, plain, factor=2 if x is loss else 3)
    again = gaussian.gaussian_overlap(*four, *rest, [False] * 4)
    assert torch.equal(again[0], loss)
    assert [x.shape for x in again[2:]] == [(0,)] * 4


def selection(four: list[Tensor], pairs: int, masked: bool, same_set: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels of p and q, the mask, and the pairs that count."""
    N, M = len(four[0]), len(four[2])
    labels_p = torch.arange(N) % 4
    labels_q = labels_p if same_set else torch.arange(M) // 2
    mask = torch.arange(N * M).view(N, M) % 3 > 0 if masked else torch.zeros(0, 0, dtype=torch.bool)
    equal = labels_p[:, None] == labels_q
    chosen = (torch.ones_like(equal), ~equal, equal)[pairs]
    chosen = chosen & mask if masked else chosen
    return labels_p, labels_q, mask, chosen & ~torch.eye(N, M, dtype=torch.bool) if same_set else chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("same_set", [False, True])
def test_overlap_and_slopes(kind, form, same_set, guard, bands, close, monkeypatch):
    monkeypatch.setattr(gaussian, "STRIP", 400)  # more than one strip of rows
    for case, (pairs, masked) in enumerate([(0, False), (1, False), (2, False), (0, True)]):
        shared = (case == 2, case == 2 and not same_set)
        four = [x[0] for x in problem(1, 19, 19 if same_set else 21, 18, torch.float32, shared)]
        four = four[:2] * 2 if same_set else four
        four = [guard(x, 0 if x.shape[1] == 1 else 1) for x in four]
        labels_p, labels_q, mask, chosen = selection(four, pairs, masked, same_set)
        weight = torch.linspace(0.5, 2, 19) if case % 2 else NONE
        margin = 0.6 * divergences(*four, kind).mean().item() / 18
        small = (guard(labels_p), guard(labels_q), mask, guard(weight))
        compare_loss(close, four, (*small, kind, form, margin, 1 / 18, pairs, case < 3, same_set), chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_overlap_of_low_precision(dtype, close):
    four = [x[0] for x in problem(1, 5, 6, 9, dtype, (False, True))]
    labels_p, labels_q, mask, chosen = selection(four, 1, False, False)
    compare_loss(close, four, (labels_p, labels_q, mask, NONE, 0, 1, 0.0, 1.0, 1, True, False), chosen)


def test_near_a_margin_slopes_keep_their_digits():
    four = near(math.log(1e-4), 100)
    every = torch.ones(7, 9, dtype=torch.bool)
    rest = (*[NONE.long()] * 2, NONE.bool(), NONE)
    loss, _, *slopes = gaussian.gaussian_overlap(*four, *rest, 0, 0, 8.0, 1.0, 0, False, False, NEEDS)
    leaves = [x.double().requires_grad_() for x in four]
    exact = loss_of(leaves, 0, 0, 8.0, 1.0, every, NONE)
    assert abs(loss.double() - exact) <= 1e-6 * exact
    for got, want in zip(slopes, torch.autograd.grad(exact, leaves), strict=True):
        assert (got.double() - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_a_hinge_leaves_infinitely_distant_pairs_alone():
    mean, logvar = torch.tensor([[0.0], [3.0], [1e30]]), torch.zeros(3, 1)
    rest = (*[NONE.long()] * 2, NONE.bool(), NONE)
    loss, _, *slopes = gaussian.gaussian_overlap(
        mean, logvar, mean, logvar, *rest, 0, 0, 5.0, 1.0, 0, False, True, NEEDS
    )
    assert loss == 1
    assert slopes[0].flatten().tolist() == [3, -3, 0]
    assert all(x.isfinite().all() for x in slopes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_subset_of_needs(kind):
    four = problem(1, 3, 4, 5, torch.float32, (True, False))
    grad, flat = torch.randn(1, 3, 4), [x[0] for x in four]
    rest = (*[NONE.long()] * 2, NONE.bool(), NONE, kind, 1, 0.0, 1.0, 0, True, False)
    out, sizes = gaussian.gaussian_divergence(*four, kind)
    whole = (
        gaussian.gaussian_divergence_bwd(grad, *four, kind, out, sizes, NEEDS),
        gaussian.gaussian_overlap(*flat, *rest, NEEDS),
    )
    for which in range(4):
        needs = [which == i for i in range(4)]
        of_matrix = gaussian.gaussian_divergence_bwd(grad, *four, kind, out, sizes, needs)
        of_loss = gaussian.gaussian_overlap(*flat, *rest, needs)[2:]
        for got, want in zip((*of_matrix, *of_loss), (*whole[0], *whole[1][2:]), strict=True):
            assert got.shape == (0,) or torch.equal(got, want)
        assert [x.numel() > 0 for x in of_matrix] == [x.numel() > 0 for x in of_loss] == needs


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_nan_out(kind):
    for spoil in range(4):
        four = problem(1, 3, 4, 5, torch.float32, (False, False))
        four[spoil][0, 1, 2] = torch.nan
        got = gaussian.gaussian_divergence(*four, kind)[0][0].isnan()
        assert got.sum() == (4 if spoil < 2 else 3)
        assert (got[1] if spoil < 2 else got[:, 1]).all()
        flat = [x[0] for x in four]
        rest = (*[NONE.long()] * 2, NONE.bool(), NONE, kind, 0, 1.0, 1.0, 0, True, False)
        loss, _, *slopes = gaussian.gaussian_overlap(*flat, *rest, NEEDS)
        assert loss.isnan()
        assert any(x.isnan().any() for x in slopes)


def test_empty():
    for L, N, M, D in [(1, 0, 3, 4), (1, 3, 0, 4), (1, 0, 0, 4), (1, 2, 3, 0), (0, 2, 3, 4)]:
        four = [torch.empty(L, rows, D) for rows in (N, N, M, M)]
        got, sizes = gaussian.gaussian_divergence(*four, 0)
        assert got.shape == (L, N, M)
        assert (got == 0).all()
        of_four = gaussian.gaussian_divergence_bwd(torch.ones(L, N, M), *four, 0, got, sizes, NEEDS)
        assert [x.shape for x in of_four] == [x.shape for x in four]
        assert all((x == 0).all() for x in of_four)
        if L:
            rest = (*[NONE.long()] * 2, NONE.bool(), NONE, 0, 1, 0.0, 1.0, 0, True, False)
            loss, normalizer, *slopes = gaussian.gaussian_overlap(*(x[0] for x in four), *rest, NEEDS)
            assert (loss, normalizer) == ((1, N * M) if N * M else (0, 1))
            assert all((x == 0).all() for x in slopes)
