"""two_branch, K = 1, as an operation (given gradients of base and terms) and as a whole scalar loss."""

from functools import partial

import pytest
import torch

from imbdiff import ops
from imbdiff.ops import _backends
from imbdiff.ops._op import overload

from .floors import device
from .harness import Case, backward, forward, ours

SCALES = torch.tensor([[1.0, 0.25, 1.25]], device=device())
PULL = [0.0]  # no margin


def imbdiff(own, target, other, w):
    return ops.two_branch_loss(own, target, [other], w, SCALES)


def eager(own, target, other, w):
    base = (own - target).square().mean(1)
    to_own = w * (own - other.detach()).square().mean(1)
    to_other = w * (own.detach() - other).square().mean(1)
    return base, to_own + 0.25 * to_other


class Expert(torch.autograd.Function):
    """What someone writes by hand: the analytic gradient, differences computed once."""

    @staticmethod
    def forward(ctx, own, target, other, w):
        a, b = own - target, own - other
        ctx.save_for_backward(a, b, w)
        return a.square().mean(1), 1.25 * w * b.square().mean(1)

    @staticmethod
    def backward(ctx, g_base, g_terms):
        a, b, w = ctx.saved_tensors
        b *= (g_terms[0] * w[0] * (2 / a.shape[1])).to(b)[:, None]
        return torch.addcmul(b, a, (g_base * (2 / a.shape[1])).to(a)[:, None]), None, b * -0.25, None


class Bare(torch.autograd.Function):
    """The kernels and what autograd needs to call them, nothing checked or chosen: no operation in Python is faster."""

    @staticmethod
    def forward(ctx, backend, own, target, other, w):
        base, terms, distance = overload(f"two_branch_{backend}")(own, target, [other], w, SCALES, PULL)
        ctx.backend = backend
        ctx.save_for_backward(own, target, other, w, distance)
        return base, terms

    @staticmethod
    def backward(ctx, g_base, g_terms):
        own, target, other, w, distance = ctx.saved_tensors
        bwd = overload(f"two_branch_bwd_{ctx.backend}")
        of_own, of_others = bwd(g_base, g_terms, own, target, [other], w, SCALES, PULL, distance, [True, True])
        return None, of_own, None, *of_others, None


def whole(f):
    """The scalar that a training step makes of it."""

    def loss(*inputs):
        base, terms = f(*inputs)
        return base.float().mean() + terms.float().mean()

    return loss


def case(B, D, dtype):
    own, target, other = (torch.randn(B, D, dtype=getattr(torch, dtype), device=device()) for _ in range(3))
    inputs, leaves = (own, target, other, torch.rand(1, B, device=device())), [own, other]
    for leaf in leaves:
        leaf.requires_grad_()
    rivals = ours(imbdiff) | {"eager": eager, "expert": Expert.apply}
    rivals["kernels alone"] = partial(Bare.apply, _backends.choose("two_branch", own, 1))
    compiled = {"compile": torch.compile(eager)}
    losses = {name: whole(f) for name, f in rivals.items()} | {"compile": torch.compile(whole(eager))}
    row = B * D * own.element_size()
    full = {"forward": 3 * row, "forward+backward": 8 * row, "whole loss": 8 * row}
    return Case(
        op="two_branch",
        shape=f"{B}x{D}",
        dtype=dtype,
        modes={
            "forward": {name: forward(f, *inputs) for name, f in (rivals | compiled).items()},
            "forward+backward": {name: backward(f, leaves, *inputs) for name, f in (rivals | compiled).items()},
            "whole loss": {name: backward(f, leaves, *inputs) for name, f in losses.items()},
        },
        bytes_moved=full,
        flops={mode: (6 if mode == "forward" else 14) * B * D for mode in full},
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("B", "D"), [(128, 3072), (256, 16_384)])
def test_two_branch(compare, B, D, dtype):
    compare(case, B, D, dtype)
