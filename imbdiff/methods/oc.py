"""OC, oriented calibration of long-tailed diffusion models (Zhang et al., ICLR 2024), also "T2H".

    z_i ~ softmax_j( -|x_t,i - signal_i x0_j|^2 / (2 sigma_i^2) )       one draw over the batch
    keep z_i where the gate allows (t2h: n_{y_z} >= n_{y_i}), else z_i = i
    target_i = the native target of x0_{z_i} under the same x_t

One forward; the network's input and its label stay the sample's own. Dropped samples are transferred too, gated by
their true labels. "soft" averages the clean images instead of drawing one (stable target field, Xu et al. 2023),
without a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from imbdiff import ops
from imbdiff.errors import InputError
from imbdiff.methods.protocol import Batch, Method, MethodConfig


@dataclass(frozen=True)
class OCConfig(MethodConfig):
    """OC: regress to another clean image of the batch that could have produced x_t. weight is 0 (off) or 1 (on)."""

    transfer: Literal["t2h", "h2t", "full", "soft"] = "t2h"
    """Which transfers are kept: towards frequent classes, towards rare ones, all; or the posterior mean."""
    max_noise: float = 1.0
    """Transfer only where the noise level is below this (the paper's best window ends at 0.8)."""


class OC(Method):
    """Names another clean image as the regression target."""

    config: OCConfig

    def __init__(self, config: OCConfig | None = None) -> None:
        super().__init__(config or OCConfig())
        if self.weight not in (0, 1):
            raise InputError(
                f"oc replaces the regression target, so its weight is 0 (off) or 1 (on), got {self.weight}; "
                "use --oc.max-noise to limit where it acts"
            )

    def x0_target(self, batch: Batch) -> Tensor:
        transfer, bank = self.config.transfer, (batch.x_t, batch.x0, batch.signal, batch.sigma)
        if transfer == "soft":
            other = ops.posterior_mean(*bank)
        else:
            counts = batch.counts[batch.group]
            own = torch.arange(len(batch.t), device=batch.t.device)
            u = batch.uniform("oc/draw")
            z = ops.posterior_draw(*bank, u, own=own, counts_x=counts, counts_bank=counts, gate=transfer)
            other = batch.x0[z]
        return torch.where((batch.noise < self.config.max_noise).view(-1, 1, 1, 1), other, batch.x0)
