"""Classifier-free guidance (Ho & Salimans 2022), in one convention.

    guided = null + guidance_scale * (cond - null)

Two conventions circulate, and they differ by one: guidance_scale = 1 + omega.

| name                | formula                       | unguided | typical   | used by                           |
|---------------------|-------------------------------|----------|-----------|-----------------------------------|
| guidance_scale, s   | null + s * (cond - null)      | 1        | 1.5 - 7.5 | DiT, SiT, diffusers; here         |
| omega, w            | cond + omega * (cond - null)  | 0        | 0.8 - 2.0 | CBDM, OC, CCUA-DDPM, CORAL, CM    |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from imbdiff.models.types import Cond


def guide(cond: Tensor, null: Tensor, guidance_scale: float, channels: int | None = None) -> Tensor:
    """guided = null + guidance_scale * (cond - null), in float32 (float64 for float64): [B, C, ...] -> [B, C, ...].

    With `channels` only the first so many are guided and the others are those of `cond`: the sampler released with DiT
    guides 3 of 4, and learned-variance channels must not be guided. Low precision is widened first, because the
    difference of two close predictions is multiplied by the scale.
    """
    if cond.shape != null.shape:
        raise ValueError(f"cond and null must have one shape, got {list(cond.shape)} and {list(null.shape)}")
    _check(guidance_scale)
    if channels is not None and not 1 <= channels <= cond.shape[1]:
        raise ValueError(f"channels must be 1..{cond.shape[1]} or None, got {channels}")
    wide = torch.promote_types(cond.dtype, torch.float32)
    cond, null = cond.to(wide), null.to(wide)
    if guidance_scale == 1:
        return cond
    if channels is None or channels == cond.shape[1]:
        return null + guidance_scale * (cond - null)
    head, null = cond[:, :channels], null[:, :channels]
    return torch.cat([null + guidance_scale * (head - null), cond[:, channels:]], 1)


def guided(
    model: Callable[[Tensor, Tensor, Any], Tensor],
    cond: Cond,
    null: Cond,
    guidance_scale: float,
    channels: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`model(x_t, t, cond)` with the conditions filled in and guidance applied: a function (x_t, t) -> prediction.

    Both halves go through one forward of 2B rows; at scale 1 the null half is left out.
    """
    if len(cond) != len(null):
        raise ValueError(f"one null condition for each condition is needed, got {len(null)} for {len(cond)}")
    _check(guidance_scale)

    def plain(x_t: Tensor, t: Tensor) -> Tensor:
        return model(x_t, t, cond)

    both = cond.cat([null])

    def stacked(x_t: Tensor, t: Tensor) -> Tensor:
        out = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        own, without = out.chunk(2)
        return guide(own, without, guidance_scale, channels)

    return plain if guidance_scale == 1 else stacked


def _check(guidance_scale: float) -> None:
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number (1 is unguided), got {guidance_scale}")
