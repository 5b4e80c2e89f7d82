"""Losses on the cosines between rows, streaming plan: the other half of the family `contrast`.

Rows are brought to lengths between 1/2 and 1 by powers of two, so that products need no rounded unit rows.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from imbdiff.kernels import engine
from imbdiff.kernels.lse import both_softmaxes, lse_finish, lse_start, lse_update, normalised, partners
from torch import Tensor


@triton.jit
def cosine_logit(product, left, right, same, scale):
    """(cos - 1) / tau, never above 0; vectors begin with the inverse lengths, scale is 1 / tau."""
    gap = scale * (1.0 - product * left[0][:, None] * right[0][None, :])
    return -tl.where(gap < 0, 0.0, gap)


@triton.jit
def cosine_softmaxes(score, left, right):
    """Of the partner's direction, hence its inverse length."""
    return both_softmaxes(score, left, right) * right[0][None, :]


def cosine_contrastive(
    x: Tensor, negatives: Tensor, weight: Tensor, tau: float, include_self: bool, split_k: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The self term, e^0, is added at the end, so that others far below it keep their digits."""
    N, c = len(x), partners(x, negatives, False)
    lse, saved = x.new_zeros(N, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    if c == 0:
        return lse.sum(), lse, saved
    with torch.cuda.device_of(x):
        frame, inverse = engine.directions(x, negatives)
        engine.forward(
            x, negatives, frame, (inverse,), (lse,), 1 / tau,
            SCORE=cosine_logit, START=lse_start, UPDATE=lse_update, FINISH=lse_finish, SELF=False,
        )  # fmt: skip
    lse = lse.exp().log1p() if include_self else lse
    row = lse if include_self else lse + (1 / tau - math.log(c))
    return (weight * row if len(weight) else row).mean(), lse, saved


def cosine_contrastive_bwd(
    grad: Tensor, x: Tensor, negatives: Tensor, weight: Tensor, lse: Tensor, saved: Tensor, tau: float,
    include_self: bool, split_k: bool = False,
) -> Tensor:  # fmt: skip
    N, M = len(x), len(negatives)
    if partners(x, negatives, False) == 0 or x.numel() == 0:
        return x.new_zeros(x.shape)
    gain = (weight if len(weight) else torch.ones_like(lse)) / N
    if include_self:
        # The softmax of the others alone, times their part of the whole: next to the self term each may be tiny.
        gain, lse = -gain * torch.expm1(-lse), torch.expm1(lse).log()
    gain, peak = normalised(gain)
    none = lse.new_zeros(M)
    with torch.cuda.device_of(x):
        frame, inverse = engine.directions(x, negatives)
        vectors = (inverse, torch.cat([lse, none]), torch.cat([gain, none]))
        return engine.backward(
            x, negatives, frame, vectors, -peak / tau * grad, 1 / tau, SCORE=cosine_logit, WEIGHT=cosine_softmaxes
        )


@triton.jit
def supcon_start(ROWS: tl.constexpr):
    top, total = lse_start(ROWS)
    return top, total, tl.zeros([ROWS], tl.float32)


@triton.jit
def supcon_update(state, score, left, right):
    """Beside the others' lse the sum of the positives' scores; vectors are (inverse, group)."""
    top, total = lse_update((state[0], state[1]), score, left, right)
    positive = (left[1][:, None] == right[1][None, :]) & (score != float("-inf"))
    return top, total, state[2] + tl.sum(tl.where(positive, score, 0.0), axis=1)


@triton.jit
def supcon_finish(state, row, exists, outputs):
    lse_finish((state[0], state[1]), row, exists, outputs)
    tl.store(outputs[1] + row, state[2], mask=exists)


@triton.jit
def supcon_weight(score, left, right):
    """Softmaxes less a positive's share of both means; vectors are (inverse, lse, gain, share, group)."""
    share = tl.where(left[4][:, None] == right[4][None, :], left[3][:, None] + right[3][None, :], 0.0)
    return (both_softmaxes(score, left, right) - share) * right[0][None, :]


def anchors(labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row a number for its label, how many positives it has (at least 1) and what its term weighs in the loss.

    Nothing here waits for the device.
    """
    found = labels.sort().values
    group = torch.searchsorted(found, labels, out_int32=True)
    count = torch.searchsorted(found, labels, out_int32=True, right=True) - group - 1
    gain = torch.where(count > 0, weight if len(weight) else 1.0, 0.0) / (count > 0).sum().clamp_min(1)
    return group, count.clamp_min(1), gain


def supcon(
    x: Tensor, labels: Tensor, weight: Tensor, tau: float, split_k: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    lse, near = x.new_zeros(2, len(x), dtype=torch.float32)
    saved = x.new_empty(0, dtype=torch.float32)
    if len(x) < 2:
        return lse.sum(), lse, saved
    with torch.cuda.device_of(x):
        group, count, gain = anchors(labels, weight)
        frame, inverse = engine.directions(x, x[:0])
        engine.forward(
            x, x[:0], frame, (inverse, group), (lse, near), 1 / tau,
            SCORE=cosine_logit, START=supcon_start, UPDATE=supcon_update, FINISH=supcon_finish, SELF=False,
        )  # fmt: skip
    return torch.where(gain == 0, 0.0, gain * (lse - near / count)).sum(), lse, saved


def supcon_bwd(
    grad: Tensor, x: Tensor, labels: Tensor, weight: Tensor, lse: Tensor, saved: Tensor, tau: float,
    split_k: bool = False,
) -> Tensor:  # fmt: skip
    if len(x) < 2 or x.numel() == 0:
        return x.new_zeros(x.shape)
    with torch.cuda.device_of(x):
        frame, inverse = engine.directions(x, x[:0])
        group, count, gain = anchors(labels, weight)
        gain, peak = normalised(gain)
        return engine.backward(
            x, x[:0], frame, (inverse, lse, gain, gain / count, group), -peak / tau * grad, 1 / tau,
            SCORE=cosine_logit, WEIGHT=supcon_weight,
        )  # fmt: skip
