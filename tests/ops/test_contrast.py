"""Golden values, laws and refusals of negative_distance_loss."""

import math

import pytest
import torch

from imbdiff import ops
from imbdiff.ops import _backends
from imbdiff.ops._op import overload


def mu():
    i, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5.0, dtype=torch.float64)
    return torch.sin(i + 2 * d)


def test_golden_values():
    kwargs = {"tau": 0.5, "per_dim": True}
    assert ops.negative_distance_loss(mu(), **kwargs).item() == pytest.approx(-0.8729599714688224, rel=1e-13)
    without = ops.negative_distance_loss(mu(), **kwargs, include_self=False)
    assert without.item() == pytest.approx(-1.4978172438078718, rel=1e-13)
    rows = ops.negative_distance_loss(mu(), tau=1.0, include_self=False, per_row=True)
    assert rows.item() == pytest.approx(-3.0389838674846428, rel=1e-13)


def brute(x, tau, per_dim, include_self, per_row, weight, negatives):
    """Term by term from the definition."""
    y = x if negatives is None else torch.cat([x, negatives])
    d = ((x[:, None] - y[None]) ** 2).flatten(2).sum(2) / (tau * (x[0].numel() if per_dim else 1))
    keep = torch.ones_like(d, dtype=torch.bool)
    if not include_self:
        keep[:, : len(x)] = ~torch.eye(len(x), dtype=torch.bool)
    e = torch.exp(-d) * keep
    if not per_row:
        return (e.sum() / keep.sum()).log()
    rows = (e.sum(1) / keep.sum(1)).log()
    return (rows if weight is None else rows * weight).mean()


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("M", [None, 0, 3])
def test_against_the_definition(include_self, per_row, M):
    x = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    negatives = None if M is None else torch.randn(M, 2, 4, dtype=torch.float64)
    weight = torch.rand(6, dtype=torch.float64) if per_row else None
    kwargs = {"include_self": include_self, "per_row": per_row, "weight": weight, "negatives": negatives}
    got = ops.negative_distance_loss(x, tau=3.0, per_dim=True, **kwargs)
    want = brute(x, 3.0, True, include_self, per_row, weight, negatives if M else None)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])
    assert torch.autograd.gradcheck(lambda z: ops.negative_distance_loss(z, tau=3.0, **kwargs), x)


def test_bounds_and_invariances():
    x = torch.randn(12, 30, dtype=torch.float64)
    loss = ops.negative_distance_loss(x, tau=0.5, per_dim=True)
    assert -math.log(12) <= loss <= 0
    q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    for moved in (x + 100, x[torch.randperm(12)], x @ q):
        torch.testing.assert_close(ops.negative_distance_loss(moved, tau=0.5, per_dim=True), loss)
    torch.testing.assert_close(ops.negative_distance_loss(3 * x, tau=4.5, per_dim=True), loss)


def test_a_common_offset_costs_no_digits():
    x = torch.randn(40, 64)
    exact = ops.negative_distance_loss(x.double(), tau=64.0)
    offset = (x.double() + 100).float()
    want = ops.negative_distance_loss(offset.double(), tau=64.0)
    assert abs(ops.negative_distance_loss(offset, tau=64.0) - want) < 1e-5
    assert abs(want - exact) < 1e-4


@pytest.mark.parametrize(("N", "D"), [(1024, 128), (2048, 32), (700, 900)])
def test_the_gradient_is_as_exact_as_plain_torch(N, D):
    x = torch.randn(N, D) + 0.5

    def gradient(x):
        x = x.clone().requires_grad_()
        loss = ops.negative_distance_loss(x, tau=1.5, per_dim=True, include_self=False, per_row=True)
        return torch.autograd.grad(loss, x)[0].double()

    with ops.use("reference"):
        exact, plain = gradient(x.double()), gradient(x)
    assert (gradient(x) - exact).norm() <= 1.5 * (plain - exact).norm()


def far_clusters(N, D):
    """Two clusters 1e4 from each other, rows of one about 1.4 apart."""
    x = torch.randn(N, D, dtype=torch.float64) / D**0.5
    x[::2] += 1e4 * torch.nn.functional.normalize(torch.randn(D, dtype=torch.float64), dim=0)
    return x.float(), 1.0


