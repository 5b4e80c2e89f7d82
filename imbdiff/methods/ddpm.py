"""The plain baseline: no remedy.

    L = mean_i (1/D) |prediction_i - target_i|^2

The base loss belongs to the trainer, so this method adds nothing; it is here to be named.
Source: Ho et al. 2020, eq. 14; for the flow path Ma et al. 2024 (SiT), eq. 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from imbdiff.methods.protocol import Method, MethodConfig


@dataclass(frozen=True)
class DDPMConfig(MethodConfig):
    """The plain baseline has no settings of its own."""


class DDPM(Method):
    """Adds no branch and no term."""
