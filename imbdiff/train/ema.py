"""Exponential moving average of the weights, by name, in float32, with warm-up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """average <- average + (1 - d) (weights - average),  d = min(decay, (1 + step) / (10 + step)).

    The warm-up matters on short runs: with a fixed decay of .9999 the first thousands of steps are mostly the initial
    weights. Buffers and integer tensors are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {
            name: t.detach().to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
            for name, t in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""
        weights = module.state_dict()
        names = [name for name, _ in module.named_parameters()]
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        current = [weights[name].float() for name in names]
        torch._foreach_lerp_([self.tensors[name] for name in names], current, share)
        for name in weights.keys() - set(names):
            self.tensors[name].copy_(weights[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, t in self.tensors.items():
            t.copy_(tensors[name])
