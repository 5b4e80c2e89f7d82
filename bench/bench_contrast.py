"""negative_distance, forward and backward: the streaming plan (many narrow rows), the split-K plan (few wide rows)."""

import math

import pytest
import torch

from imbdiff import ops

from .floors import device
from .harness import ours, trained

TAU = 1.0


def eager(x):
    squared = x.square().sum(1)
    energy = (squared[:, None] + squared - 2 * x @ x.T).clamp_min(0) / (TAU * x.shape[1])
    return (-energy).flatten().logsumexp(0) - 2 * math.log(len(x))


class Expert(torch.autograd.Function):
    """What someone writes by hand: centred Gram matrix, and the analytic gradient by one product, in the forward."""

    @staticmethod
    def forward(ctx, x):
        c = x - x.mean(0)
        squared = c.float().square().sum(1)
        if c.dtype == torch.float32:
            s = torch.addmm(squared[:, None] + squared, c, c.T, beta=-1, alpha=2)
        else:
            s = 2 * (c @ c.T).float() - squared[:, None] - squared
        s = s.clamp_max_(0).div_(TAU * x.shape[1])
        lse = s.flatten().logsumexp(0)
        p = s.sub_(lse).exp_()
        grad = torch.addmm(p.sum(1, keepdim=True).to(c.dtype) * c, p.to(c.dtype), c, beta=1, alpha=-1)
        ctx.save_for_backward(grad.mul_(-4 / (TAU * x.shape[1])))
        return lse - 2 * math.log(len(x))

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def keops(x):
    """Tiles without the matrix of distances, by a kernel that is compiled when it is first called."""
    from pykeops.torch import LazyTensor

    energy = ((LazyTensor(x[:, None]) - LazyTensor(x[None])) ** 2).sum(-1) / (TAU * x.shape[1])
    return (-energy).logsumexp(1).flatten().logsumexp(0) - 2 * math.log(len(x))


def why_not_keops(D, dtype):
    """The reason why KeOps is no rival at this shape or on this machine, or None."""
    if dtype != "float32" or D > 1024:
        return "taken in float32 at the streaming shape only; without matrix products wide rows take it minutes"
    try:
        keops(torch.randn(4, D, device=device()))
    except Exception as error:  # no package, no compiler, no permission: whatever it is, the reader learns it
        return f"{type(error).__name__}: {error}"
    return None


def case(N, D, dtype):
    x = torch.randn(N, D, dtype=getattr(torch, dtype), device=device(), requires_grad=True)
    rivals = ours(lambda x: ops.negative_distance_loss(x, tau=TAU, per_dim=True)) | {
        "eager": eager,
        "compile": torch.compile(eager),
        "expert": Expert.apply,
    }
    reason = why_not_keops(D, dtype)
    if reason is None:
        rivals["keops"] = keops
    row = N * D * x.element_size()
    flops = 2 * N * N * D, 4 * N * N * D
    absent = {"keops": reason} if reason else None
    return trained("negative_distance", f"{N}x{D}", dtype, rivals, [x], [x], (row, 3 * row), flops, absent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("N", "D"), [(4096, 128), (256, 98_304)], ids=["streaming", "split-k"])
def test_negative_distance(compare, N, D, dtype):
    compare(case, N, D, dtype)
