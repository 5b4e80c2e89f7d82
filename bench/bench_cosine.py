"""cosine_contrastive, forward and backward, at few and wide rows: the split-K plan."""

import pytest
import torch

from imbdiff import ops

from .floors import device
from .harness import ours, trained

TAU = 0.1


def eager(x):
    z = torch.nn.functional.normalize(x.float())
    return ((z @ z.T - 1) / TAU).logsumexp(1).mean()


def published(x):
    """As the paper's code has it: each row's negatives are copied into one tensor of N x (N - 1) x D, row by row.

    Its backward copies that tensor's gradient once for each row.
    """
    N, D = x.shape
    rows = torch.nn.functional.normalize(x.float())
    negatives = torch.zeros(N, N - 1, D, device=x.device)
    for i in range(N):
        negatives[i] = torch.cat([rows[:i], rows[i + 1 :]])
    near = torch.ones(N, 1, device=x.device)
    far = torch.einsum("nd,nkd->nk", rows, negatives)
    return ((torch.cat([near, far], 1) - 1) / TAU).logsumexp(1).mean()


class Expert(torch.autograd.Function):
    """What someone writes by hand: unit rows, their Gram matrix, the analytic gradient by one product."""

    @staticmethod
    def forward(ctx, x):
        inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).reciprocal_()
        z = x * inverse.to(x.dtype)
        logits = (z @ z.T).float().sub_(1).div_(TAU)
        lse = logits.logsumexp(1, keepdim=True)
        p = logits.sub_(lse).exp_()
        grad = (p + p.T).to(z.dtype) @ z
        grad = torch.addcmul(grad, (grad * z).sum(1, keepdim=True), z, value=-1)
        ctx.save_for_backward(grad.mul_((inverse / (TAU * len(x))).to(z.dtype)))
        return lse.mean()

    @staticmethod
    def backward(ctx, g):
        return g.to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0]


def case(N, D, dtype):
    # Rows with something in common: the loss of independent ones is less than the rounding of a rival in bfloat16.
    x = torch.randn(N, D, device=device()) + torch.randn(D, device=device())
    x = x.to(getattr(torch, dtype)).requires_grad_()
    rivals = ours(lambda x: ops.cosine_contrastive_loss(x, tau=TAU)) | {
        "eager": eager,
        "compile": torch.compile(eager),
        "expert": Expert.apply,
    }
    row, product = N * D * x.element_size(), 2 * N * N * D
    absent = None
    if N * D <= 2**19:
        rivals["published"] = published
    else:
        absent = {"published": "taken at smaller shapes only; its backward moves 8 N^3 D bytes"}
    return trained(
        "cosine_contrastive", f"{N}x{D}", dtype, rivals, [x], [x], (row, 3 * row), (product, 2 * product), absent
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("N", "D"), [(128, 16_384), (64, 8192), (32, 2048)], ids=["split-k", "middle", "small"])
def test_cosine_contrastive(compare, N, D, dtype):
    compare(case, N, D, dtype)
