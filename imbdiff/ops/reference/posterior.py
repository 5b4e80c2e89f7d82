"""Reference of `imbdiff.ops.posterior_mean` and `posterior_draw`."""

from __future__ import annotations

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator


def log_posterior(x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor | None) -> Tensor:
    """[B, N] log-likelihoods of x_t under each clean row, up to a constant per row.

    The dot form: the row's own |x_t|^2 is dropped before it can cancel, which is what keeps float32 accurate.
    """
    acc = accumulator(x_t.dtype)
    x, rows, s = x_t.flatten(1).to(acc), bank.flatten(1).to(acc), signal.to(acc)[:, None]
    logits = (s * (x @ rows.T) - s.square() / 2 * rows.square().sum(1)) / sigma.to(acc)[:, None].square()
    return logits if log_prior is None else logits + log_prior.to(acc)


def posterior_mean(x_t: Tensor, bank: Tensor, signal: Tensor, sigma: Tensor, log_prior: Tensor | None = None) -> Tensor:
    weights = log_posterior(x_t, bank, signal, sigma, log_prior).softmax(1)
    return (weights @ bank.flatten(1).to(weights.dtype)).to(x_t.dtype).view(len(x_t), *bank.shape[1:])


def posterior_draw(
    x_t: Tensor,
    bank: Tensor,
    signal: Tensor,
    sigma: Tensor,
    u: Tensor,
    own: Tensor,
    accept: Tensor | None,
    log_prior: Tensor | None = None,
) -> Tensor:
    """`accept` [B, N] bool or None (all): where the drawn row is refused, the sample keeps its own."""
    cdf = log_posterior(x_t, bank, signal, sigma, log_prior).double().softmax(1).cumsum(1)
    # u < 1 times the last edge lies strictly below it, so the row found exists and has a probability above zero.
    drawn = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)[:, 0].clamp_max(len(bank) - 1)
    if accept is None:
        return drawn
    return torch.where(accept.gather(1, drawn[:, None])[:, 0], drawn, own)
