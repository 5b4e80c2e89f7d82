"""Differentiable operations for imbalanced diffusion training: `from imbdiff import ops`."""

from imbdiff.ops.posterior import posterior_draw, posterior_mean
from imbdiff.ops.two_branch import two_branch_loss

__all__ = ["posterior_draw", "posterior_mean", "two_branch_loss"]
