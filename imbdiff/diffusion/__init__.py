"""Paths between data and noise, guidance and samplers: pure functions on tensors."""

from imbdiff.diffusion._broadcast import expand
from imbdiff.diffusion.generate import SamplingConfig, generate
from imbdiff.diffusion.guidance import guide, guided
from imbdiff.diffusion.paths import DDPM, PATHS, Flow, Path, make_path, split_variance
from imbdiff.diffusion.samplers import SAMPLERS, ddim, ddpm_ancestral, dpmpp_2m, euler, heun, sample

__all__ = [
    "DDPM",
    "PATHS",
    "SAMPLERS",
    "Flow",
    "Path",
    "SamplingConfig",
    "ddim",
    "ddpm_ancestral",
    "dpmpp_2m",
    "euler",
    "expand",
    "generate",
    "guide",
    "guided",
    "heun",
    "make_path",
    "sample",
    "split_variance",
]
