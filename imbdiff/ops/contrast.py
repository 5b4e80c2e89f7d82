"""Losses that push the rows of a batch of features apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from imbdiff.ops import _backends, _check
from imbdiff.ops._op import Op, call, register
from imbdiff.ops.reference import contrast as reference

_OP = "negative_distance_loss"


def negative_distance_loss(
    x: Tensor,
    *,
    tau: float,
    per_dim: bool = False,
    include_self: bool = True,
    per_row: bool = False,
    weight: Tensor | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""Log-mean-exp of the negative squared distances between the rows of a batch.

        E_ij = |x_i - y_j|^2 / tau          y: the rows of x, then the negatives;  / (tau D) with per_dim
        loss = log( 1/(N c) sum_ij exp(-E_ij) )                            one number for the batch, or with per_row
        loss = (1/N) sum_i w_i log( 1/c sum_j exp(-E_ij) )
        c    = N + M terms a row, or one less without include_self, where j = i is left out

    Dispersive loss is per_dim=True as it stands; its minimum with the self terms is -log N.

    Args:
        x: [N, ...] features, float32, float64, bfloat16 or float16; flattened to rows of D.
        tau: temperature, positive and finite.
        per_dim: divide distances by D, so that tau need not grow with it.
        include_self: count the distance of each row to itself, which is 0.
        per_row: average the logarithms of rows instead of taking the logarithm of the average.
        weight: [N] with per_row only; a constant.
        negatives: [M, ...] further rows to be pushed away from; constants.

    Returns:
        [] float32 (float64 for float64). N = 0, or a row with no other to compare with, gives 0 and zero gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape, dtype or value; the message names it.

    Deterministic. Distances are computed around the column mean, clamped at 0, and exactly 0 on the diagonal.
    Equivalent torch code: `imbdiff/ops/reference/contrast.py`. Source: Wang & He 2025, "Diffuse and disperse"; the row
    form without self terms: Wang & Isola 2020, "Alignment and uniformity", eq. 9.
    """
    _check.tensor(_OP, "x", x, symbols="[N, ...]")
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"{_OP}: tau must be a positive finite number, got {tau!r}")
    rows = _check.rows(x)
    N, D = rows.shape
    acc = _check.accumulator(x.dtype)
    if negatives is None:
        others = rows.new_empty(0, D)
    else:
        _check.tensor(_OP, "negatives", negatives, (None, *x.shape[1:]), "[M, ...] with x's row shape", like=x)
        _check.same_dtype(_OP, "x", x, "negatives", negatives)
        others = _check.rows(_check.constant(_OP, "negatives", negatives))
    if weight is None:
        weight = rows.new_empty(0, dtype=acc)
    else:
        if not per_row:
            raise ValueError(f"{_OP}: weight multiplies the rows' logarithms, so it needs per_row=True")
        _check.constant(_OP, "weight", _check.tensor(_OP, "weight", weight, (N,), "[N]", like=x))
    scale = 1.0 / (tau * (max(D, 1) if per_dim else 1))
    backend = _backends.choose("negative_distance", x)
    return call("negative_distance", backend, rows, others, weight.to(acc).contiguous(), scale, include_self, per_row)[
        0
    ]


def _fake(
    backend: str, x: Tensor, negatives: Tensor, weight: Tensor, scale: float, include_self: bool, per_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc, N, M = _check.accumulator(x.dtype), x.shape[0], negatives.shape[0]
    keeps = _keeps_distances(backend, N, M, x.shape[1]) and int(not include_self) < N + M
    saved = x.new_empty((N, N + M) if keeps else 0, dtype=acc)
    return x.new_empty((), dtype=acc), x.new_empty(N, dtype=acc), saved


def _keeps_distances(backend: str, N: int, M: int, D: int) -> bool:
    """Whether the back end's split-K plan runs, which keeps the N x (N + M) distances for the backward."""
    return backend in ("cpu", "cuda") and 0 < N <= 1024 and N + M <= 4096 and D >= 1024


def _fake_bwd(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    bwd: Callable[..., Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    saved: Sequence[Tensor],
) -> list[Tensor | None]:
    (grad,), (x, negatives, weight, *settings) = grads, inputs
    return [None if grad is None else bwd(grad.contiguous(), x, negatives, weight, *saved, *settings)]


register(
    Op(
        "negative_distance",
        "contrast",
        reference.negative_distance,
        _fake,
        reference_bwd=reference.negative_distance_bwd,
        fake_bwd=_fake_bwd,
        backward=_backward,
    )
)
