"""From a range of global sample numbers to a noised batch, as a pure function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imbdiff import random
from imbdiff.data import DataOrder, ImageSet, to_unit
from imbdiff.diffusion import Path
from imbdiff.methods import Batch
from imbdiff.models.types import LabelCond


@dataclass(frozen=True)
class BatchSource:
    """Training images on the device, and everything that turns sample numbers into a batch."""

    images: ImageSet
    order: DataOrder
    path: Path
    counts: Tensor
    seed: int
    drop_prob: float
    drop_scope: str
    flip: bool

    def batch(self, step: int, key: Tensor) -> Batch:
        """The samples numbered `key` [B], all part of step `step`."""
        index = self.order.indices(key)
        x0 = to_unit(self.images.images[index])
        if self.flip:
            x0 = torch.where((self._uniform("flip", key) < 0.5).view(-1, 1, 1, 1), x0.flip(-1), x0)
        labels = self.images.labels[index]
        t = self.path.time(self._uniform("time", key))
        signal, sigma, noise = self.path.coefficients(t)
        eps = random.normal(self.seed, "noise", key, tuple(x0.shape[1:]))
        # Dropping per batch is keyed by the step, so that every process drops the same batches.
        drop_key = key if self.drop_scope == "sample" else torch.full_like(key, step)
        return Batch(
            x0=x0,
            eps=eps,
            x_t=self.path.add_noise(x0, eps, signal, sigma),
            t=t,
            signal=signal,
            sigma=sigma,
            noise=noise,
            cond=LabelCond(labels),
            null=LabelCond(torch.full_like(labels, self.images.num_classes)),
            dropped=self._uniform("drop", drop_key) < self.drop_prob,
            group=labels,
            counts=self.counts,
            seed=self.seed,
            key=key,
        )

    def _uniform(self, stream: str, key: Tensor) -> Tensor:
        return random.uniform(self.seed, stream, key)
