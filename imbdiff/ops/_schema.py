"""Every operation's schema, forward and backward: the single source, for Python and for the compiled libraries.

This file imports nothing, because the build reads it too: the hash is compiled into each library and compared at load.
"""

import hashlib

SCHEMAS = {
    "two_branch": (
        "(Tensor own, Tensor target, Tensor[] others, Tensor weight, Tensor scales, float[] margin)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "two_branch_bwd": (
        "(Tensor grad_base, Tensor grad_terms, Tensor own, Tensor target, Tensor[] others, Tensor weight,"
        " Tensor scales, float[] margin, Tensor distance, bool[] needs) -> (Tensor, Tensor[])"
    ),
    "negative_distance": (
        "(Tensor x, Tensor negatives, Tensor weight, float scale, bool include_self, bool per_row, bool split_k)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "negative_distance_bwd": (
        "(Tensor grad, Tensor x, Tensor negatives, Tensor weight, Tensor lse, Tensor saved, float scale,"
        " bool include_self, bool per_row, bool split_k) -> Tensor"
    ),
    "distance_hinge": "(Tensor x, float margin, float scale, bool split_k) -> (Tensor, Tensor)",
    "distance_hinge_bwd": "(Tensor grad, Tensor x, Tensor saved, float margin, float scale, bool split_k) -> Tensor",
    "cosine_contrastive": (
        "(Tensor x, Tensor negatives, Tensor weight, float tau, bool include_self, bool split_k)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "cosine_contrastive_bwd": (
        "(Tensor grad, Tensor x, Tensor negatives, Tensor weight, Tensor lse, Tensor saved, float tau,"
        " bool include_self, bool split_k) -> Tensor"
    ),
    "supcon": "(Tensor x, Tensor labels, Tensor weight, float tau, bool split_k) -> (Tensor, Tensor, Tensor)",
    "supcon_bwd": (
        "(Tensor grad, Tensor x, Tensor labels, Tensor weight, Tensor lse, Tensor saved, float tau,"
        " bool split_k) -> Tensor"
    ),
    "gaussian_divergence": (
        "(Tensor mean_p, Tensor logvar_p, Tensor mean_q, Tensor logvar_q, int kind) -> (Tensor, Tensor)"
    ),
    "gaussian_divergence_bwd": (
        "(Tensor grad, Tensor mean_p, Tensor logvar_p, Tensor mean_q, Tensor logvar_q, int kind, Tensor out,"
        " Tensor sizes, bool[] needs)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "gaussian_overlap": (
        "(Tensor mean_p, Tensor logvar_p, Tensor mean_q, Tensor logvar_q, Tensor labels_p, Tensor labels_q,"
        " Tensor mask, Tensor weight, int kind, int form, float margin, float scale, int pairs, bool mean,"
        " bool same_set, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "product_of_gaussians": "(Tensor[] means, Tensor[] logvars, Tensor exponents) -> (Tensor, Tensor, Tensor)",
    "product_of_gaussians_bwd": (
        "(Tensor grad_mean, Tensor grad_log_precision, Tensor grad_log_normalizer, Tensor[] means,"
        " Tensor[] logvars, Tensor exponents, bool[] needs) -> (Tensor[], Tensor[])"
    ),
    "posterior_mean": ("(Tensor x_t, Tensor bank, Tensor signal, Tensor sigma, Tensor log_prior) -> (Tensor, Tensor)"),
    "posterior_mean_bwd": (
        "(Tensor grad, Tensor x_t, Tensor bank, Tensor signal, Tensor sigma, Tensor log_prior, Tensor out,"
        " Tensor lse, bool[] needs) -> (Tensor, Tensor)"
    ),
    "posterior_draw": (
        "(Tensor x_t, Tensor bank, Tensor signal, Tensor sigma, Tensor u, Tensor own, Tensor counts_x,"
        " Tensor counts_bank, Tensor log_prior, int gate) -> Tensor"
    ),
    "knn_radius": "(Tensor x, int k, bool squared) -> Tensor",
    "ball_count": "(Tensor points, Tensor centers, Tensor squared_radii) -> (Tensor, Tensor)",
}

SCHEMA_HASH = hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:15]
"""60 bits, so that it fits a signed 64-bit integer."""