def near_twins(N, D):
    """Rows of norm 100, each 1e-3 from one other."""
    x = 100 * torch.nn.functional.normalize(torch.randn(N // 2, D, dtype=torch.float64))
    return torch.cat([x, x + 1e-3 / D**0.5 * torch.randn_like(x)]).float(), 1e6


@pytest.mark.parametrize("rows", [far_clusters, near_twins])
@pytest.mark.parametrize("split_k", [False, True])
@pytest.mark.parametrize(("N", "D"), [(100, 64), (600, 200), (64, 2048)])
def test_near_pairs_among_distant_ones_keep_their_digits(rows, split_k, N, D):
    """|error of E| <= 1e-4 (1 + E) carries over to a row's log-sum-exp and, relatively, to a weight S of the gradient.

    The gradient itself, 2 scale sum_j S_ij (x_i - x_j) with sum_j S_ij <= 2 / N or so, also feels the rounding of x.
    """
    if "cpu" not in _backends.CAPABILITIES["negative_distance"] or "cpu" in _backends.PROBLEMS:
        pytest.skip("the compiled CPU library is not built")
    x, scale = rows(N, D)

    def run(x, backend):
        call = overload(f"negative_distance_{backend}"), overload(f"negative_distance_bwd_{backend}")
        args = x, x[:0], torch.empty(0, dtype=x.dtype), scale, False, True, split_k
        loss, lse, saved = call[0](*args)
        grad = call[1](torch.ones_like(loss), *args[:3], lse, saved, *args[3:])
        return lse.double(), grad.double(), saved.double()

    lse, grad, saved = run(x, "cpu")
    exact_lse, exact_grad, _ = run(x.double(), "reference")
    assert bool(((lse - exact_lse).abs() <= 1e-4 * (1 + exact_lse.abs())).all())
    rounding = torch.finfo(x.dtype).eps * 2 * scale * 2 / N * (x - x.mean(0)).norm()
    assert (grad - exact_grad).norm() <= 1e-3 * exact_grad.norm() + rounding
    if split_k:
        exact = scale * torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        near = (exact < 20).fill_diagonal_(False)
        assert near.any()
        assert bool(((saved - exact).abs() <= 1e-4 * (1 + exact))[near].all())


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_compare_is_zero_with_zero_gradient(n):
    for include_self in (True, False):
        for per_row in (True, False):
            x = torch.randn(n, 5, requires_grad=True)
            loss = ops.negative_distance_loss(x, tau=1.0, include_self=include_self, per_row=per_row)
            loss.backward()
            assert loss == 0
            assert not x.grad.any()


def test_nan_in_nan_out():
    x = torch.randn(5, 4)
    x[2, 1] = torch.nan
    assert ops.negative_distance_loss(x, tau=1.0).isnan()


x = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        (([1.0],), {"tau": 1.0}, TypeError, "x must be a tensor"),
        ((x.long(),), {"tau": 1.0}, TypeError, "x must be one of float32"),
        ((torch.zeros(()),), {"tau": 1.0}, ValueError, "got a scalar"),
        ((x,), {"tau": 0.0}, ValueError, "tau must be a positive finite number, got 0.0"),
        ((x,), {"tau": -1.0}, ValueError, "tau must be"),
        ((x,), {"tau": float("nan")}, ValueError, "tau must be"),
        ((x,), {"tau": float("inf")}, ValueError, "tau must be"),
        ((x,), {"tau": 1.0, "weight": torch.ones(3)}, ValueError, "it needs per_row=True"),
        ((x,), {"tau": 1.0, "per_row": True, "weight": torch.ones(4)}, ValueError, r"weight must be \[N\] = \[3\]"),
        ((x,), {"tau": 1.0, "negatives": torch.ones(2, 5)}, ValueError, "negatives must be"),
        ((x,), {"tau": 1.0, "negatives": x.double()}, TypeError, "negatives must have x's dtype"),
        ((x,), {"tau": 1.0, "negatives": x.clone().requires_grad_()}, ValueError, "negatives is a constant"),
        ((x,), {"tau": 1.0, "negatives": x.to("meta")}, ValueError, "negatives must be on cpu"),
    ],
)
def test_refusals(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        ops.negative_distance_loss(*args, **kwargs)
