"""Losses that push the rows of a batch of features apart by their distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from imbdiff.ops import _backends, _check
from imbdiff.ops._op import Op, call, register
from imbdiff.ops.reference import contrast as reference

Flatten = Callable[[Tensor], Tensor]
"""[B, ...] to dense rows [B, D]; another order of the D columns than the shape's is another `Flatten`."""


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
    Time N^2 D, memory O(N^2) for few wide rows, else O(N D). Equivalent torch code:
    `imbdiff/ops/reference/contrast.py`. Source: Wang & He 2025, "Diffuse and disperse"; the row form without self
    terms: Wang & Isola 2020, "Alignment and uniformity", eq. 9. Used by Dispersive.
    """
    rest = negative_distance_arguments(
        x, _check.rows, tau, per_dim, include_self, per_row, weight=weight, negatives=negatives
    )
    return call("negative_distance", _backends.choose("negative_distance", x), _check.rows(x), *rest)[0]


def negative_distance_arguments(
    x: Tensor,
    flatten: Flatten,
    tau: float,
    per_dim: bool = False,
    include_self: bool = True,
    per_row: bool = False,
    weight: Tensor | None = None,
    negatives: Tensor | None = None,
) -> tuple[Any, ...]:
    """The operation's arguments after the rows, checked."""
    op = "negative_distance_loss"
    _check.tensor(op, "x", x, symbols="[N, ...]")
    scale = 1 / (_check.positive(op, "tau", tau) * (width(x) if per_dim else 1))
    others = negative_rows(op, x, negatives, flatten)
    if weight is not None and not per_row:
        raise ValueError(f"{op}: weight multiplies the rows' logarithms, so it needs per_row=True")
    split_k = few_and_wide(len(x), len(others), others.shape[1])
    return others, _check.row_weight(op, weight, x), scale, include_self, per_row, split_k


def distance_hinge_loss(x: Tensor, *, margin: float, per_dim: bool = False) -> Tensor:
    r"""Mean squared shortfall of the squared distances between the rows of a batch.

        E_ij = |x_i - x_j|^2                                                              / D with per_dim
        loss = 1/(N (N - 1)) sum over i != j of max(0, margin - E_ij)^2

    Args:
        x: [N, ...] features, float32, float64, bfloat16 or float16; flattened to rows of D.
        margin: positive and finite, in units of E.
        per_dim: divide distances by D.

    Returns:
        [] float32 (float64 for float64). N < 2 gives 0 and zero gradient. Rows never count against themselves, so the
        minimum is 0; with the self terms the published mean is (N - 1)/N of this plus margin^2 / N.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, dtype or value; the message names it.

    Deterministic. Distances, time and memory as in `negative_distance_loss`. Equivalent torch code:
    `imbdiff/ops/reference/contrast.py`. Source: Wang & He 2025, "Diffuse and disperse", the hinge variant. Used by
    Dispersive.
    """
    rest = distance_hinge_arguments(x, _check.rows, margin, per_dim)
    return call("distance_hinge", _backends.choose("distance_hinge", x), _check.rows(x), *rest)[0]


def distance_hinge_arguments(x: Tensor, flatten: Flatten, margin: float, per_dim: bool = False) -> tuple[Any, ...]:
    op = "distance_hinge_loss"
    _check.tensor(op, "x", x, symbols="[N, ...]")
    scale = 1 / width(x) if per_dim else 1.0
    return _check.positive(op, "margin", margin), scale, few_and_wide(len(x), 0, width(x))


def few_and_wide(N: int, M: int, D: int) -> bool:
    """The plan. Of few and enormous rows the width is cut into parts (split-K), and the N x (N + M) distances are worth
    keeping for the backward; of others tiles of distances are made and forgotten (streaming)."""
    return N <= 1024 and N + M <= 4096 and D >= 1024


def keeps_matrix(backend: str, split_k: bool) -> bool:
    """Whether this back end keeps the matrix of the forward; the others have one plan."""
    return split_k and backend in ("cpu", "cuda")


def width(x: Tensor) -> int:
    """D, and 1 for rows of nothing, which are divided by it."""
    return max(math.prod(x.shape[1:]), 1)


def negative_rows(op: str, x: Tensor, negatives: Tensor | None, flatten: Flatten) -> Tensor:
    """[M, D] further rows, in the order of columns of x's."""
    if negatives is None:
        return x.new_empty(0, math.prod(x.shape[1:]))
    _check.tensor(op, "negatives", negatives, (None, *x.shape[1:]), "[M, ...] with x's row shape", like=x)
    return flatten(_check.constant(op, "negatives", _check.same_dtype(op, "x", x, "negatives", negatives)))


def loss_backward(
    bwd: Callable[..., Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    saved: Sequence[Tensor],
) -> list[Tensor | None]:
    """Of every loss of rows: bwd(grad, tensors, what was kept, settings) is the gradient of the rows."""
    (grad,) = grads
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return [None if grad is None else bwd(grad.contiguous(), *tensors, *saved, *inputs[len(tensors) :])]


def loss_fake_bwd(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake(
    backend: str,
    x: Tensor,
    negatives: Tensor,
    weight: Tensor,
    scale: float,
    include_self: bool,
    per_row: bool,
    split_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc, N, M = _check.accumulator(x.dtype), x.shape[0], negatives.shape[0]
    keeps = keeps_matrix(backend, split_k) and N > 0 and int(not include_self) < N + M
    saved = x.new_empty((N, N + M) if keeps else 0, dtype=acc)
    return x.new_empty((), dtype=acc), x.new_empty(N, dtype=acc), saved


def _fake_hinge(backend: str, x: Tensor, margin: float, scale: float, split_k: bool) -> tuple[Tensor, Tensor]:
    acc, N = _check.accumulator(x.dtype), x.shape[0]
    keeps = keeps_matrix(backend, split_k) and N > 1
    return x.new_empty((), dtype=acc), x.new_empty((N, N) if keeps else 0, dtype=acc)


register(
    Op(
        "negative_distance",
        "contrast",
        reference.negative_distance,
        _fake,
        reference_bwd=reference.negative_distance_bwd,
        fake_bwd=loss_fake_bwd,
        backward=loss_backward,
    )
)
register(
    Op(
        "distance_hinge",
        "contrast",
        reference.distance_hinge,
        _fake_hinge,
        reference_bwd=reference.distance_hinge_bwd,
        fake_bwd=loss_fake_bwd,
        backward=loss_backward,
    )
)
