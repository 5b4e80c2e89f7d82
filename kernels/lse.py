"""Log-sum-exp over a row's scores as a state of the pairwise engine, and the weights of its gradient."""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def lse_start(ROWS: tl.constexpr):
    return tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def lse_update(state, score, left, right):
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


def normalised(gain: Tensor) -> tuple[Tensor, Tensor]:
    """The largest becomes 1, and what it was: weights near 1 / N^2 would vanish in float16."""
    peak = gain.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return gain / peak, peak


def partners(x: Tensor, negatives: Tensor, include_self: bool) -> int:
    return len(negatives) + len(x) - (not include_self) if len(x) > 0 else 0
