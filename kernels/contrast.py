"""Losses on the distances between rows, streaming plan: score and state for the pairwise engine.

`split_k` is not looked at: few and wide rows are the other back end's.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from imbdiff.kernels import engine
from imbdiff.kernels.cosine import cosine_contrastive, cosine_contrastive_bwd, supcon, supcon_bwd
from imbdiff.kernels.lse import both_softmaxes, lse_finish, lse_start, lse_update, normalised, partners
from torch import Tensor

__all__ = [
    "cosine_contrastive", "cosine_contrastive_bwd", "distance_hinge", "distance_hinge_bwd", "negative_distance",
    "negative_distance_bwd", "supcon", "supcon_bwd",
]  # fmt: skip


@triton.jit
def negative_energy(product, left, right, same, scale):
    """-E = -scale |x_i - y_j|^2 from norms and products: never above 0, and 0 for a row with itself."""
    energy = scale * (left[0][:, None] + right[0][None, :] - 2.0 * product)
    # Not tl.maximum, which would turn a NaN into 0.
    return -tl.where(same | (energy < 0), 0.0, energy)


def negative_distance(
    x: Tensor, negatives: Tensor, weight: Tensor, scale: float, include_self: bool, per_row: bool, split_k: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    N, c = len(x), partners(x, negatives, include_self)
    lse, saved = x.new_zeros(N, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    if c == 0:
        return lse.sum(), lse, saved
    with torch.cuda.device_of(x):
        frame, norm = engine.centred(x, negatives)
        engine.forward(
            x, negatives, frame, (norm,), (lse,), scale,
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
    gain, peak = normalised(gain)
    none = lse.new_zeros(M)
    with torch.cuda.device_of(x):
        frame, norm = engine.centred(x, negatives)
        vectors = (norm, torch.cat([lse, none]), torch.cat([gain, none]))
        factor = -2.0 * scale * peak * grad
        return engine.backward(
            x, negatives, frame, vectors, factor, scale, SCORE=negative_energy, WEIGHT=both_softmaxes
        )


@triton.jit
def shortfall(product, left, right, same, scale):
    """1 - E / margin, where scale holds 1 / margin; pairs farther apart than the margin are below 0."""
    return 1.0 + negative_energy(product, left, right, same, scale)


@triton.jit
def hinge_start(ROWS: tl.constexpr):
    return (tl.zeros([ROWS], tl.float32),)


@triton.jit
def positive_part(score, left, right):
    return tl.where(score < 0, 0.0, score)  # NaN passes


@triton.jit
def hinge_update(state, score, left, right):
    short = positive_part(score, left, right)
    return (state[0] + tl.sum(short * short, axis=1),)


@triton.jit
def hinge_finish(state, row, exists, outputs):
    tl.store(outputs[0] + row, state[0], mask=exists)


def distance_hinge(x: Tensor, margin: float, scale: float, split_k: bool = False) -> tuple[Tensor, Tensor]:
    N, saved = len(x), x.new_empty(0, dtype=torch.float32)
    of_rows = x.new_zeros(N, dtype=torch.float32)
    if N > 1:
        with torch.cuda.device_of(x):
            frame, norm = engine.centred(x, x[:0])
            engine.forward(
                x, x[:0], frame, (norm,), (of_rows,), scale / margin,
                SCORE=shortfall, START=hinge_start, UPDATE=hinge_update, FINISH=hinge_finish, SELF=False,
            )  # fmt: skip
    return margin**2 / max(N * (N - 1), 1) * of_rows.sum(), saved


def distance_hinge_bwd(
    grad: Tensor, x: Tensor, saved: Tensor, margin: float, scale: float, split_k: bool = False
) -> Tensor:
    N = len(x)
    if N < 2 or x.numel() == 0:
        return x.new_zeros(x.shape)
    with torch.cuda.device_of(x):
        frame, norm = engine.centred(x, x[:0])
        factor = -8.0 * scale * margin / (N * (N - 1)) * grad
        return engine.backward(x, x[:0], frame, (norm,), factor, scale / margin, SCORE=shortfall, WEIGHT=positive_part)
