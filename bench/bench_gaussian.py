"""gaussian_divergence and gaussian_overlap_loss, forward and backward in all four arguments."""

import pytest
import torch

from imbdiff import ops

from .floors import device
from .harness import ours, trained


def gaussians(N, D):
    mean, logvar = torch.randn(2, N, D, device=device())
    return [mean.requires_grad_(), (logvar / 2).requires_grad_()]


def kl(m, l, n, k):
    """The matrix as two products, centred."""
    centre = m.mean(0)
    m, n, precision = m - centre, n - centre, (-k).exp()
    own = (k + n.square() * precision).sum(1) - l.sum(1, keepdim=True) - m.shape[1]
    return ((l.exp() + m.square()) @ precision.T - 2 * m @ (n * precision).T + own) / 2


def bhattacharyya(m, l, n, k):
    both = l.exp()[:, None] + k.exp()
    spread = (both / 2).log() - (l[:, None] + k) / 2
    return ((m[:, None] - n).square() / both / 4 + spread / 2).sum(2)


class Expert(torch.autograd.Function):
    """What someone writes by hand: the analytic gradient of the KL matrix, four products."""

    @staticmethod
    def forward(ctx, m, l, n, k):
        centre = m.mean(0)
        m, n, precision, variance = m - centre, n - centre, (-k).exp(), l.exp()
        ctx.save_for_backward(m, variance, n, precision)
        out = torch.addmm(
            (k + n.square() * precision).sum(1) - l.sum(1, keepdim=True) - m.shape[1],
            torch.cat([variance + m.square(), -2 * m], 1),
            torch.cat([precision, n * precision], 1).T,
        )
        return out.div_(2)

    @staticmethod
    def backward(ctx, grad):
        m, variance, n, precision = ctx.saved_tensors
        D = m.shape[1]
        rows, columns = grad.sum(1, keepdim=True), grad.sum(0)[:, None]
        h = grad @ torch.cat([precision, n * precision], 1)
        g = grad.T @ torch.cat([m, variance + m.square()], 1)
        of_n = precision * (n * columns - g[:, :D])
        of_k = (columns - precision * (g[:, D:] + n * (n * columns - 2 * g[:, :D]))) / 2
        return m * h[:, :D] - h[:, D:], (variance * h[:, :D] - rows) / 2, of_n, of_k


def made(op, shape, rivals, leaves, flops, extra_bytes=0):
    row = sum(x.numel() for x in leaves) * 4
    moved = row + extra_bytes, 3 * row + 2 * extra_bytes
    return trained(op, shape, "float32", rivals, leaves, leaves, moved, (flops, 3 * flops))


def matrix_case(kind, N, D):
    form = kl if kind == "kl" else bhattacharyya
    rivals = ours(lambda *x: ops.gaussian_divergence(*x, kind=kind)) | {"eager": form, "compile": torch.compile(form)}
    if kind == "kl":
        rivals["expert"] = Expert.apply
    leaves = gaussians(N, D) + gaussians(N, D)
    return made("gaussian_divergence", f"{kind}-{N}x{N}x{D}", rivals, leaves, 4 * N * N * D, 4 * N * N)


def overlap_case(tiles, N, D):
    """A hinge that most pairs are within; "some": one 64 x 64 tile in ten, drawn at random."""
    margin = 1.2 * D
    leaves = gaussians(N, D) + gaussians(N, D)
    mask = (torch.rand(N // 64, N // 64) < 0.1).repeat_interleave(64, 0).repeat_interleave(64, 1).to(device())

    def loss(divergence):
        if tiles == "all":
            return lambda *x: (margin - divergence(*x)).relu().mean()
        return lambda *x: ((margin - divergence(*x)).relu() * mask).sum() / mask.sum()

    def imbdiff(*x):
        return ops.gaussian_overlap_loss(*x, margin=margin, pairs="all", mask=None if tiles == "all" else mask)

    rivals = {"eager": loss(kl), "compile": torch.compile(loss(kl)), "expert": loss(Expert.apply)}
    return made("gaussian_overlap", f"kl-{tiles}-{N}x{N}x{D}", ours(imbdiff) | rivals, leaves, 4 * N * N * D)


def case(what, *args):
    return {"divergence": matrix_case, "overlap": overlap_case}[what](*args)


@pytest.mark.parametrize(("kind", "N", "D"), [("kl", 1000, 2048), ("bhattacharyya", 512, 512)])
def test_divergence(compare, kind, N, D):
    compare(case, "divergence", kind, N, D)


@pytest.mark.parametrize("tiles", ["all", "some"])
def test_overlap(compare, tiles):
    compare(case, "overlap", tiles, 2048, 512)
