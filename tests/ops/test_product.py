"""Golden values, laws, numerics and refusals of product_of_gaussians and pog_target."""

import math

import pytest
import torch
from torch.distributions import Normal

from imbdiff import ops

from .rules import back_ends

F64 = torch.float64


def golden():
    """Four factors of one row each: N(mu_i, e^(l_i))."""
    i, d = torch.arange(4.0, dtype=F64)[:, None, None], torch.arange(5.0, dtype=F64)
    return list(torch.sin(i + 2 * d)), list(0.5 * torch.cos(2 * i - d))


def random(K, B, D, dtype=F64):
    return [torch.randn(B, D, dtype=dtype) for _ in range(K)], [torch.randn(B, D, dtype=dtype) for _ in range(K)]


def test_golden_values():
    mean, log_precision, log_z = ops.product_of_gaussians(*golden())
    want = torch.tensor([[0.6203845479, -0.3152349393, -0.2124402217, 0.3066646573, 0.0713660129]], dtype=F64)
    torch.testing.assert_close(mean, want, atol=1e-10, rtol=0)
    want = torch.tensor([[3.8431193205, 4.0347881328, 4.4556921782, 4.8075124008, 4.4556921782]], dtype=F64)
    torch.testing.assert_close(log_precision.exp(), want, atol=1e-10, rtol=0)
    assert log_z.item() == pytest.approx(-21.420515696902044, rel=1e-14)


def test_golden_target():
    """PoGDiff with psi = w: the two-term loss is the single-target one and a constant."""
    i, d = torch.arange(4.0, dtype=F64)[:, None], torch.arange(5.0, dtype=F64)
    h, other, eps = torch.sin(i + 2 * d), torch.sin(i + 2 * d + 0.3 * (1 + i)), torch.cos(5 * i + 3 * d)
    psi = (i[:, 0] + 1) / 4
    target, weight = ops.pog_target(eps, other, psi)
    single = (weight * (target - h).square().mean(1)).mean()
    two = ((eps - h).square().mean(1) + psi * (other - h).square().mean(1)).mean()
    assert two.item() == pytest.approx(1.360791115443266, rel=1e-13)
    assert single.item() == pytest.approx(0.9950921009809182, rel=1e-13)
    assert (two - single).item() == pytest.approx(0.36569901446234765, rel=1e-12)


