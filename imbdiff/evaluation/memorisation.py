"""Does a class draw new images, or the few it was trained on? Distances in pixel space, [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imbdiff.data.images import ImageSet

CHUNK = 1024


def expected_nearest(distances: Tensor, size: int) -> Tensor:
    """Mean nearest distance [F] over all subsets of `size` out of n candidates, distances [F, n].

    sum_k d_(k) w_k with w_k = C(n-k, size-1) / C(n, size), the chance that the k-th nearest candidate is drawn and no
    nearer one is: w_1 = size/n, w_{k+1} = w_k (n-k-size+1) / (n-k), which no binomial can overflow.
    """
    n = distances.shape[1]
    if not 1 <= size <= n:
        raise ValueError(f"size must lie in 1..{n}, got {size}")
    k = torch.arange(1, n - size + 1, dtype=torch.float64)
    weights = (size / n) * torch.cat([torch.ones(1, dtype=torch.float64), ((n - k - size + 1) / (n - k)).cumprod(0)])
    return distances.sort(1).values[:, : len(weights)] @ weights


def _mean_nearest(fake: Tensor, candidates: Tensor, size: int) -> float:
    """Mean over fake uint8 [F, D] of the distance to the nearest of `size` random candidates uint8 [n, D]."""
    # Pixel values are integers, so this Gram form is exact in float64: a copy has distance zero.
    b = candidates.double()
    total = 0.0
    for part in fake.split(CHUNK):
        a = part.double()
        squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        total += float(expected_nearest(squared.sqrt() / 127.5, size).sum())
    return total / len(fake)


@dataclass(frozen=True)
class Memorisation:
    """Mean distance of a class's generated images to the nearest training and held-out image; nan where left out."""

    to_train: Tensor
    to_held_out: Tensor
    left_out: tuple[int, ...]
    biased_low: tuple[int, ...]

    def ratio(self, classes: Sequence[int]) -> float | None:
        """sum_c to_train_c / sum_c to_held_out_c over classes that have both: 1 is nothing memorised, 0 is copies."""
        used = [c for c in classes if c not in self.left_out]
        below = float(self.to_held_out[used].sum()) if used else 0.0
        return float(self.to_train[used].sum()) / below if below > 0 else None


def memorisation(fake: ImageSet, train: ImageSet, held_out: ImageSet) -> Memorisation:
    """Mean distance to the nearest training image over that to the nearest held-out image, class by class.

    More candidates come nearer, so a class with more held-out images (n) than training images (m), the tail, is
    compared with the mean over all subsets of m held-out images. Classes without fake, training or held-out images are
    `left_out`.
    A class with fewer held-out than training images cannot be evened out that way without hiding copies: it is named in
    `biased_low`.
    """
    classes = fake.num_classes
    to_train, to_held_out = torch.full((2, classes), torch.nan, dtype=torch.float64)
    left_out, biased = [], []
    for c in range(classes):
        f, t, h = (s.images[s.labels == c].flatten(1) for s in (fake, train, held_out))
        if not len(f) or not len(t) or not len(h):
            left_out.append(c)
            continue
        if len(h) < len(t):
            biased.append(c)
        to_train[c] = _mean_nearest(f, t, len(t))
        to_held_out[c] = _mean_nearest(f, h, min(len(t), len(h)))
    return Memorisation(to_train, to_held_out, tuple(left_out), tuple(biased))
