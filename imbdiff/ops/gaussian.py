"""How far diagonal Gaussians lie from each other, all pairs at once, and a loss that pushes overlapping ones apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from imbdiff.ops import _backends, _check
from imbdiff.ops._gaussians import logvar, refuse_what_does_not_fit
from imbdiff.ops._op import Op, call, register, wanted
from imbdiff.ops.reference import gaussian as reference

Kind = Literal["kl", "jeffreys", "bhattacharyya"]


def gaussian_divergence(
    mean_p: Tensor, logvar_p: Tensor | float, mean_q: Tensor, logvar_q: Tensor | float, kind: Kind = "kl"
) -> Tensor:
    r"""The divergence of every Gaussian P_i = N(mu_i, diag e^(l_i)) from every Q_j = N(nu_j, diag e^(k_j)).

        kl             1/2 sum_d [ k - l + e^(l - k) + (mu - nu)^2 e^(-k) - 1 ]          P relative to Q
        jeffreys       kl(P, Q) + kl(Q, P)
        bhattacharyya  1/2 sum_d [ (mu - nu)^2 / (4 S) + ln S - (l + k)/2 ]      S = (e^l + e^k)/2;  its e^(-D_B) is the
                                                                                 overlap coefficient BC
    Args:
        mean_p: [..., N, D] float32, float64, bfloat16 or float16.
        logvar_p: log-variances like mean_p, or [..., N, 1] or a scalar for isotropic ones.
        mean_q, logvar_q: [..., M, D] alike, with the leading sizes and the dtype of mean_p.
        kind: which divergence.

    Returns:
        [..., N, M] float32 (float64 for float64). Differentiable in all four.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape, dtype or value; the message names it.
        ValueError: a matrix that would not fit into memory.

    Deterministic. Pairs that nearly agree keep their digits: |error| <= 1e-4 (1 + KL) in float32. Log-variances are not
    clamped; an overflow gives inf. Time L N M D, memory of the matrix.
    Equivalent torch code: `torch.distributions.kl_divergence` of the broadcast [..., N, M, D] Gaussians, summed over D;
    `imbdiff/ops/reference/gaussian.py`. Source: Kailath 1967, "The divergence and Bhattacharyya distance measures in
    signal selection". Used by DiffROP and by the overlap of classes as a diagnostic.
    """
    op = "gaussian_divergence"
    mean_p, mean_q = _means(op, mean_p, mean_q)
    chosen = _check.choice(op, "kind", kind, reference.KINDS)
    spread_p = logvar(op, "logvar_p", logvar_p, "mean_p", mean_p)
    spread_q = logvar(op, "logvar_q", logvar_q, "mean_q", mean_q)
    *leading, N, _ = mean_p.shape
    L, M = math.prod(leading), mean_q.shape[-2]
    stored = [x.reshape(L, *x.shape[-2:]) for x in (mean_p, spread_p, mean_q, spread_q)]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in stored)
    instead = "gaussian_overlap_loss reduces over the pairs without storing them"
    refuse_what_does_not_fit(op, (*leading, N, M), mean_p, 1 + differentiable, instead)
    (out,) = call(op, _backends.choose(op, mean_p), *stored, chosen)
    return out.view(*leading, N, M)


def gaussian_overlap_loss(
    mean_p: Tensor,
    logvar_p: Tensor | float,
    mean_q: Tensor | None = None,
    logvar_q: Tensor | float | None = None,
    *,
    kind: Kind = "kl",
    form: Literal["hinge", "reciprocal"] = "hinge",
    margin: float | None = None,
    per_dim: bool = False,
    pairs: Literal["different", "same", "all"] | None = None,
    labels_p: Tensor | None = None,
    labels_q: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    r"""A loss on pairs of Gaussians that lie close together, without the matrix of all pairs.

        d_ij = divergence_ij                                                              / D with per_dim
        f    = max(0, margin - d_ij)        hinge: no gradient from pairs that are margin apart
             = 1 / (1 + d_ij)               reciprocal
        loss = sum over the selected pairs of weight_i f(d_ij), over their number for "mean"

    Args:
        mean_p: [N, D] float32, float64, bfloat16 or float16.
        logvar_p: log-variances like mean_p, or [N, 1] or a scalar for isotropic ones.
        mean_q, logvar_q: [M, D] alike; None: the Gaussians p themselves, where no i is paired with itself.
        kind: as in `gaussian_divergence`.
        form: hinge or reciprocal.
        margin: positive, for the hinge only. There is no default: the scale of d depends on D and on the variances.
        per_dim: divide divergences by D.
        pairs: "different" or "same" labels, or "all"; by default "different" with labels, and "all" with a mask.
        labels_p, labels_q: [N], [M] int64; labels_q only with mean_q.
        mask: [N, M] bool instead of labels: the pairs that count.
        weight: [N] for the rows of p; a constant.
        reduction: "mean" over the selected pairs, or "sum".

    Returns:
        [] float32 (float64 for float64). No selected pair gives 0 and zero gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, device, rank, shape, dtype or value; the message names it.

    Deterministic. Pairs near the margin keep their digits as in `gaussian_divergence`. Time N M D, memory O((N + M) D):
    where a gradient is wanted the forward makes it too, and keeps it for the backward.
    Equivalent torch code: the formula over `gaussian_divergence`; `imbdiff/ops/reference/gaussian.py`.
    Source: DiffROP (arXiv 2402.10821, 2024) for the hinge; its port in CCUA (arXiv 2507.09052) for the reciprocal.
    Used by DiffROP.
    """
    op = "gaussian_overlap_loss"
    _check.tensor(op, "mean_p", mean_p, (None, None), "[N, D]")
    if (mean_q is None) != (logvar_q is None):
        raise ValueError(f"{op}: mean_q and logvar_q come together or not at all")
    p = (_check.rows(mean_p), logvar(op, "logvar_p", logvar_p, "mean_p", mean_p))
    same_set, q = mean_q is None, p
    if mean_q is not None and logvar_q is not None:
        _, mean_q = _means(op, mean_p, mean_q)
        q = (mean_q, logvar(op, "logvar_q", logvar_q, "mean_q", mean_q))
    labels = _labels(op, labels_p, labels_q, p[0], q[0], same_set)
    if mask is not None:
        _check.tensor(op, "mask", mask, (len(p[0]), len(q[0])), "[N, M]", like=mean_p, dtypes=(torch.bool,))
    selection = _selection(op, pairs, labels_p is not None, mask is not None)
    if selection == reference.PAIRS.index("all"):
        labels = (mean_p.new_empty(0, dtype=torch.int64),) * 2
    out = call(
        "gaussian_overlap",
        _backends.choose("gaussian_overlap", mean_p),
        *p,
        *q,
        *labels,
        mean_p.new_empty(0, 0, dtype=torch.bool) if mask is None else mask.contiguous(),
        _check.row_weight(op, weight, mean_p),
        _check.choice(op, "kind", kind, reference.KINDS),
        _check.choice(op, "form", form, reference.FORMS),
        _margin(op, form, margin),
        1 / max(mean_p.shape[1], 1) if per_dim else 1.0,
        selection,
        _check.choice(op, "reduction", reduction, ("sum", "mean")) == 1,
        same_set,
        [torch.is_grad_enabled() and x.requires_grad for x in (*p, *q)],
    )
    return out[0]


def _means(op: str, mean_p: Tensor, mean_q: Tensor) -> tuple[Tensor, Tensor]:
    _check.tensor(op, "mean_p", mean_p, symbols="[..., N, D]")
    if mean_p.ndim < 2:
        raise ValueError(f"{op}: mean_p must be [..., N, D], got {_check.describe(mean_p)}")
    shape = (*mean_p.shape[:-2], None, mean_p.shape[-1])
    _check.tensor(op, "mean_q", mean_q, shape, "[..., M, D] with mean_p's other sizes", like=mean_p)
    _check.same_dtype(op, "mean_p", mean_p, "mean_q", mean_q)
    dense = [x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous() for x in (mean_p, mean_q)]
    return dense[0], dense[1]


def _margin(op: str, form: str, margin: float | None) -> float:
    if form == "reciprocal":
        if margin is not None:
            raise ValueError(f"{op}: margin belongs to form 'hinge', got {margin!r} with form 'reciprocal'")
        return 0.0
    if margin is None:
        raise ValueError(f"{op}: the hinge needs a margin; there is no default, because d grows with D")
    return _check.positive(op, "margin", margin)


def _labels(
    op: str, labels_p: Tensor | None, labels_q: Tensor | None, p: Tensor, q: Tensor, same_set: bool
) -> tuple[Tensor, Tensor]:
    if labels_q is not None and (same_set or labels_p is None):
        raise ValueError(f"{op}: labels_q are the labels of mean_q beside labels_p, and one of those two is None")
    if labels_p is not None and labels_q is None and not same_set:
        raise ValueError(f"{op}: labels_q [M] must come with labels_p where mean_q is given")
    if labels_p is None:
        return (p.new_empty(0, dtype=torch.int64),) * 2
    _check.tensor(op, "labels_p", labels_p, (len(p),), "[N]", like=p, dtypes=(torch.int64,))
    labels_q = labels_p if labels_q is None else labels_q
    _check.tensor(op, "labels_q", labels_q, (len(q),), "[M]", like=p, dtypes=(torch.int64,))
    return labels_p.contiguous(), labels_q.contiguous()


def _selection(op: str, pairs: str | None, labelled: bool, masked: bool) -> int:
    if labelled and masked:
        raise ValueError(f"{op}: labels and mask both select pairs; pass one of them")
    if pairs is None:
        if not (labelled or masked):
            raise ValueError(f"{op}: which pairs? Pass labels_p, or a mask, or pairs='all'")
        pairs = "different" if labelled else "all"
    selection = _check.choice(op, "pairs", pairs, reference.PAIRS)
    if pairs != "all" and not labelled:
        raise ValueError(f"{op}: pairs={pairs!r} compares labels; pass labels_p (and labels_q with mean_q)")
    return selection


def _fake_divergence(
    backend: str, mean_p: Tensor, logvar_p: Tensor, mean_q: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    (L, N, _), M, acc = mean_p.shape, mean_q.shape[1], _check.accumulator(mean_p.dtype)
    return mean_p.new_empty(L, N, M, dtype=acc), mean_p.new_empty((L, N + M) if backend == "cpu" else 0, dtype=acc)


def _fake_overlap(backend: str, *args: Any) -> tuple[Tensor, ...]:
    acc = _check.accumulator(args[0].dtype)
    shapes = [x.shape if need else (0,) for x, need in zip(args[:4], args[-1], strict=True)]
    return tuple(args[0].new_empty(shape, dtype=acc) for shape in [(), (), *shapes])


def _fake_bwd(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    pairs = zip(args[:4], args[-1], strict=True)
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in pairs)


def _backward(
    bwd: Callable[..., Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    saved: Sequence[Tensor],
) -> list[Tensor | None]:
    (grad,), four = grads, list(needs[:4])
    if grad is None:
        return [None] * 4
    return wanted(bwd(grad.contiguous(), *inputs, *saved, four), four)


def _overlap_backward(
    bwd: None,
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    saved: Sequence[Tensor],
) -> list[Tensor | None]:
    """The forward made the slopes, since one pass over the pairs serves both: here they are scaled."""
    (grad,), (normalizer, *slopes) = grads, saved
    if grad is None:
        return [None] * 4
    factor = grad / normalizer
    four = zip(inputs[:4], slopes, needs[:4], strict=True)
    return [(factor * slope).to(x.dtype) if need else None for x, slope, need in four]


register(
    Op(
        "gaussian_divergence",
        "gaussian",
        reference.gaussian_divergence,
        _fake_divergence,
        keeps_all=True,
        reference_bwd=reference.gaussian_divergence_bwd,
        fake_bwd=_fake_bwd,
        backward=_backward,
    )
)
register(
    Op(
        "gaussian_overlap",
        "gaussian",
        reference.gaussian_overlap,
        _fake_overlap,
        backward=_overlap_backward,
    )
)
