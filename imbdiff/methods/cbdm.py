"""CBDM, class-balancing diffusion models (Qin et al., CVPR 2023).

    y'_i ~ q,  q_c proportional to n_c^a          a second label for each sample, by class frequency
    w_i = tau noise_i                             noise = t/T in ddpm
    L = mean_i base_i
      + mean_i w_i (1/D) |out_i(y_i) - sg[out_i(y'_i)]|^2
      + gamma mean_i w_i (1/D) |sg[out_i(y_i)] - out_i(y'_i)|^2

Samples whose own label was dropped are left out. The released code draws y' by training frequency (law "train"), which
the paper's name does not suggest; "sqrt" and "uniform" are its variants. Each sample's second forward has gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from imbdiff.methods.protocol import Batch, Branch, Method, MethodConfig, Out, Pair, Scalar

LAWS = {"train": 1.0, "sqrt": 0.5, "uniform": 0.0}


@dataclass(frozen=True)
class CBDMConfig(MethodConfig):
    """CBDM: pull the predictions under the true and under another label together."""

    tau: float = 1.0
    """Strength: the weight is tau at pure noise and falls to 0 at clean images."""
    gamma: float = 0.25
    """Gradient scale of the other label's branch (the commitment term)."""
    law: Literal["train", "sqrt", "uniform"] = "train"
    """How the other label is drawn: by class frequency, its square root, or uniformly."""


class CBDM(Method):
    """The paper's regulariser as one pair with gradient scales (1, gamma)."""

    config: CBDMConfig

    def __init__(self, config: CBDMConfig | None = None) -> None:
        super().__init__(config or CBDMConfig())

    def branches(self, batch: Batch) -> Mapping[str, Branch]:
        return {"other": Branch(batch.cond.sample(self.label_law(batch.counts), batch.uniform("cbdm/label")))}

    def label_law(self, counts: Tensor) -> Tensor:
        """[C] probabilities of y'; a class without images is never drawn."""
        law = counts.double().pow(LAWS[self.config.law]) * (counts > 0)
        return law / law.sum()

    def terms(self, batch: Batch, own: Out, out: Mapping[str, Out]) -> Sequence[Pair | Scalar]:
        weight = self.config.tau * batch.noise * ~batch.dropped
        gamma = self.config.gamma
        return [Pair("reg", "other", weight, g_own=1.0, g_other=gamma, value=1.0 + gamma)]
