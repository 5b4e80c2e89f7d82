"""Reference of `imbdiff.ops.posterior_mean` and `posterior_draw`, rows [B, D] and [N, D]; the bank part by part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator

GATES = ("full", "t2h", "h2t")
"""The schema's integer is the index of the name."""

_PART = 4096  # rows of the bank that are held in the accumulator's precision


def _centre(bank: Tensor) -> Tensor:
    acc = accumulator(bank.dtype)
    return torch.stack([part.detach().to(acc).sum(0) for part in bank.split(_PART)]).sum(0) / len(bank)


def _logits(x: Tensor, rows: Tensor, signal: Tensor, sigma: Tensor, centre: Tensor) -> Tensor:
    """[B, n] logarithms of the density of x_t given each clean row, up to a constant per row of x.

    The dot form around the bank's mean: neither |x_t|^2 nor a common offset is there to cancel in float32.
    """
    s = signal[:, None]
    a, b = x - s * centre, rows - centre
    return (s * (a @ b.T) - s.square() / 2 * b.square().sum(1)) / sigma[:, None].square()


def log_posterior(x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor) -> Tensor:
    """[B, N], not normalised; an empty log_prior is uniform."""
    acc = accumulator(x_t.dtype)
    x, centre = x_t.to(acc), _centre(bank)
    parts = [_logits(x, rows.to(acc), signal.to(acc), sigma.to(acc), centre) for rows in bank.split(_PART)]
    return torch.cat(parts, 1) + (log_prior.to(acc) if log_prior.numel() else 0)


def posterior_mean(
    x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor
) -> tuple[Tensor, Tensor]:
    """(mean [B, D], lse [B])."""
    logits = log_posterior(x_t, bank, signal, sigma, log_prior)
    return (_centre(bank) + _shift(bank, logits)).to(x_t.dtype), logits.logsumexp(1)


def _shift(bank: Tensor, logits: Tensor) -> Tensor:
    """[B, D] the posterior mean less the bank's mean."""
    centre, parts = _centre(bank), zip(logits.softmax(1).split(_PART, 1), bank.split(_PART), strict=True)
    return torch.stack([w @ (rows.to(w.dtype) - centre) for w, rows in parts]).sum(0)


def posterior_mean_bwd(
    grad: Tensor,
    x_t: Tensor,
    bank: Tensor,
    signal: Tensor,
    sigma: Tensor,
    log_prior: Tensor,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The vjp part by part. With lse and the mean m constant, sum_j e^(l_ij - lse_i) (b_j - m_i) has the derivative of
    sum_j softmax_j(l_ij) b_j, and a part of the bank its own terms.
    """
    acc = accumulator(x_t.dtype)
    x, s, sd, centre = x_t.to(acc), signal.to(acc), sigma.to(acc), _centre(bank)
    # `out` is rounded to x_t's type; the derivative of a saturated softmax would show it.
    mean = _shift(bank, log_posterior(x_t, bank, signal, sigma, log_prior))
    prior = (log_prior.to(acc) if log_prior.numel() else x.new_zeros(len(bank))).split(_PART)
    grad_x, grad_bank = torch.zeros_like(x), []
    for part, bias in zip(bank.split(_PART), prior, strict=True):

        def share(x: Tensor, rows: Tensor, bias: Tensor = bias) -> Tensor:
            p = (_logits(x, rows, s, sd, centre) + bias - lse[:, None]).exp()
            return p @ (rows - centre) - p.sum(1, keepdim=True) * mean

        g_x, g_rows = torch.func.vjp(share, x, part.to(acc))[1](grad.to(acc))
        grad_x += g_x
        grad_bank.append(g_rows.to(bank.dtype) if needs[1] else g_rows.new_empty(0, dtype=bank.dtype))
    return grad_x.to(x_t.dtype) if needs[0] else x_t.new_empty(0), torch.cat(grad_bank)


def posterior_draw(
    x_t: Tensor,
    bank: Tensor,
    signal: Tensor,
    sigma: Tensor,
    u: Tensor,
    own: Tensor,
    counts_x: Tensor,
    counts_bank: Tensor,
    log_prior: Tensor,
    gate: int,
) -> Tensor:
    """[B] int64: the inverse of the distribution function at u; where the gate refuses, the sample keeps its own."""
    cdf = log_posterior(x_t, bank, signal, sigma, log_prior).double().softmax(1).cumsum(1)
    # u < 1 times the last edge lies strictly below it, so the row found exists and has a probability above zero.
    drawn = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)[:, 0].clamp_max(len(bank) - 1)
    if GATES[gate] == "full":
        return drawn
    theirs = counts_bank[drawn]
    return torch.where(theirs >= counts_x if GATES[gate] == "t2h" else theirs <= counts_x, drawn, own)
