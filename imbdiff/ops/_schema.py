"""Every operation's schema, forward and backward: the single source, for Python and for the compiled libraries.

This file imports nothing, because the build reads it too: the hash is compiled into each library and compared at load.
"""

import hashlib

SCHEMAS = {
    "two_branch": (
        "(Tensor own, Tensor target, Tensor[] others, Tensor weight, Tensor scales, Tensor margin)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "two_branch_bwd": (
        "(Tensor grad_base, Tensor grad_terms, Tensor own, Tensor target, Tensor[] others, Tensor weight,"
        " Tensor scales, Tensor margin, Tensor distance, bool[] needs) -> (Tensor, Tensor[])"
    ),
    "negative_distance": (
        "(Tensor x, Tensor negatives, Tensor weight, float scale, bool include_self, bool per_row)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "negative_distance_bwd": (
        "(Tensor grad, Tensor x, Tensor negatives, Tensor weight, Tensor lse, Tensor saved, float scale,"
        " bool include_self, bool per_row) -> Tensor"
    ),
}

SCHEMA_HASH = hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:15]
"""60 bits, so that it fits a signed 64-bit integer."""
