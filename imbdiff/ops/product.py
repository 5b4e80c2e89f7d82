"""Products of Gaussian densities, and the regression target that one of them gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imbdiff.ops import _backends, _check
from imbdiff.ops._gaussians import logvar
from imbdiff.ops._op import Op, call, register, wanted
from imbdiff.ops.reference import product as reference


def product_of_gaussians(
    means: Sequence[Tensor], logvars: Sequence[Tensor | float], exponents: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The normalised product of K diagonal Gaussians, each raised to a power, and its normalising constant.

        prod_k N(x; m_k, e^(l_k))^(a_k) = Z N(x; mean, 1 / Lam)
        lam_k = a_k e^(-l_k),   Lam = sum_k lam_k,   mean = sum_k lam_k m_k / Lam
        ln Z  = -1/2 sum_d [ (sum_k a_k - 1) ln 2 pi + sum_k a_k l_k + ln Lam + sum_k lam_k (m_k - mean)^2 ]

    Args:
        means: K >= 1 tensors [B, ...] of one shape and dtype, float32, float64, bfloat16 or float16; D numbers a row.
        logvars: K log-variances: each like its mean, or [B, 1], or a scalar.
        exponents: [K] or [K, B], not negative and with a positive sum over K; None: all 1. A constant.

    Returns:
        mean [B, ...] in the means' dtype; log_precision = ln Lam [B, ...] and log_normalizer = ln Z [B] in float32
        (float64 for float64). Differentiable in means and log-variances.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape, dtype or value; the message names it.
        Values of tensors are looked at on the CPU only.

    Deterministic. Precisions are added in logarithms and means relative to the first, so neither an extreme variance
    nor a common offset costs digits. One pass over the inputs: time K B D, memory of the results.
    Equivalent torch code: `imbdiff/ops/reference/product.py`.
    Source: PoGDiff (arXiv 2502.08106, 2025), section 3, for K = 2. Used by PoGDiff with several neighbours.
    """
    op = "product_of_gaussians"
    means, logvars = list(means), list(logvars)
    K = len(means)
    if K == 0 or len(logvars) != K:
        raise ValueError(f"{op}: means and logvars must be K >= 1 of each, got {K} and {len(logvars)}")
    first = _check.tensor(op, "means[0]", means[0], symbols="[B, ...]")
    for k, mean in enumerate(means[1:], 1):
        _check.same(op, f"means[{k}]", mean, "means[0]", first)
    B, acc = len(first), _check.accumulator(first.dtype)
    rows = [_check.rows(x) for x in means]
    flat = [_check.rows(x) if isinstance(x, Tensor) and x.shape == first.shape else x for x in logvars]
    spread = [logvar(op, f"logvars[{k}]", x, f"means[{k}]", rows[k]) for k, x in enumerate(flat)]
    if exponents is None:
        exponents = first.new_ones(K, B, dtype=acc)
    else:
        exponents = _exponents(op, exponents, K, B, first)
    backend = _backends.choose(op, first, K)
    mean, log_precision, log_normalizer = call(op, backend, rows, spread, _check.small(exponents, acc))
    return mean.view(first.shape), log_precision.view(first.shape), log_normalizer


def _exponents(op: str, exponents: Tensor, K: int, B: int, like: Tensor) -> Tensor:
    if isinstance(exponents, Tensor) and exponents.shape == (K,):
        exponents = exponents[:, None].expand(K, B)
    _check.constant(op, "exponents", _check.tensor(op, "exponents", exponents, (K, B), "[K] or [K, B]", like=like))
    _check.values(op, "exponents", exponents, lambda a: 0 <= a < math.inf, "not negative and finite")
    _check.values(op, "exponents summed over K", exponents.sum(0), lambda total: total > 0, "positive")
    return exponents


