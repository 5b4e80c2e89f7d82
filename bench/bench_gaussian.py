"""gaussian_divergence and gaussian_overlap_loss, forward and backward in all four arguments."""

import pytest
import torch

from imbdiff import ops


def gaussians(N, D):
    return [torch.randn(N, D, requires_grad=True), (torch.randn(N, D) / 2).requires_grad_()]


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


def both(loss, leaves, grad=None):
    return lambda: torch.autograd.grad(loss(*leaves), leaves, grad)


def test_kl_matrix(rivals):
    N, D = 1000, 2048
    leaves, grad = gaussians(N, D) + gaussians(N, D), torch.randn(N, N)
    forms = {"imbdiff": ops.gaussian_divergence, "eager": kl, "compile": torch.compile(kl), "expert": Expert.apply}
    rivals(
        f"gaussian_kl-{N}x{N}x{D}",
        {name: both(form, leaves, grad) for name, form in forms.items()},
        bytes_moved=12 * N * D * 4 + 2 * N * N * 4,
        flops=12 * N * N * D,
        rounds=7,
    )


@pytest.mark.parametrize("tiles", ["all", "some"])
def test_kl_overlap(rivals, tiles):
    """The hinge at about the median; "some": one 64 x 64 tile in ten, drawn at random."""
    N, D, margin = 2048, 512, 600.0
    leaves = gaussians(N, D) + gaussians(N, D)
    mask = (torch.rand(N // 64, N // 64) < 0.1).repeat_interleave(64, 0).repeat_interleave(64, 1)

    def loss(divergence):
        if tiles == "all":
            return lambda *x: (margin - divergence(*x)).relu().mean()
        return lambda *x: ((margin - divergence(*x)).relu() * mask).sum() / mask.sum()

    def ours(*x):
        return ops.gaussian_overlap_loss(*x, margin=margin, pairs="all", mask=None if tiles == "all" else mask)

    forms = {"imbdiff": ours, "eager": loss(kl), "compile": torch.compile(loss(kl)), "expert": loss(Expert.apply)}
    rivals(
        f"gaussian_overlap-{N}x{N}x{D}-{tiles}",
        {name: both(form, leaves) for name, form in forms.items()},
        bytes_moved=12 * N * D * 4,
        flops=16 * N * N * D,
        rounds=7,
    )


@pytest.mark.parametrize("backward", [True, False], ids=["both", "forward"])
def test_bhattacharyya_matrix(rivals, backward):
    N = D = 512
    leaves, grad = gaussians(N, D) + gaussians(N, D), torch.randn(N, N)
    compiled = torch.compile(bhattacharyya)

    def ours(*x):
        return ops.gaussian_divergence(*x, kind="bhattacharyya")

    def forward(form):
        return torch.no_grad()(lambda: form(*leaves))

    run = (lambda form: both(form, leaves, grad)) if backward else forward
    rivals(
        f"gaussian_bhattacharyya-{N}x{N}x{D}-{'both' if backward else 'forward'}",
        {"imbdiff": run(ours), "eager": run(bhattacharyya), "compile": run(compiled)},
        bytes_moved=12 * N * D * 4,
        rounds=5,
    )
