"""Differentiable operations for imbalanced diffusion training: `from imbdiff import ops`."""

from imbdiff.ops._backends import load as _load
from imbdiff.ops._backends import use
from imbdiff.ops.contrast import negative_distance_loss
from imbdiff.ops.posterior import posterior_draw, posterior_mean
from imbdiff.ops.two_branch import two_branch_loss

_load()

__all__ = ["negative_distance_loss", "posterior_draw", "posterior_mean", "two_branch_loss", "use"]
