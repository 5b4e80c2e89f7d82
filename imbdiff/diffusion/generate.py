"""Labelled images from a network: the same function draws previews, samples and what is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from imbdiff import random
from imbdiff.data import to_uint8
from imbdiff.diffusion.guidance import guided
from imbdiff.diffusion.paths import Path
from imbdiff.diffusion.samplers import SAMPLERS, check_sampler, sample
from imbdiff.errors import InputError
from imbdiff.models.types import Cond, LabelCond


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn."""

    sampler: str = "auto"
    """auto: ddim on the ddpm path, heun on the flow path. Others: ddpm_ancestral, dpmpp_2m, euler."""
    steps: int = 50
    """Sampler steps."""
    guidance_scale: float = 1.0
    """null + scale (cond - null): 1 is unguided; the papers' omega is scale - 1."""
    seed: int = 0
    """Of the noise, apart from the training's."""
    clip: bool = True
    """Hold the predicted x0 in [-1, 1] at each step (ddpm_ancestral, ddim, dpmpp_2m); right for pixels."""
    parity: bool = False
    """ddpm_ancestral as in the CBDM lineage: the clip comes after the mean, so only the last image is clipped."""

    def resolved(self, path: Path) -> SamplingConfig:
        """With the sampler by name, checked to be one for this path with so many steps and these switches."""
        config = replace(self, sampler=_DEFAULT_SAMPLER[path.name]) if self.sampler == "auto" else self
        check_sampler(config.sampler, path)
        path.grid(config.steps)
        config.switches()
        return config

    def switches(self) -> dict[str, bool]:
        """What the sampler of that name takes; one that it does not take must be off."""
        takes = SAMPLERS[self.sampler].options
        if self.parity and "parity" not in takes:
            raise InputError(f"parity is a switch of the sampler ddpm_ancestral, got sampler {self.sampler}")
        return {name: getattr(self, name) for name in takes}


_DEFAULT_SAMPLER = {"ddpm": "ddim", "flow": "heun"}


@torch.no_grad()
def generate(
    net: nn.Module,
    path: Path,
    labels: Tensor,
    index: Tensor,
    *,
    image_shape: tuple[int, int, int],
    null_label: int,
    config: SamplingConfig,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """uint8 images [N, C, H, W] for `labels` [N]; image i's noise is a function of (seed, index_i) alone.

    `net` is evaluated as it is: pass it in eval mode. `progress` is told the number of images after each batch.
    """

    def model(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(x, t, cond).pred

    config, done = config.resolved(path), []
    for part, rows in zip(labels.split(batch_size), index.split(batch_size), strict=True):
        cond, null = LabelCond(part), LabelCond(torch.full_like(part, null_label))

        def draw(step: int, rows: Tensor = rows) -> Tensor:
            return random.normal(config.seed, f"sample/step/{step}", rows, image_shape)

        x = sample(
            config.sampler,
            guided(model, cond, null, config.guidance_scale),
            random.normal(config.seed, "sample/start", rows, image_shape),
            path,
            steps=config.steps,
            draw=draw,
            **config.switches(),
        )
        done.append(to_uint8(x))
        if progress:
            progress(len(part))
    return torch.cat(done)