def pog_target(eps: Tensor, neighbours: Tensor | Sequence[Tensor], psi: Tensor) -> tuple[Tensor, Tensor]:
    r"""The regression target of PoGDiff and its weight: the product of the noise's Gaussian with its neighbours'.

        target = (eps + sum_k psi_k n_k) / weight,   weight = 1 + sum_k psi_k
        weight |target - h|^2 = |eps - h|^2 + sum_k psi_k |n_k - h|^2 + a constant,   so their gradients in h are equal

    Args:
        eps: [B, ...] the noise, float32, float64, bfloat16 or float16.
        neighbours: the predictions n_k under K >= 1 neighbours' conditions, like eps; one tensor is K = 1.
            They are part of the target: detach them to follow the paper.
        psi: [B], or [K, B] for a list: lambda_neighbour / lambda_t, not negative. A constant.

    Returns:
        target [B, ...] in eps' dtype and weight [B] in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape, dtype or value; the message names it.

    Deterministic. psi = 0 gives eps bit for bit. A running mean, one pass for each neighbour: time K B D, memory of
    the result.
    Equivalent torch code: the formula. Source: PoGDiff (arXiv 2502.08106, 2025), section 3. Used by PoGDiff.
    """
    op = "pog_target"
    _check.tensor(op, "eps", eps, symbols="[B, ...]")
    single = isinstance(neighbours, Tensor)
    others = [neighbours] if isinstance(neighbours, Tensor) else list(neighbours)
    K, B, acc = len(others), len(eps), _check.accumulator(eps.dtype)
    if K == 0:
        raise ValueError(f"{op}: neighbours must be a tensor like eps or K >= 1 of them, got none")
    for k, other in enumerate(others):
        _check.same(op, "neighbours" if single else f"neighbours[{k}]", other, "eps", eps)
    shape, symbols = ((B,), "[B]") if single else ((K, B), "[K, B]")
    _check.constant(op, "psi", _check.tensor(op, "psi", psi, shape, symbols, like=eps))
    _check.values(op, "psi", psi, lambda p: 0 <= p < math.inf, "not negative and finite")
    target, weight = eps.to(acc), eps.new_ones(B, dtype=acc)
    for other, p in zip(others, psi.to(acc).view(K, B), strict=True):
        weight = weight + p
        target = torch.lerp(target, other.to(acc), (p / weight).view(-1, *[1] * (eps.ndim - 1)))
    return target.to(eps.dtype), weight


def _fake(backend: str, means: Sequence[Tensor], logvars: Sequence[Tensor], exponents: Tensor) -> tuple[Tensor, ...]:
    mean, acc = means[0], _check.accumulator(means[0].dtype)
    return (
        mean.new_empty(mean.shape),
        mean.new_empty(mean.shape, dtype=acc),
        mean.new_empty(mean.shape[0], dtype=acc),
    )


def _fake_bwd(
    grad_mean: Tensor,
    grad_log_precision: Tensor,
    grad_log_normalizer: Tensor,
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    exponents: Tensor,
    needs: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    tensors = zip([*means, *logvars], needs, strict=True)
    grads = [x.new_empty(x.shape if need else (0,)) for x, need in tensors]
    return grads[: len(means)], grads[len(means) :]


def _backward(
    bwd: Callable[..., Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    saved: Sequence[Tensor],
) -> list[Tensor | None]:
    means, logvars, exponents = inputs
    acc, needs = exponents.dtype, list(needs[: 2 * len(means)])
    # What was not used downstream has no gradient; what is a mean has an expanded one.
    shapes = ((means[0].shape, means[0].dtype), (means[0].shape, acc), (means[0].shape[:1], acc))
    filled = [
        exponents.new_zeros(shape, dtype=dtype) if g is None else g.contiguous()
        for g, (shape, dtype) in zip(grads, shapes, strict=True)
    ]
    of_means, of_logvars = bwd(*filled, means, logvars, exponents, needs)
    return wanted([*of_means, *of_logvars], needs)


register(
    Op(
        "product_of_gaussians",
        "product",
        reference.product_of_gaussians,
        _fake,
        outputs=3,
        reference_bwd=reference.product_of_gaussians_bwd,
        fake_bwd=_fake_bwd,
        backward=_backward,
    )
)
