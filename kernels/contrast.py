"""Negatives-only contrast of squared distances, streaming plan: score and state for the pairwise engine."""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from imbdiff.kernels import engine
from torch import Tensor


@triton.jit
def negative_energy(product, left, right, same, scale):
    """-E = -scale |x_i - y_j|^2 from norms and products: never above 0, and 0 for a row with itself."""
    energy = scale * (left[0][:, None] + right[0][None, :] - 2.0 * product)
    # Not tl.maximum, which would turn a NaN into 0.
    return -tl.where(same | (energy < 0), 0.0, energy)


@triton.jit
def lse_start(ROWS: tl.constexpr):
    return tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def lse_update(state, score):
    top, total = state
    best = tl.maximum(top, tl.max(score, axis=1))
    base = tl.where(best == float("-inf"), 0.0, best)  # nothing seen yet: keep inf - inf out
    return best, total * tl.exp(top - base) + tl.sum(tl.exp(score - base[:, None]), axis=1)


@triton.jit
def lse_finish(state, row, exists, outputs):
    top, total = state
    tl.store(outputs[0] + row, top + tl.log(tl.where(total == 0, 1.0, total)), mask=exists)


@triton.jit
def softmax(score, lse):
    """A partner's score is at most lse but for rounding; one that is not counted, the row itself, may be far above."""
    gap = score - lse
    return tl.exp(tl.where(gap > 0, 0.0, gap))


@triton.jit
def both_softmaxes(score, left, right):
    """gain_i exp(s_ij - lse_i) + gain_j exp(s_ij - lse_j); vectors are (norm, lse, gain), the bank's gain is 0."""
    forth = left[2][:, None] * softmax(score, left[1][:, None])
    return forth + right[2][None, :] * softmax(score, right[1][None, :])


def partners(x: Tensor, negatives: Tensor, include_self: bool) -> int:
    return len(negatives) + len(x) - (not include_self) if len(x) > 0 else 0


def negative_distance(
    x: Tensor, negatives: Tensor, weight: Tensor, scale: float, include_self: bool, per_row: bool, split_k: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams whatever `split_k` says: few and wide rows are the other back end's."""
    N, c = len(x), partners(x, negatives, include_self)
    lse, saved = x.new_zeros(N, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    if c == 0:
        return lse.sum(), lse, saved
    with torch.cuda.device_of(x):
        centre, norm = engine.prepare(x, negatives)
        engine.forward(
            x, negatives, centre, (norm,), (lse,), scale,
            SCORE=negative_energy, START=lse_start, UPDATE=lse_update, FINISH=lse_finish, SELF=include_self,
        )  # fmt: skip
    if not per_row:
        return lse.logsumexp(0) - math.log(N * c), lse, saved
    row = lse - math.log(c)
    return (weight * row if len(weight) else row).mean(), lse, saved


def negative_distance_bwd(
    grad: Tensor, x: Tensor, negatives: Tensor, weight: Tensor, lse: Tensor, saved: Tensor, scale: float,
    include_self: bool, per_row: bool, split_k: bool = False,
) -> Tensor:  # fmt: skip
    """Both losses are sum_i gain_i softmax_j(-E_ij): gain = softmax(lse) of the whole, or weight / N of a row."""
    N, M = len(x), len(negatives)
    if partners(x, negatives, include_self) == 0 or x.numel() == 0:
        return x.new_zeros(x.shape)
    gain = (weight if len(weight) else torch.ones_like(lse)) / N if per_row else lse.softmax(0)
    # The largest gain becomes 1: weights near 1 / N^2 would vanish in float16.
    peak = gain.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    none = lse.new_zeros(M)
    with torch.cuda.device_of(x):
        centre, norm = engine.prepare(x, negatives)
        vectors = (norm, torch.cat([lse, none]), torch.cat([gain / peak, none]))
        factor = -2.0 * scale * peak * grad
        return engine.backward(
            x, negatives, centre, vectors, factor, scale, SCORE=negative_energy, WEIGHT=both_softmaxes
        )
