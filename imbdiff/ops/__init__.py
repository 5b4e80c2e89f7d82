"""Differentiable operations for imbalanced diffusion training: `from imbdiff import ops`."""

from imbdiff.ops._backends import load as _load
from imbdiff.ops._backends import use
from imbdiff.ops.contrast import distance_hinge_loss, negative_distance_loss
from imbdiff.ops.cosine import cosine_contrastive_loss, supcon_loss
from imbdiff.ops.gaussian import gaussian_divergence, gaussian_overlap_loss
from imbdiff.ops.neighbours import ball_count, knn_radius
from imbdiff.ops.posterior import posterior_draw, posterior_mean
from imbdiff.ops.product import pog_target, product_of_gaussians
from imbdiff.ops.tap import tap_loss
from imbdiff.ops.two_branch import two_branch_loss

_load()

__all__ = [
    "ball_count",
    "cosine_contrastive_loss",
    "distance_hinge_loss",
    "gaussian_divergence",
    "gaussian_overlap_loss",
    "knn_radius",
    "negative_distance_loss",
    "pog_target",
    "posterior_draw",
    "posterior_mean",
    "product_of_gaussians",
    "supcon_loss",
    "tap_loss",
    "two_branch_loss",
    "use",
]
