"""product_of_gaussians, forward and backward through all three outputs, log-variances as large as the means."""

import math

import pytest
import torch

from imbdiff import ops


def eager(means, logvars):
    m, l = torch.stack(means).float(), torch.stack(logvars).float()
    log_precision = (-l).logsumexp(0)
    mean = ((-l - log_precision).exp() * m).sum(0)
    quadratic = ((-l).exp() * (m - mean).square()).sum(0)
    constants = (len(m) - 1) * m.shape[2] * math.log(2 * math.pi)
    log_normalizer = -(constants + (l.sum(0) + log_precision + quadratic).sum(1)) / 2
    return mean.to(means[0].dtype), log_precision, log_normalizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("K", [2, 4])
def test_product(rivals, K, dtype):
    B, D = 256, 16_384
    rows = [torch.randn(B, D, dtype=dtype, requires_grad=True) for _ in range(2 * K)]
    grads = [torch.randn(B, D, dtype=dtype), torch.randn(B, D), torch.randn(B)]
    compiled = torch.compile(eager)

    def both(product):
        return lambda: torch.autograd.grad(product(rows[:K], rows[K:]), rows, grads)

    size = rows[0].element_size()
    rivals(
        f"product-K{K}-{B}x{D}-{str(dtype)[6:]}",
        {"imbdiff": both(ops.product_of_gaussians), "eager": both(eager), "compile": both(compiled)},
        # Factors twice and their gradients once; the mean and ln Lam, and their gradients.
        bytes_moved=B * D * (3 * 2 * K * size + 2 * (size + 4)),
        rounds=7,
    )
