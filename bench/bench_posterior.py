"""posterior_draw in a batch, and posterior_mean over a bank, at noise levels spread over the whole path."""

import pytest
import torch

from imbdiff import ops
from imbdiff.diffusion import make_path

from .floors import device
from .harness import Case, forward, ours, trained

CHUNK = 4096


def eager_logits(x, bank, signal, sigma):
    x, bank, s = x.float(), bank.float(), signal[:, None]
    return (s * (x @ bank.T) - s.square() / 2 * bank.square().sum(1)) / sigma[:, None].square()


def eager_draw(x, bank, signal, sigma, u, own, counts):
    return gated(eager_logits(x, bank, signal, sigma), u, own, counts)


def gated(logits, u, own, counts):
    edges = logits.double().softmax(1).cumsum(1)
    drawn = torch.searchsorted(edges, u.double()[:, None] * edges[:, -1:], right=True)[:, 0].clamp_max(len(counts) - 1)
    return torch.where(counts[drawn] >= counts[own], drawn, own)


def published_draw(x, bank, signal, sigma, u, own, counts):
    """As the papers' code has it: every pair's difference."""
    difference = x.float()[:, None] - signal[:, None, None] * bank.float()
    return gated(-difference.square().sum(2) / (2 * sigma[:, None].square()), u, own, counts)


def our_draw(x, bank, signal, sigma, u, own, counts):
    return ops.posterior_draw(x, bank, signal, sigma, u, own=own, counts_x=counts[own], counts_bank=counts)


def eager_mean(x, bank, signal, sigma):
    return (eager_logits(x, bank, signal, sigma).softmax(1) @ bank.float()).to(x.dtype)


def chunked_mean(x, bank, signal, sigma):
    """No more of the bank than a chunk in float32, and a running maximum."""
    largest = torch.full((len(x), 1), -torch.inf, device=x.device)
    total, mass = 0.0, 0.0
    for part in bank.split(CHUNK):
        logits = eager_logits(x, part, signal, sigma)
        higher = torch.maximum(largest, logits.detach().amax(1, keepdim=True))
        weights, kept = (logits - higher).exp(), (largest - higher).exp()
        total, mass, largest = kept * total + weights @ part.float(), kept * mass + weights.sum(1, keepdim=True), higher
    return (total / mass).to(x.dtype)


def noisy(B, N, D, dtype):
    """x_t of the first B rows of a bank, at B time steps."""
    bank = torch.randn(N, D, device=device()).clamp_(-1, 1)
    t = torch.linspace(0, 999, B, device=device()).round()[torch.randperm(B, device=device())]
    signal, sigma, _ = make_path("ddpm").coefficients(t)
    x = signal[:, None] * bank[:B] + sigma[:, None] * torch.randn(B, D, device=device())
    return x.to(getattr(torch, dtype)), bank.to(getattr(torch, dtype)), signal.float(), sigma.float()


def draw(B, D, dtype):
    x, bank, signal, sigma = noisy(B, B, D, dtype)
    inputs = x, bank, signal, sigma, torch.rand(B, device=device()), torch.arange(B, device=device())
    counts = torch.randint(1, 500, (B,), device=device())
    rivals = ours(our_draw) | {"eager": eager_draw, "compile": torch.compile(eager_draw), "published": published_draw}
    return Case(
        op="posterior_draw",
        shape=f"{B}x{D}",
        dtype=dtype,
        modes={"forward": {name: forward(f, *inputs, counts) for name, f in rivals.items()}},
        bytes_moved={"forward": x.nbytes + bank.nbytes},
        flops={"forward": 2 * B * B * D},
    )


def mean(B, N, D, dtype):
    x, *rest = noisy(B, N, D, dtype)
    x.requires_grad_()
    rivals = ours(ops.posterior_mean) | {"chunked": chunked_mean, "compile": torch.compile(eager_mean)}
    once, product = rest[0].nbytes + 2 * x.nbytes, 2 * B * N * D
    moved, flops = (once, 2 * once), (2 * product, 4 * product)
    return trained("posterior_mean", f"{B}x{N}x{D}", dtype, rivals, [x], [x, *rest], moved, flops)


def case(op, *shape):
    return {"posterior_draw": draw, "posterior_mean": mean}[op](*shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "shape"), [("posterior_draw", (128, 3072)), ("posterior_mean", (64, 50_000, 3072))])
def test_posterior(compare, op, shape, dtype):
    compare(case, op, *shape, dtype)
