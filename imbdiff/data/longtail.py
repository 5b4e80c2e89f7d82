"""Long-tailed cuts of a balanced set by the published protocol (LDAM, used by CBDM and its successors).

    n_k = int(n_max * (1/ratio)^(k/(C-1))),  k = rank of the class,  n_max = N / C, not rounded

Of each class, in class order, the images in file order are shuffled in place by one shared stream and the first n_k are
kept. Only this order of draws gives the same images as the papers, hence the stream is numpy's legacy RandomState.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imbdiff.data.config import Profile
from imbdiff.errors import InputError


def long_tail_counts(n_max: float, num_classes: int, ratio: float, profile: Profile) -> list[int]:
    """Images of each class from most to least frequent; the step profile gives the odd class to the rare half."""
    if profile not in ("exponential", "step"):
        raise InputError(f"profile {profile!r} has no class counts of its own: expected 'exponential' or 'step'")
    if not (math.isfinite(ratio) and ratio >= 1):
        raise InputError(f"the imbalance ratio n_max/n_min must be a finite number >= 1, got {ratio}: set --data.ratio")
    if num_classes == 1:
        return [int(n_max)]
    if profile == "step":
        head = num_classes // 2
        return [int(n_max)] * head + [int(n_max / ratio)] * (num_classes - head)
    # (1/ratio)^..., not ratio^-...: the published code multiplies by this factor, and int() sees the last bit.
    return [int(n_max * (1 / ratio) ** (k / (num_classes - 1))) for k in range(num_classes)]


def ranked_classes(num_classes: int, class_order: Sequence[int] = (), rotate: int = 0) -> tuple[int, ...]:
    """Classes from most to least frequent: `class_order` (empty: label order), rotated left by `rotate` places."""
    order = tuple(class_order) or tuple(range(num_classes))
    if sorted(order) != list(range(num_classes)):
        raise InputError(
            f"the class order must name each class 0..{num_classes - 1} once, got {order}: set --data.class-order"
        )
    shift = rotate % num_classes
    return order[shift:] + order[:shift]


def long_tail_indices(
    labels: Tensor,
    num_classes: int,
    *,
    ratio: float,
    profile: Profile,
    class_order: Sequence[int] = (),
    seed: int = 0,
    class_names: Sequence[str] = (),
) -> Tensor:
    """Positions (int64) of the kept images, classes one after another in class order.

    A class with fewer images than its n_k keeps them all. The profile "given" keeps every image in file order. Raises
    InputError where a class would be left without an image: nothing could be learned of it.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"the split seed must lie in 0..2^32-1, got {seed}: set --data.split-seed")
    order = ranked_classes(num_classes, class_order)
    names = [f"{c} ({class_names[c]})" if class_names else str(c) for c in range(num_classes)]
    available = torch.bincount(labels, minlength=num_classes).tolist()
    if 0 in available:
        raise InputError(
            f"the data has no image of class {names[available.index(0)]}: every class needs at least one; "
            "add images or number the classes without gaps"
        )
    if profile == "given":
        return torch.arange(len(labels))
    n_max = len(labels) / num_classes
    planned = long_tail_counts(n_max, num_classes, ratio, profile)
    if 0 in planned:
        raise InputError(
            f"imbalance ratio {ratio:g} leaves no image of class {names[order[planned.index(0)]]} "
            f"(the largest class has {int(n_max)}): the largest ratio that keeps one image of every class is "
            f"{_largest_ratio(n_max):.10g}; set --data.ratio"
        )
    numpy_labels, stream, kept = labels.cpu().numpy(), np.random.RandomState(seed), []
    for label, count in zip(order, planned, strict=True):
        positions = np.flatnonzero(numpy_labels == label)
        stream.shuffle(positions)
        kept.append(positions[:count])
    return torch.from_numpy(np.concatenate(kept).astype(np.int64))


def _largest_ratio(n_max: float) -> float:
    """The largest ratio, rounded down to hundredths, at which the rarest class keeps an image."""
    limit = math.floor(n_max * 100) / 100
    # n (1/n) can round to just below 1 (n = 49 is the first), where int() gives 0.
    return limit if n_max * (1 / limit) >= 1 else limit - 0.01


def split_hash(indices: Tensor, labels: Tensor) -> str:
    """SHA-256 (hex) of a split: the little-endian int64 bytes of its indices, then of its labels."""
    digest = hashlib.sha256()
    for part in (indices, labels):
        digest.update(part.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
