"""posterior_mean in Triton, interpreted, against float64 code written from the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the triton back end needs triton")
from imbdiff.kernels import posterior

EPS = torch.finfo(torch.float32).eps
NONE = torch.empty(0)
# Rows, bank, width: one of each, less and more than a tile, odd widths, more than one block of output columns.
SIZES = [(1, 1, 4), (2, 5, 3), (33, 65, 40), (3, 40, 300), (40, 3, 1)]


def problem(B: int, N: int, D: int, level: float, dtype: torch.dtype, offset: float = 0.5) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(B + 100 * N + D)
    bank = torch.randn(N, D, generator=g) / D**0.5 + offset
    signal = 1 - 0.3 * torch.rand(B, generator=g)
    sigma = level * (1 + torch.rand(B, generator=g))
    x = signal[:, None] * bank[torch.arange(B) % N] + sigma[:, None] / D**0.5 * torch.randn(B, D, generator=g)
    return x.to(dtype), bank.to(dtype), signal, sigma, torch.randn(N, generator=g), torch.randn(B, D, generator=g)


def reference(x: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and logits around the bank's mean."""
    centre = bank.detach().mean(0)
    a, b, s = x - signal[:, None] * centre, bank - centre, signal[:, None]
    logits = (s * (a @ b.T) - s**2 / 2 * b.square().sum(1)) / sigma[:, None] ** 2
    logits = logits + log_prior if len(log_prior) else logits
    return centre + logits.softmax(1) @ b, logits


