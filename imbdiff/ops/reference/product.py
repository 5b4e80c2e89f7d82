"""Reference of `imbdiff.ops.product_of_gaussians`, K means [B, D], K log-variances [B, D or 1], exponents [K, B]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imbdiff.ops._check import accumulator
from imbdiff.ops.reference._vjp import vjp


def product_of_gaussians(
    means: Sequence[Tensor], logvars: Sequence[Tensor], exponents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [B, D], log_precision [B, D], log_normalizer [B]).

    With the precisions in logarithms nothing overflows; means less that of the most precise factor, and log-variances
    less the first, keep their digits.
    """
    acc, D = accumulator(means[0].dtype), means[0].shape[1]
    m = torch.stack([x.to(acc) for x in means])
    l = torch.stack([x.to(acc).expand_as(m[0]) for x in logvars])
    a = exponents.to(acc)
    log_lam = a.log()[:, :, None] - (l - l[0])
    total = log_lam.logsumexp(0)
    log_precision = total - l[0]
    base = m.gather(0, log_lam.argmax(0, keepdim=True))
    apart = m - base
    shift = ((log_lam - total).exp() * apart).sum(0)
    quadratic = (a[:, :, None] * ((apart - shift) * (-l / 2).exp()).square()).sum(0)
    constants = (a.sum(0) - 1) * (D * math.log(2 * math.pi))
    log_normalizer = -(constants + ((a[:, :, None] * l).sum(0) + log_precision + quadratic).sum(1)) / 2
    return (base[0] + shift).to(means[0].dtype), log_precision, log_normalizer


def product_of_gaussians_bwd(
    grad_mean: Tensor,
    grad_log_precision: Tensor,
    grad_log_normalizer: Tensor,
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    exponents: Tensor,
    needs: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """`needs` [2K]: means first."""
    K = len(means)

    def product(*rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return product_of_gaussians(rows[:K], rows[K:], exponents)

    pullback = vjp(product, *means, *logvars)[1]
    found = pullback((grad_mean, grad_log_precision, grad_log_normalizer))
    # Copies: autograd may give one tensor for two arguments.
    grads = [
        g.clone(memory_format=torch.contiguous_format) if need else g.new_empty(0)
        for g, need in zip(found, needs, strict=True)
    ]
    return grads[:K], grads[K:]
