"""One number for each sample, shaped so that it multiplies images."""

from __future__ import annotations

from torch import Tensor


def expand(v: Tensor | float, x: Tensor) -> Tensor | float:
    """[B] -> [B, 1, ..., 1] with as many axes as `x`; a plain number, the same for all samples, passes through."""
    if not isinstance(v, Tensor):
        return v
    # A wrong length would broadcast silently along the batch or, with [B] against [B, B], along the wrong axis.
    if v.shape != x.shape[:1]:
        raise ValueError(f"expected one number for each sample, shape {list(x.shape[:1])}, got {list(v.shape)}")
    return v.view(-1, *[1] * (x.ndim - 1))
