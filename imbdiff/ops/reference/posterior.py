"""Reference of `imbdiff.ops.posterior_mean` and `posterior_draw`, rows [B, D] and [N, D]; the bank part by part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator
from imbdiff.ops.reference._vjp import vjp

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
    """(mean [B, D], lse [2, B]): each row's largest logit and the logarithm of the sum of e^(logit - largest).

    Two numbers, because at t = 0 the largest is 1e7 and its last digit in float32 is worth more than the logarithm.
    """
    logits = log_posterior(x_t, bank, signal, sigma, log_prior)
    largest = logits.detach().amax(1, keepdim=True)
    lse = torch.stack([largest[:, 0], (logits - largest).logsumexp(1)])
    return (_centre(bank) + _shift(bank, logits)).to(x_t.dtype), lse


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
    """The vjp part by part: with w and m the weights and the mean as constants, the derivative of
    sum_j w_ij (1 + l_ij - const) (b_j - m_i) is that of the mean, and each part of the bank has its own terms.
    """
    acc = accumulator(x_t.dtype)
    x, s, sd, centre = x_t.to(acc), signal.to(acc), sigma.to(acc), _centre(bank)
    # From the logits again, not from `out` and `lse`, which are rounded: this is what others are measured by.
    logits = log_posterior(x_t, bank, signal, sigma, log_prior)
    mean, weights = _shift(bank, logits), logits.softmax(1).split(_PART, 1)
    grad_x, grad_bank = torch.zeros_like(x), []
    for w, part in zip(weights, bank.split(_PART), strict=True):

        def share(x: Tensor, rows: Tensor, w: Tensor = w) -> Tensor:
            l = _logits(x, rows, s, sd, centre)
            p = w * (1 + l - l.detach())
            return p @ (rows - centre) - p.sum(1, keepdim=True) * mean

        g_x, g_rows = vjp(share, x, part.to(acc))[1](grad.to(acc))
        grad_x += g_x
        grad_bank.append(g_rows.to(bank.dtype))
    return (
        grad_x.to(x_t.dtype) if needs[0] else x_t.new_empty(0),
        torch.cat(grad_bank) if needs[1] else bank.new_empty(0),
    )


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
