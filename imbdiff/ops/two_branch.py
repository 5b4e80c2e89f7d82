"""The base regression loss and K signed comparisons with other branches, as one operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imbdiff.ops import _backends, _check
from imbdiff.ops._op import Op, call, register, wanted
from imbdiff.ops.reference import two_branch as reference

_OP = "two_branch_loss"


def two_branch_loss(
    own: Tensor,
    target: Tensor,
    others: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    scales: Tensor | None = None,
    margin: Sequence[float | None] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Per-sample regression loss and K weighted distances to other branches, each with its own gradient scales.

        base_i   = (1/D) sum_d (own_id - target_id)^2
        d_ki     = (1/D) sum_d (own_id - other_kid)^2
        f_ki     = weight_ki d_ki                          pull (margin_k None)
                 = weight_ki max(0, margin_k - d_ki)       hinge push
        terms_ki = value_k f_ki                            the gradient of which is *defined* as
        d terms_ki / d own   = g_own_k   df_ki/dd_ki  2 (own_i - other_ki) / D
        d terms_ki / d other = g_other_k df_ki/dd_ki  2 (other_ki - own_i) / D

    Value and gradients are scaled apart from each other because the published losses are stop-gradient constructions:
    CBDM is g = (1, 1/4) with value 5/4, alignment g = (1, 1) with value 1, PoGDiff g = (1, 0), DiffROP a hinge push.

    Args:
        own: [B, ...] prediction, float32, float64, bfloat16 or float16.
        target: like own; a constant.
        others: K >= 0 tensors like own. One that needs no gradient may simply be detached.
        weight: [K, B] float; a constant. May be left out when K = 0, as may `scales`.
        scales: [K, 3] float, rows (g_own, g_other, value); a constant.
        margin: K positive numbers or None (pull), or None when all are pulls.

    Returns:
        base [B] and terms [K, B], float32 (float64 for float64 inputs). Take means and add them as you like.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape, dtype or value; the message names it.

    Deterministic. Low-precision inputs are read as they are and subtracted in float32. Time K B D, memory O(K B).
    Equivalent torch code: `imbdiff/ops/reference/two_branch.py`. Used by the step of every method.
    Source: Qin et al. 2023 (CBDM), eq. 8, for the split gradient; the other methods in docs/methods.md.
    """
    _check.tensor(_OP, "own", own, symbols="[B, ...]")
    others = list(others)
    K, B = len(others), own.shape[0]
    _check.constant(_OP, "target", _check.same(_OP, "target", target, "own", own))
    for k, other in enumerate(others):
        _check.same(_OP, f"others[{k}]", other, "own", own)
    if weight is None or scales is None:
        if K:
            raise ValueError(f"{_OP}: weight [K, B] and scales [K, 3] are needed for K = {K} others, got None")
        weight, scales = own.new_zeros(0, B), own.new_zeros(0, 3)
    _check.constant(_OP, "weight", _check.tensor(_OP, "weight", weight, (K, B), "[K, B]", like=own))
    _check.constant(_OP, "scales", _check.tensor(_OP, "scales", scales, (K, 3), "[K, 3]", like=own))
    acc = _check.accumulator(own.dtype)
    small = (_check.small(weight, acc), _check.small(scales, acc), _margins(margin, K))
    rows = [_check.rows(x) for x in others]
    base, terms = call(
        "two_branch", _backends.choose("two_branch", own, K), _check.rows(own), _check.rows(target), rows, *small
    )
    return base, terms


def _margins(margin: Sequence[float | None] | None, K: int) -> list[float]:
    """K numbers, 0 for a pull."""
    if margin is None:
        return [0.0] * K
    if len(margin) != K:
        raise ValueError(f"{_OP}: margin must have K = {K} entries, one for each of others, got {len(margin)}")
    for k, m in enumerate(margin):
        if m is not None and not (math.isfinite(m) and m > 0):
            raise ValueError(f"{_OP}: margin[{k}] must be a positive finite number or None (pull), got {m!r}")
    # A margin that rounds to 0 would turn the push into a pull.
    return [0.0 if m is None else max(float(m), torch.finfo(torch.float32).tiny) for m in margin]


def _fake(
    backend: str,
    own: Tensor,
    target: Tensor,
    others: Sequence[Tensor],
    weight: Tensor,
    scales: Tensor,
    margin: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    acc, B, K = _check.accumulator(own.dtype), own.shape[0], len(others)
    return own.new_empty(B, dtype=acc), own.new_empty(K, B, dtype=acc), own.new_empty(K, B, dtype=acc)


def _fake_bwd(
    grad_base: Tensor,
    grad_terms: Tensor,
    own: Tensor,
    target: Tensor,
    others: Sequence[Tensor],
    weight: Tensor,
    scales: Tensor,
    margin: Sequence[float],
    distance: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    grads = [own.new_empty(own.shape if need else (0,)) for need in needs]
    return grads[0], grads[1:]


def _backward(
    bwd: Callable[..., Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    saved: Sequence[Tensor],
) -> list[Tensor | None]:
    distance, (grad_base, grad_terms) = saved[0], grads
    needs = [needs[0], *needs[2 : 2 + len(inputs[2])]]
    # What was not used downstream has no gradient; what is a mean has an expanded one.
    base = distance.new_zeros(distance.shape[1]) if grad_base is None else grad_base.contiguous()
    terms = torch.zeros_like(distance) if grad_terms is None else grad_terms.contiguous()
    grad_own, grad_others = bwd(base, terms, *inputs, distance, needs)
    first, *rest = wanted([grad_own, *grad_others], needs)
    return [first, None, *rest]


register(
    Op(
        "two_branch",
        "two_branch",
        reference.two_branch,
        _fake,
        outputs=2,
        reference_bwd=reference.two_branch_bwd,
        fake_bwd=_fake_bwd,
        backward=_backward,
    )
)
