"""Which training image a global sample number gets: a pure function, so a resumed run sees the same data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imbdiff.errors import InputError
from imbdiff.random import permutation, words


class DataOrder:
    """Training order under the class prior n_c^a.

    a = 1 (natural): shuffled epochs without replacement, sample number k is place k mod N of epoch k // N. Otherwise
    each number draws its class from P(c) = n_c^a / sum n^a, then a uniform image of that class. The tables live on the
    device of `labels`, where the keys are expected too.
    """

    def __init__(self, labels: Tensor, counts: Tensor, seed: int, prior_exponent: float = 1.0) -> None:
        if len(labels) == 0 or not torch.equal(torch.bincount(labels, minlength=len(counts)), counts.to(labels)):
            raise InputError(
                f"class counts {counts.tolist()} do not describe the {len(labels)} labels of the training images"
            )
        if not math.isfinite(prior_exponent):
            raise InputError(f"the prior exponent must be finite, got {prior_exponent}: set --data.prior-exponent")
        self.size, self.seed, self.prior_exponent = len(labels), seed, prior_exponent
        self._device = labels.device
        self._counts = counts.to(labels)
        self._by_class = torch.argsort(labels, stable=True)
        self._start = self._counts.cumsum(0) - self._counts
        self._cdf = _prior_cdf(counts.cpu(), prior_exponent).to(labels.device)
        self._permutations: dict[int, Tensor] = {}

    def indices(self, key: Tensor) -> Tensor:
        """[B] int64 places in the training set for the global sample numbers `key` [B] (int64)."""
        return self._epochs(key) if self.prior_exponent == 1 else self._by_prior(key)

    def _epochs(self, key: Tensor) -> Tensor:
        epoch, place = torch.div(key, self.size, rounding_mode="floor"), key % self.size
        out = torch.empty_like(key)
        for e in epoch.unique().tolist():
            mine = epoch == e
            out[mine] = self._permutation(e)[place[mine]]
        return out

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            # A batch straddles two epochs at most in training: older permutations are never asked for again.
            while len(self._permutations) > 1:
                del self._permutations[next(iter(self._permutations))]
            self._permutations[epoch] = permutation(self.seed, f"order/{epoch}", self.size, self._device)
        return self._permutations[epoch]

    def _by_prior(self, key: Tensor) -> Tensor:
        u = words(self.seed, "order/class", key, 1)[:, 0].double() * 2.0**-32
        label = torch.searchsorted(self._cdf, u, right=True)
        # Integer multiply and shift: floor(u n) with u = word / 2^32, which can never reach n.
        image = (words(self.seed, "order/image", key, 1)[:, 0] * self._counts[label]) >> 32
        return self._by_class[self._start[label] + image]


def _prior_cdf(counts: Tensor, exponent: float) -> Tensor:
    """Upper edges of the classes' shares of [0, 1), float64; the last is exactly 1, empty classes have no width."""
    # On the CPU whatever the device, so that the last bit of an edge is the same everywhere.
    logits = torch.where(counts > 0, exponent * counts.double().log(), -torch.inf)
    edges = torch.softmax(logits, 0).cumsum(0)
    return edges / edges[-1]
