"""Where a product of matrices would lose its digits: `gaussian_divergence` and its loss on every back end at hand."""

import pytest
import torch

from imbdiff import ops
from imbdiff.ops import _backends
from imbdiff.ops.reference import gaussian as reference

BACKENDS = [b for b in ("reference", "cpu") if not _backends.refusal("gaussian_divergence", b, torch.zeros(1, 1))]
KINDS = reference.KINDS


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with ops.use(request.param):
        yield request.param


def exact(*x, kind="kl"):
    return reference.gaussian_divergence(*[v.double()[None] for v in x], KINDS.index(kind))[0][0]


def close(got, want):
    return bool(((got.double() - want).abs() <= 1e-4 * (1 + want)).all())


def pairs(N, M, D, variance):
    logvar = torch.tensor(variance).log()
    sd = variance**0.5
    p, q = torch.randn(N, D), torch.randn(M, D)
    # Every fourth column lies as close to a row as their spread allows.
    q[::4] = p[: len(q[::4])] + 0.03 * sd * torch.randn_like(q[::4])
    l, k = logvar + torch.randn(N, D) / 4, logvar + torch.randn(M, D) / 4
    k[::4] = l[: len(k[::4])] + torch.randn_like(k[::4]) / 50
    return p, l, q, k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [1e-4, 1.0, 1e4])
def test_near_overlap_among_distant_pairs(kind, variance):
    x = pairs(70, 200, 600, variance)
    want = exact(*x, kind=kind)
    assert 0.01 < float(want.min()) < 20
    assert float(want.max()) > 20 or variance == 1e4
    assert close(ops.gaussian_divergence(*x, kind=kind), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_costs_nothing(kind):
    p, l, q, k = pairs(50, 60, 128, 1.0)
    offset = torch.full((128,), 100 / 128**0.5)
    x = (p + offset, l, q + offset, k)
    assert close(ops.gaussian_divergence(*x, kind=kind), exact(*x, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_against_itself(kind):
    p, l, _, _ = pairs(60, 60, 300, 1e-2)
    got = ops.gaussian_divergence(p, l, p, l, kind=kind)
    assert bool((got.diagonal() == 0).all())
    assert bool((got >= 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("l", "k"), [(30.0, 30.0), (-30.0, -30.0), (30.0, -30.0), (-30.0, 30.0), (150.0, 150.0)])
def test_log_variances_of_30_and_beyond(kind, l, k):
    x = (torch.randn(5, 40), l + torch.randn(5, 40), torch.randn(6, 40), k + torch.randn(6, 40))
    want, got = exact(*x, kind=kind), ops.gaussian_divergence(*x, kind=kind)
    if l == 150 and kind == "bhattacharyya":
        pytest.skip("e^150 in a denominator is inf in float32, and what it divides 0")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_mixed_extremes_leave_other_pairs_alone():
    """One row of enormous variances: its own pairs are what they are, and no other pair notices."""
    p, l, q, k = pairs(20, 20, 64, 1.0)
    l[3], k[5] = 95.0, -95.0
    want, got = exact(p, l, q, k), ops.gaussian_divergence(p, l, q, k)
    rest = torch.ones(20, 20, dtype=torch.bool)
    rest[3], rest[:, 5] = False, False
    assert close(got[rest], want[rest])
    assert not bool(got.isnan().any())


@pytest.mark.parametrize("variance", [1e-4, 1.0])
def test_the_hinge_is_exact_where_it_looks(variance):
    """Nearly all of the loss comes from a few close pairs among distant ones."""
    x = pairs(100, 200, 500, variance)
    want = (40 - exact(*x)).relu()
    got = ops.gaussian_overlap_loss(*x, margin=40.0, pairs="all", reduction="sum")
    assert float(want.sum()) > 100
    assert abs(float(got) - float(want.sum())) <= 1e-4 * float((want > 0).sum()) * 21


def test_a_sparse_selection_is_the_dense_one_masked():
    """Cells of which no pair is selected are left out; those at edges and single pairs are not."""
    x = [v.requires_grad_() for v in pairs(300, 450, 40, 1.0)]
    mask = torch.zeros(300, 450, dtype=torch.bool)
    for i, j in [(0, 0), (47, 48), (299, 449), (191, 192), (100, 300)]:
        mask[i, j] = True
    mask[200:230, 97:350] = torch.rand(30, 253) < 0.3
    loss = ops.gaussian_overlap_loss(*x, margin=60.0, mask=mask, reduction="sum")
    got = torch.autograd.grad(loss, x)
    y = [v.detach().double().requires_grad_() for v in x]
    dense = (60 - reference.pairwise(*y, 0)).relu()[mask].sum()
    torch.testing.assert_close(loss.double(), dense.detach(), rtol=1e-6, atol=1e-4)
    for a, b in zip(got, torch.autograd.grad(dense, y), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_hinge_where_pairs_are_nearly_equal(kind, fused):
    """Element by element, far from the origin; products of rows would lose 1e-6 of differences of 1e-4."""
    offset = torch.full((200,), 100 / 200**0.5)
    q, k = torch.randn(60, 200) + offset, torch.randn(60, 200) / 4
    p, l = q * (1 + 1e-5 * torch.randn(60, 200)), k + 1e-5 * torch.randn(60, 200)
    margin = 0.1
    want = exact(p, l, q, k, kind=kind)
    assert torch.equal(want < margin, torch.eye(60, dtype=torch.bool))

    def gradients(dtype):
        x = [v.to(dtype).requires_grad_() for v in (p, l, q, k)]
        if fused:
            loss = ops.gaussian_overlap_loss(*x, kind=kind, margin=margin, pairs="all", reduction="sum")
        else:
            loss = (margin - ops.gaussian_divergence(*x, kind)).relu().sum()
        return torch.autograd.grad(loss, x)

    with ops.use("reference"):
        exactly = gradients(torch.float64)
    for got, want in zip(gradients(torch.float32), exactly, strict=True):
        # A derivative e^x - 1 of nearly equal variances is known to a rounding of 1.
        assert ((got.double() - want).abs() <= 1e-5 * want.abs() + 6e-8).all()
