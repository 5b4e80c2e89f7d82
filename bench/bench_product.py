"""product_of_gaussians through all three outputs, log-variances as large as the means."""

import math

import pytest
import torch

from imbdiff import ops

from .floors import device
from .harness import ours, trained


def eager(means, logvars):
    m, l = torch.stack(means).float(), torch.stack(logvars).float()
    log_precision = (-l).logsumexp(0)
    mean = ((-l - log_precision).exp() * m).sum(0)
    quadratic = ((-l).exp() * (m - mean).square()).sum(0)
    constants = (len(m) - 1) * m.shape[2] * math.log(2 * math.pi)
    log_normalizer = -(constants + (l.sum(0) + log_precision + quadratic).sum(1)) / 2
    return mean.to(means[0].dtype), log_precision, log_normalizer


def case(K, B, D, dtype):
    rows = [torch.randn(B, D, dtype=getattr(torch, dtype), device=device(), requires_grad=True) for _ in range(2 * K)]
    rivals = ours(ops.product_of_gaussians) | {"eager": eager, "compile": torch.compile(eager)}
    size = rows[0].element_size()
    # Read: the factors. Written: mean and ln Lam. The backward reads both again, as gradients, and writes the factors'.
    once = B * D * (2 * K * size + size + 4)
    moved, flops = (once, 2 * once + B * D * 2 * K * size), (20 * K * B * D, 50 * K * B * D)
    inputs = rows[:K], rows[K:]
    return trained("product_of_gaussians", f"K{K}x{B}x{D}", dtype, rivals, rows, inputs, moved, flops)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("K", [2, 4])
def test_product(compare, K, dtype):
    compare(case, K, 256, 16_384, dtype)
