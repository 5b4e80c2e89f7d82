"""The learning rate as a function of images seen: there is no scheduler to save."""

from __future__ import annotations

import math


def learning_rate(images: int, *, peak: float, warmup: int, total: int, schedule: str) -> float:
    """Linear warm-up over `warmup` images to `peak`, then constant, or a cosine to zero at `total` images."""
    if images < warmup:
        return peak * images / warmup
    if schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * min(1.0, (images - warmup) / max(1, total - warmup)))) / 2