def results(dtype: torch.dtype, grad: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    leaves = [v.to(dtype, copy=True).requires_grad_() for v in args[:2]]
    mean, logits = reference(*leaves, *(v.to(dtype) for v in args[2:]))
    return mean.detach(), logits.detach(), *torch.autograd.grad(mean, leaves, grad.to(dtype))


def compare(close: Any, grad: Tensor, *args: Tensor) -> None:
    grad, dtype = grad.to(args[0].dtype), args[0].dtype
    out, lse = posterior.posterior_mean(*args)
    of_x, of_bank = posterior.posterior_mean_bwd(grad, *args, out, lse, [True, True])
    assert out.dtype == of_x.dtype == of_bank.dtype == dtype
    assert all(v.is_contiguous() for v in (out, lse, of_x, of_bank))
    assert lse.shape == (2, len(out))
    assert lse.dtype == torch.float32
    exact, plain = (results(t, grad, *args) for t in (torch.float64, torch.float32))
    # What rounds before the exponential: the dot form's largest term.
    condition = max(1.0, 2 * exact[1].abs().max().item())
    close(lse[0], exact[1].amax(1), plain[1].amax(1), slack=EPS * condition)
    close(lse.sum(0), exact[1].logsumexp(1), plain[1].logsumexp(1), slack=EPS * condition)
    for factor, got, n in ((2, out, 0), (3, of_x, 2), (3, of_bank, 3)):
        slack = EPS * condition * exact[n].abs().max().item()
        close(got, exact[n], plain[n].to(dtype), factor=factor, slack=slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prior", [False, True])
def test_mean_and_gradients(prior, dtype, guard, bands, close):
    for B, N, D in SIZES if dtype == torch.float32 else SIZES[2:4]:
        for level in (1.0, 0.2):
            x, bank, signal, sigma, log_prior, grad = problem(B, N, D, level, dtype)
            small = (guard(v) for v in (signal, sigma, log_prior if prior else NONE))
            compare(close, guard(grad), guard(x, 3), guard(bank, 1), *small)


def test_a_common_offset_cancels(close):
    """A bank far from the origin: without the centre its norms would be 10^4 times the distances that decide."""
    x, bank, signal, sigma, _, grad = problem(20, 40, 64, 0.5, torch.float32, offset=12.5)
    compare(close, grad, x, bank, signal, sigma, NONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_slices_of_rows(dtype, bands, close, monkeypatch):
    monkeypatch.setattr(posterior, "MATRIX", 0)
    x, bank, *small, grad = problem(140, 5, 7, 0.5, dtype)
    assert posterior.height(5, 7) < 70
    compare(close, grad, x, bank, *small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_sigma_is_small_the_mean_is_the_row_itself(dtype):
    _, bank, signal, _, log_prior, grad = problem(33, 50, 40, 1.0, dtype)
    rows = torch.arange(33)
    x = (signal[:, None] * bank[:33].float()).to(dtype)
    args = (x, bank, signal, torch.full((33,), 1e-4), log_prior)
    out, lse = posterior.posterior_mean(*args)
    assert lse[0].abs().max() > 1e6
    assert (out.float() - bank[rows].float()).abs().max() <= 2 * torch.finfo(dtype).eps
    of_x, of_bank = posterior.posterior_mean_bwd(grad.to(dtype), *args, out, lse, [True, True])
    assert (of_x == 0).all()
    # Interpreted stores of bfloat16 truncate.
    torch.testing.assert_close(of_bank[:33], grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert (of_bank[33:] == 0).all()


def test_a_prior_of_minus_infinity_leaves_a_row_out(close):
    x, bank, signal, sigma, log_prior, grad = problem(5, 40, 8, 1.0, torch.float32)
    log_prior[[0, 33]] = -torch.inf
    args, kept = (x, bank, signal, sigma, log_prior), [j for j in range(40) if j not in (0, 33)]
    out, lse = posterior.posterior_mean(*args)
    of_x, of_bank = posterior.posterior_mean_bwd(grad, *args, out, lse, [True, True])
    exact = results(torch.float64, grad, x, bank[kept], signal, sigma, log_prior[kept])
    for got, want in ((out, exact[0]), (of_x, exact[2]), (of_bank[kept], exact[3])):
        assert (got - want).abs().max() < 1e-5
    assert (of_bank[[0, 33]] == 0).all()


def test_every_subset_of_needs():
    x, bank, signal, sigma, log_prior, grad = problem(5, 6, 8, 1.0, torch.float32)
    args = (x, bank, signal, sigma, log_prior)
    kept = posterior.posterior_mean(*args)
    whole = posterior.posterior_mean_bwd(grad, *args, *kept, [True, True])
    for needs in ([False, False], [True, False], [False, True]):
        for need, some, all_of in zip(
            needs, posterior.posterior_mean_bwd(grad, *args, *kept, needs), whole, strict=True
        ):
            assert torch.equal(some, all_of) if need else some.shape == (0,)


def test_rows_more_than_2_to_the_31_elements_apart(close):
    stride = 2**30 + 16  # the memory between the rows is never touched
    x, bank, *rest, grad = problem(3, 3, 5, 1.0, torch.bfloat16)
    far = [
        torch.empty(2 * stride + 8, dtype=torch.bfloat16).as_strided((3, 5), (stride, 1)).copy_(v) for v in (x, bank)
    ]
    compare(close, grad, *far, *rest)


def test_expanded_rows(close):
    x, bank, *rest, grad = problem(4, 6, 8, 1.0, torch.float32)
    compare(close, grad, x[:1].expand(4, 8), bank[:1].expand(6, 8), *rest)


def test_nan_in_nan_out():
    for spoil in range(3):
        x, bank, *small, grad = problem(3, 4, 5, 1.0, torch.float32)
        (x, bank, grad)[spoil][1, 2] = torch.nan
        out, lse = posterior.posterior_mean(x, bank, *small)
        of_x, of_bank = posterior.posterior_mean_bwd(grad, x, bank, *small, out, lse, [True, True])
        assert out.isnan().any(1).tolist() == [spoil == 1, spoil < 2, spoil == 1]
        assert of_x.isnan().any(1).tolist() == [spoil == 1, True, spoil == 1]
        assert of_bank.isnan().any(1).all()


def test_empty():
    for B, N, D in [(0, 4, 3), (0, 0, 3), (3, 2, 0)]:
        x, bank, s, w = torch.empty(B, D), torch.empty(N, D), torch.ones(B), torch.randn(N)
        out, lse = posterior.posterior_mean(x, bank, s, s, w)
        assert (out.shape, lse.shape) == ((B, D), (2, B))
        if B:
            assert (lse.sum(0) - w.logsumexp(0)).abs().max() < 1e-6
        of_x, of_bank = posterior.posterior_mean_bwd(x, x, bank, s, s, w, out, lse, [True, True])
        assert (of_x.shape, of_bank.shape) == ((B, D), (N, D))
        assert (of_bank == 0).all()
