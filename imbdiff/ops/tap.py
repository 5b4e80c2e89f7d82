"""A loss on a feature map where it is made: inside a block, read in place, its gradient added on the way back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imbdiff.ops import _backends, _check, contrast, cosine
from imbdiff.ops._op import derive, forward


def _dispersive(x: Tensor, flatten: contrast.Flatten, tau: float, include_self: bool = True) -> tuple[Any, ...]:
    return contrast.negative_distance_arguments(x, flatten, tau, per_dim=True, include_self=include_self)


_ARGUMENTS: dict[str, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    "negative_distance": ("negative_distance", contrast.negative_distance_arguments),
    "dispersive": ("negative_distance", _dispersive),
    "distance_hinge": ("distance_hinge", contrast.distance_hinge_arguments),
    "cosine_contrastive": ("cosine_contrastive", cosine.cosine_contrastive_arguments),
    "supcon": ("supcon", cosine.supcon_arguments),
}
_OPTIONS = {
    kind: {name: p.default is p.empty for name, p in list(inspect.signature(make).parameters.items())[2:]}
    for kind, (_, make) in _ARGUMENTS.items()
}
"""The options of each kind, and whether it must be given."""


def tap_loss(h: Tensor, kind: str, **options: Any) -> tuple[Tensor, Tensor]:
    r"""A contrast loss on h, and h itself, through which the loss's gradient flows back.

        h', loss = tap_loss(h, kind, ...)      h' = h;   dL/dh = dL/dh' + dL/dloss dloss/dh

    Put it into a block, go on with h' and add the loss, scaled as you like, to the others; a loss that is not used
    costs nothing in the backward.

    Args:
        h: [B, ...] features of any layout, float32, float64, bfloat16 or float16.
        kind: "negative_distance", "dispersive" (that with per_dim=True), "distance_hinge", "cosine_contrastive" or
            "supcon".
        options: the keywords of `<kind>_loss`, and `labels` for supcon.

    Returns:
        h' of h's storage, shape and strides, and the loss [] float32 (float64 for float64). Neither h nor h' may be
        changed in place afterwards, which torch notices.

    Raises:
        TypeError, ValueError: an unknown kind or option, or one that is missing; and as the loss.

    Deterministic. Rows are read in the order of memory, so a dense h is not copied in any layout; a channel slice is.
    Under torch.compile one graph. Time and memory of the loss. Equivalent torch code: `h, <kind>_loss(h, **options)`.
    Source: Wang & He 2025, "Diffuse and disperse", for a loss on the tokens of an intermediate block. Used by what taps
    a network: Dispersive, CCUA, CORAL.
    """
    op = "tap_loss"
    if kind not in _ARGUMENTS:
        raise ValueError(f"{op}: kind must be one of {', '.join(map(repr, _ARGUMENTS))}, got {kind!r}")
    known = _OPTIONS[kind]
    for name in options:
        if name not in known:
            raise TypeError(f"{op}: kind {kind!r} takes {', '.join(known)}; got {name}")
    for name, needed in known.items():
        if needed and name not in options:
            raise TypeError(f"{op}: kind {kind!r} needs {name}")
    _check.tensor(op, "h", h, symbols="[B, ...]")
    name, arguments = _ARGUMENTS[kind]
    order = _memory_order(h)
    rest = arguments(h, lambda x: _check.rows(x.permute(order)), **options)
    return _Tap.apply(h, order, name, _backends.choose(name, h), *rest)


def _memory_order(h: Tensor) -> list[int]:
    """The order of dimensions, the first one first, in which the rows of a dense h are dense."""
    return [0, *sorted(range(1, h.ndim), key=lambda d: h.stride()[d], reverse=True)]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, order: list[int], name: str, backend: str, *rest: Any) -> tuple[Tensor, Tensor]:
        loss, *kept = forward(name, backend, (_check.rows(h.permute(order)), *rest))
        tensors = [x for x in rest if isinstance(x, Tensor)]
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.constants, ctx.order = (name, backend), rest[len(tensors) :], order
        ctx.tensors = len(tensors)
        ctx.save_for_backward(h, *tensors, *kept)
        return h.view_as(h), loss

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_loss: Tensor | None) -> Any:
        h, *saved = ctx.saved_tensors
        args = (_check.rows(h.permute(ctx.order)), *saved[: ctx.tensors], *ctx.constants)
        name, backend = ctx.settings
        (own,) = derive(name, backend, ctx.needs_input_grad, (grad_loss,), args, saved[ctx.tensors :])
        grad = grad_h
        if own is not None:
            ordered = h.permute(ctx.order)
            inverse = [ctx.order.index(d) for d in range(h.ndim)]
            own = own.view(ordered.shape).permute(inverse)
            grad = own if grad_h is None else own + grad_h
        return (grad, *[None] * (3 + ctx.tensors + len(ctx.constants)))
