"""negative_distance, forward and backward: the streaming plan (many narrow rows), the split-K plan (few wide rows)."""

import pytest
import torch

from imbdiff import ops

TAU = 1.0


def eager(x):
    squared = x.square().sum(1)
    energy = (squared[:, None] + squared - 2 * x @ x.T).clamp_min(0) / (TAU * x.shape[1])
    return (-energy).flatten().logsumexp(0) - 2 * torch.log(torch.tensor(float(len(x))))


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
        return lse - 2 * torch.log(torch.tensor(float(len(x))))

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("N", "D"), [(4096, 128), (256, 98_304)], ids=["streaming", "split-k"])
def test_negative_distance(rivals, N, D, dtype):
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    compiled = torch.compile(eager)

    def both(loss):
        return lambda: torch.autograd.grad(loss(x).float(), x)

    rivals(
        f"negative_distance-{N}x{D}-{str(dtype)[6:]}",
        {
            "imbdiff": both(lambda x: ops.negative_distance_loss(x, tau=TAU, per_dim=True)),
            "eager": both(eager),
            "compile": both(compiled),
            "expert": both(Expert.apply),
        },
        bytes_moved=3 * N * D * x.element_size(),
        flops=4 * N * N * D,
        rounds=7,
    )
