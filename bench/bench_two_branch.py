"""two_branch, K = 1, forward and backward, float32 and bfloat16."""

import pytest
import torch

from imbdiff import ops

SHAPES = [(128, 3072), (256, 16384)]


def eager(own, target, other, w):
    base = (own - target).square().mean(1)
    pull = (w * (own - other.detach()).square().mean(1)).mean()
    back = (w * (own.detach() - other).square().mean(1)).mean()
    return base.mean() + pull + 0.25 * back


class Expert(torch.autograd.Function):
    """What someone writes by hand: the analytic gradient, differences computed once."""

    @staticmethod
    def forward(ctx, own, target, other, w):
        a, b = own - target, own - other
        n = own.numel()
        ctx.save_for_backward(a, b, w)
        return a.square().sum() / n + 1.25 * (w * b.square().sum(1)).sum() / n

    @staticmethod
    def backward(ctx, g):
        a, b, w = ctx.saved_tensors
        wb = b * (w * (2 * g / a.numel()))[:, None]
        return torch.add(wb, a, alpha=float(2 * g / a.numel())), None, wb * -0.25, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_two_branch(rivals, B, D, dtype):
    own, other = (torch.randn(B, D, dtype=dtype, requires_grad=True) for _ in range(2))
    target, w = torch.randn(B, D, dtype=dtype), torch.rand(B)
    scales = torch.tensor([[1.0, 0.25, 1.25]])
    compiled = torch.compile(eager)

    def ours():
        base, terms = ops.two_branch_loss(own, target, [other], w[None], scales)
        return base.mean() + terms.mean()

    def both(loss):
        return lambda: torch.autograd.grad(loss(), [own, other])

    rivals(
        f"two_branch-{B}x{D}-{str(dtype)[6:]}",
        {
            "imbdiff": both(ours),
            "eager": both(lambda: eager(own, target, other, w)),
            "compile": both(lambda: compiled(own, target, other, w)),
            "expert": both(lambda: Expert.apply(own, target, other, w)),
        },
        bytes_moved=8 * B * D * own.element_size(),
    )