@pytest.mark.parametrize("per_row", [False, True])
def test_it_is_the_product_of_the_densities(per_row):
    """At any x: sum_k a_k log N(x; m_k, e^l_k) = log Z + log N(x; mean, 1/Lam), with torch's own densities."""
    means, logvars = random(3, 6, 5)
    exponents = torch.rand(3, 6, dtype=F64) + 0.2 if per_row else torch.rand(3, dtype=F64) + 0.2
    mean, log_precision, log_z = ops.product_of_gaussians(means, logvars, exponents)
    x, powers = torch.randn(6, 5, dtype=F64), exponents if per_row else exponents[:, None]
    logs = torch.stack([Normal(m, (l / 2).exp()).log_prob(x).sum(1) for m, l in zip(means, logvars, strict=True)])
    theirs = Normal(mean, (-log_precision / 2).exp()).log_prob(x).sum(1)
    torch.testing.assert_close((powers * logs).sum(0), log_z + theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("wide", [True, False])
def test_gradients(K, wide):
    means, logvars = random(K, 3, 4)
    logvars = logvars if wide else [l[:, :1] for l in logvars]
    exponents = torch.rand(K, dtype=F64) + 0.5
    leaves = [x.clone().requires_grad_() for x in (*means, *logvars)]
    assert torch.autograd.gradcheck(lambda *x: ops.product_of_gaussians(x[:K], x[K:], exponents), leaves)


def test_one_factor_is_itself():
    means, logvars = random(1, 4, 3, torch.float32)
    mean, log_precision, log_z = ops.product_of_gaussians(means, logvars)
    assert torch.equal(mean, means[0])
    assert torch.equal(log_precision, -logvars[0])
    assert torch.equal(log_z, torch.zeros(4))


def test_the_order_of_factors_and_a_common_shift():
    means, logvars = random(4, 3, 5)
    order = [2, 0, 3, 1]
    first = ops.product_of_gaussians(means, logvars)
    again = ops.product_of_gaussians([means[k] for k in order], [logvars[k] for k in order])
    moved = ops.product_of_gaussians([m + 7 for m in means], logvars)
    for a, b, c, shift in zip(first, again, moved, (7, 0, 0), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a + shift, c)


def test_two_equal_factors_are_one_squared():
    means, logvars = random(1, 3, 5)
    twice = ops.product_of_gaussians(means * 2, logvars * 2)
    squared = ops.product_of_gaussians(means, logvars, torch.full((1,), 2.0, dtype=F64))
    for a, b in zip(twice, squared, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("logvar", [math.log(1e-4), math.log(1e4), -30.0, 30.0])
def test_extreme_variances_and_a_common_offset_cost_no_digits(logvar):
    torch.manual_seed(0)
    offset = torch.randn(64)
    offset *= 100 / offset.norm()
    scale = math.exp(logvar / 2)
    means = [offset + scale * torch.randn(8, 64) for _ in range(3)]
    logvars = [logvar + 0.1 * torch.randn(8, 64) for _ in range(3)]
    got = ops.product_of_gaussians(means, logvars)
    exact = ops.product_of_gaussians([m.double() for m in means], [l.double() for l in logvars])
    for g, e in zip(got, exact, strict=True):
        assert g.isfinite().all()
        assert (g.double() - e).abs().max() <= 4e-7 * e.abs().max()


@pytest.mark.parametrize("backend", back_ends("product_of_gaussians", "cpu"))
@pytest.mark.parametrize("K", [2, 3])
def test_a_faint_factor_far_away_costs_no_digits(backend, K):
    """The first factor lies 1000 away with a precision of e^-20: differences from it say nothing of the others."""
    means = [torch.full((4, 50), 1000.0), *(torch.randn(4, 50) for _ in range(K - 1))]
    logvars = [torch.full((4, 50), 20.0), *(torch.randn(4, 50) / 4 for _ in range(K - 1))]

    def gradients(dtype, backend):
        leaves = [m.to(dtype).requires_grad_() for m in means]
        with ops.use(backend):
            log_z = ops.product_of_gaussians(leaves, [l.to(dtype) for l in logvars])[2]
        return torch.autograd.grad(log_z.sum(), leaves)

    for got, want in zip(gradients(torch.float32, backend), gradients(F64, "reference"), strict=True):
        assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_log_variances_beyond_float32_only_where_it_overflows():
    means, logvars = [torch.zeros(1, 2), torch.ones(1, 2)], [-100.0, torch.tensor(-101.0)]
    mean, log_precision, _ = ops.product_of_gaussians(means, logvars)
    share = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(mean, torch.full((1, 2), share))
    torch.testing.assert_close(log_precision, torch.full((1, 2), 101 + math.log1p(math.exp(-1.0))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_float32(dtype):
    means, logvars = random(3, 4, 50, dtype)
    got = ops.product_of_gaussians(means, logvars)
    exact = ops.product_of_gaussians([m.double() for m in means], [l.double() for l in logvars])
    assert [g.dtype for g in got] == [dtype, torch.float32, torch.float32]
    torch.testing.assert_close(got[0], exact[0].to(dtype), atol=0, rtol=torch.finfo(dtype).eps)
    for g, e in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(g, e.float(), atol=1e-5, rtol=1e-6)


def test_images_scalars_and_shared_variances():
    means = [torch.randn(3, 2, 4, 4, dtype=F64) for _ in range(2)]
    shared = torch.randn(3, 1, dtype=F64)
    got = ops.product_of_gaussians(means, [shared, 0.5])
    full = [shared.view(3, 1, 1, 1).expand(3, 2, 4, 4), torch.full((3, 2, 4, 4), 0.5, dtype=F64)]
    want = ops.product_of_gaussians(means, full)
    assert got[0].shape == got[1].shape == (3, 2, 4, 4)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_target_is_the_mean_of_the_product():
    eps, others = torch.randn(5, 2, 3, dtype=F64), [torch.randn(5, 2, 3, dtype=F64) for _ in range(3)]
    psi = torch.rand(3, 5, dtype=F64)
    target, weight = ops.pog_target(eps, others, psi)
    exponents = torch.cat([torch.ones(1, 5, dtype=F64), psi])
    mean, log_precision, _ = ops.product_of_gaussians([eps, *others], [0.0] * 4, exponents)
    torch.testing.assert_close(target, mean)
    torch.testing.assert_close(weight, log_precision.exp()[:, 0, 0])


def test_no_neighbour_is_the_noise_bit_for_bit():
    eps, other = torch.randn(4, 6, dtype=torch.bfloat16), torch.randn(4, 6, dtype=torch.bfloat16)
    target, weight = ops.pog_target(eps, other, torch.zeros(4))
    assert torch.equal(target, eps)
    assert torch.equal(weight, torch.ones(4))


def test_an_unused_output_and_none_at_all():
    means, logvars = random(2, 3, 4)
    leaf = means[0].requires_grad_()
    log_z = ops.product_of_gaussians(means, logvars)[2]
    assert torch.autograd.grad(log_z.sum(), leaf)[0].any()
    empty = ops.product_of_gaussians([torch.zeros(0, 4)], [torch.zeros(0, 1)])
    assert [o.shape for o in empty] == [(0, 4), (0, 4), (0,)]


m, ones = torch.zeros(3, 4), torch.ones(2)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (([], []), ValueError, "means and logvars must be K >= 1 of each, got 0 and 0"),
        (([m, m], [m]), ValueError, "means and logvars must be K >= 1 of each, got 2 and 1"),
        (([m, [1.0]], [m, m]), TypeError, r"means\[1\] must be a tensor"),
        (([m, m[:2]], [m, m]), ValueError, r"means\[1\] must be means\[0\]'s shape = \[3, 4\]"),
        (([m, m.double()], [m, m]), TypeError, r"means\[1\] must have means\[0\]'s dtype"),
        (([m], [m[:, :2]]), ValueError, r"logvars\[0\] must be means\[0\]'s shape, that with a last 1, or a scalar"),
        (([m], [m.double()]), TypeError, r"logvars\[0\] must have means\[0\]'s dtype"),
        (([m], [math.nan]), ValueError, r"logvars\[0\] must be finite, got nan"),
        (([m], ["0"]), TypeError, r"logvars\[0\] must be a tensor"),
        (([m, m], [m, m], ones.double()[:1]), ValueError, r"exponents must be \[K\] or \[K, B\] = \[2, 3\]"),
        (([m, m], [m, m], -ones), ValueError, "exponents must be not negative and finite, got -1"),
        (([m, m], [m, m], 0 * ones), ValueError, "exponents summed over K must be positive, got 0"),
        (([m, m], [m, m], ones.clone().requires_grad_()), ValueError, "exponents is a constant"),
        (([m, m.to("meta")], [m, m]), ValueError, r"means\[1\] must be on cpu"),
    ],
)
def test_refusals(args, error, text):
    with pytest.raises(error, match=f"product_of_gaussians: .*{text}"):
        ops.product_of_gaussians(*args)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((m, m[:2], torch.ones(3)), ValueError, "neighbours must be eps's shape"),
        ((m, [m, m.double()], torch.ones(2, 3)), TypeError, r"neighbours\[1\] must have eps's dtype"),
        ((m, [], torch.ones(0, 3)), ValueError, "neighbours must be a tensor like eps or K >= 1 of them, got none"),
        ((m, m, torch.ones(2)), ValueError, r"psi must be \[B\] = \[3\]"),
        ((m, [m, m], torch.ones(3)), ValueError, r"psi must be \[K, B\] = \[2, 3\]"),
        ((m, m, -torch.ones(3)), ValueError, "psi must be not negative and finite, got -1"),
    ],
)
def test_refusals_of_the_target(args, error, text):
    with pytest.raises(error, match=f"pog_target: {text}"):
        ops.pog_target(*args)
