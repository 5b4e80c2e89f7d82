"""Losses on the cosines between the rows of a batch of features: the other half of the family `contrast`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imbdiff.ops import _backends, _check
from imbdiff.ops._op import Op, call, register
from imbdiff.ops.contrast import (
    Flatten,
    few_and_wide,
    keeps_matrix,
    loss_backward,
    loss_fake_bwd,
    negative_rows,
    width,
)
from imbdiff.ops.reference import contrast as reference


def cosine_contrastive_loss(
    x: Tensor,
    *,
    tau: float = 0.1,
    weight: Tensor | None = None,
    include_self: bool = True,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""InfoNCE of a batch with itself: the cosines of each row with all others, as large as its own is small.

        s_ij = cos(x_i, y_j) / tau                                    y: the rows of x, then the negatives
        loss = (1/N) sum_i w_i [ log sum_j exp(s_ij) - 1/tau ]        j = i included, s_ii = 1/tau; in [0, log(N + M)]
        loss = (1/N) sum_i w_i [ log sum_(j != i) exp(s_ij) - log(N + M - 1) ]             without include_self

    Args:
        x: [N, ...] features, float32, float64, bfloat16 or float16; flattened to rows of D.
        tau: temperature, positive and finite.
        weight: [N], t/T in CCUA; a constant.
        include_self: count each row as its own positive, as CCUA does. The loss is then nearly 0, and so is its
            gradient, once cosines fall below 0.3.
        negatives: [M, ...] further rows to be pushed away from; constants.

    Returns:
        [] float32 (float64 for float64). N = 0, or a row with no other to compare with, gives 0 and zero gradient.
        A row of norm at most 1e-12 has cosine 0 with every other and no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape, dtype or value; the message names it.

    Deterministic. Computed relative to 1/tau, the largest logit, so nothing overflows and small losses keep their
    digits. Time and memory as `negative_distance_loss`. Equivalent torch code: `imbdiff/ops/reference/contrast.py`.
    Source: CCUA (arXiv 2507.09052, 2025), the unsupervised contrastive loss; without self terms Wang & Isola 2020,
    "Alignment and uniformity", on the sphere. Used by CCUA.
    """
    rest = cosine_contrastive_arguments(x, _check.rows, tau, weight, include_self, negatives)
    return call("cosine_contrastive", _backends.choose("cosine_contrastive", x), _check.rows(x), *rest)[0]


def cosine_contrastive_arguments(
    x: Tensor,
    flatten: Flatten,
    tau: float = 0.1,
    weight: Tensor | None = None,
    include_self: bool = True,
    negatives: Tensor | None = None,
) -> tuple[Any, ...]:
    """The operation's arguments after the rows, checked."""
    op = "cosine_contrastive_loss"
    _check.tensor(op, "x", x, symbols="[N, ...]")
    _check.positive(op, "tau", tau)
    others = negative_rows(op, x, negatives, flatten)
    split_k = few_and_wide(len(x), len(others), width(x))
    return others, _check.row_weight(op, weight, x), float(tau), include_self, split_k


def supcon_loss(x: Tensor, labels: Tensor, *, tau: float = 0.1, weight: Tensor | None = None) -> Tensor:
    r"""Supervised contrastive loss: rows of one label together, all others apart.

        s_ij = cos(x_i, x_j) / tau,   P(i) = the other rows with i's label
        l_i  = log sum_(j != i) exp(s_ij) - 1/|P(i)| sum_(p in P(i)) s_ip
        loss = sum over anchors of w_i l_i / number of anchors                   anchors: the rows with P(i) not empty

    Args:
        x: [N, ...] features, float32, float64, bfloat16 or float16; flattened to rows of D.
        labels: [N] int64.
        tau: temperature, positive and finite.
        weight: [N]; a constant. It does not change the number of anchors.

    Returns:
        [] float32 (float64 for float64). No anchor gives 0 and zero gradient. A row of norm at most 1e-12 has cosine 0
        with every other and no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape, dtype or value; the message names it.

    Deterministic. Time and memory as `negative_distance_loss`. Equivalent torch code:
    `imbdiff/ops/reference/contrast.py`.
    Source: Khosla et al. 2020, "Supervised contrastive learning", L_out (eq. 2). Used by CORAL.
    """
    rest = supcon_arguments(x, _check.rows, labels, tau, weight)
    return call("supcon", _backends.choose("supcon", x), _check.rows(x), *rest)[0]


def supcon_arguments(
    x: Tensor, flatten: Flatten, labels: Tensor, tau: float = 0.1, weight: Tensor | None = None
) -> tuple[Any, ...]:
    op = "supcon_loss"
    _check.tensor(op, "x", x, symbols="[N, ...]")
    _check.tensor(op, "labels", labels, x.shape[:1], "[N]", like=x, dtypes=(torch.int64,))
    split_k = few_and_wide(len(x), 0, width(x))
    return labels.contiguous(), _check.row_weight(op, weight, x), _check.positive(op, "tau", tau), split_k


def _fake(
    backend: str, x: Tensor, negatives: Tensor, weight: Tensor, tau: float, include_self: bool, split_k: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(backend, x, negatives.shape[0], split_k)


def _fake_supcon(
    backend: str, x: Tensor, labels: Tensor, weight: Tensor, tau: float, split_k: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(backend, x, 0, split_k)


def _outputs(backend: str, x: Tensor, M: int, split_k: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, lse, and where it is kept the matrix, below it rows: the lengths, and on a CPU what rows were scaled by."""
    acc, N = _check.accumulator(x.dtype), x.shape[0]
    below = 2 if backend == "cpu" else 1
    keeps = keeps_matrix(backend, split_k) and N > 0 and N + M > 1
    saved = x.new_empty((N + below, N + M) if keeps else 0, dtype=acc)
    return x.new_empty((), dtype=acc), x.new_empty(N, dtype=acc), saved


register(
    Op(
        "cosine_contrastive",
        "contrast",
        reference.cosine_contrastive,
        _fake,
        reference_bwd=reference.cosine_contrastive_bwd,
        fake_bwd=loss_fake_bwd,
        backward=loss_backward,
    )
)
register(
    Op(
        "supcon",
        "contrast",
        reference.supcon,
        _fake_supcon,
        reference_bwd=reference.supcon_bwd,
        fake_bwd=loss_fake_bwd,
        backward=loss_backward,
    )
)
