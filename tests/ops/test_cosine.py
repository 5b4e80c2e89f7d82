"""Golden values, laws, numerics and refusals of cosine_contrastive_loss, supcon_loss and distance_hinge_loss."""

import math
import warnings

import pytest
import torch

from imbdiff import ops
from imbdiff.ops._op import call

from .rules import back_ends

F64 = torch.float64
BACKENDS = back_ends("cosine_contrastive", "cpu")


def mu():
    i, d = torch.arange(4.0, dtype=F64)[:, None], torch.arange(5.0, dtype=F64)
    return torch.sin(i + 2 * d)


def test_golden_values():
    assert ops.cosine_contrastive_loss(mu()).item() == pytest.approx(0.01770066607182752, rel=1e-13)
    rows = [0.004449534, 0.0147547724, 0.0308676842, 0.0207306738]
    for i, want in enumerate(rows):
        one = torch.eye(4, dtype=F64)[i]
        assert 4 * ops.cosine_contrastive_loss(mu(), weight=one).item() == pytest.approx(want, abs=1e-9)
    labels = torch.tensor([0, 1, 0, 1])
    assert ops.supcon_loss(mu(), labels).item() == pytest.approx(9.89375507533001, rel=1e-13)


def test_golden_hinge():
    """From the golden squared distances: (0,1) 2.549, (1,2) 2.297, (2,3) 2.049 lie below a margin of 3."""
    short = [3 - 2.5490778079, 3 - 2.2972712652, 3 - 2.0489122058]
    want = sum(2 * s * s for s in short) / 12
    assert ops.distance_hinge_loss(mu(), margin=3.0).item() == pytest.approx(want, abs=1e-9)
    assert ops.distance_hinge_loss(mu(), margin=0.6, per_dim=True).item() == pytest.approx(want / 25, abs=1e-9)


def cosine_brute(x, tau, weight, include_self, negatives):
    """Term by term from the definition."""
    y = x if negatives is None else torch.cat([x, negatives])
    s = torch.nn.functional.cosine_similarity(x.flatten(1)[:, None], y.flatten(1)[None], dim=2) / tau
    keep = torch.ones_like(s, dtype=torch.bool)
    keep[:, : len(x)] = ~torch.eye(len(x), dtype=torch.bool)
    e = (s.exp() * keep).sum(1)
    rows = (e + math.exp(1 / tau)).log() - 1 / tau if include_self else e.log() - math.log(len(y) - 1)
    return (rows if weight is None else rows * weight).mean()


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("M", [None, 0, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_cosine_against_the_definition(include_self, M, weighted):
    x = torch.randn(6, 2, 4, dtype=F64, requires_grad=True)
    negatives = None if M is None else torch.randn(M, 2, 4, dtype=F64)
    weight = torch.rand(6, dtype=F64) if weighted else None
    more = {"tau": 0.3, "weight": weight, "include_self": include_self, "negatives": negatives}
    got = ops.cosine_contrastive_loss(x, **more)
    want = cosine_brute(x, 0.3, weight, include_self, negatives if M else None)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])
    assert torch.autograd.gradcheck(lambda z: ops.cosine_contrastive_loss(z, **more), x)


def test_gradients_of_supcon_and_hinge():
    x = torch.randn(7, 4, dtype=F64, requires_grad=True)
    labels, weight = torch.tensor([0, 1, 0, 2, 1, 1, 3]), torch.rand(7, dtype=F64)
    assert torch.autograd.gradcheck(lambda z: ops.supcon_loss(z, labels, tau=0.4, weight=weight), x)
    assert torch.autograd.gradcheck(lambda z: ops.distance_hinge_loss(z, margin=6.0), x)


def test_against_info_nce_pytorch():
    """CCUA's construction: each row is its own positive, the others are its negatives."""
    from info_nce import info_nce

    x = torch.randn(9, 12, dtype=F64, requires_grad=True)
    others = torch.stack([torch.cat([x[:i], x[i + 1 :]]) for i in range(9)])
    theirs = info_nce(x, x, others, temperature=0.1, negative_mode="paired", reduction="none")
    weight = torch.rand(9, dtype=F64)
    want, got = (weight * theirs).mean(), ops.cosine_contrastive_loss(x, weight=weight)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])
    torch.testing.assert_close(ops.cosine_contrastive_loss(x), info_nce(x, x, temperature=0.1))


def metric_learning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = pytest.importorskip("pytorch_metric_learning.losses")
    return losses


def test_against_pytorch_metric_learning_supcon():
    x = torch.randn(12, 10, dtype=F64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1, 1, 4, 2])
    theirs = metric_learning().SupConLoss(temperature=0.1)(x, labels)
    got = ops.supcon_loss(x, labels)
    torch.testing.assert_close(got, theirs, rtol=1e-9, atol=0)
    ours, other = (torch.autograd.grad(v, x)[0] for v in (got, theirs))
    torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-9)


def test_against_pytorch_metric_learning_nt_xent():
    """Two rows a label: NT-Xent is SupCon with one positive."""
    x, labels = torch.randn(10, 6, dtype=F64), torch.arange(5).repeat(2)
    theirs = metric_learning().NTXentLoss(temperature=0.5)(x, labels)
    torch.testing.assert_close(ops.supcon_loss(x, labels, tau=0.5), theirs, rtol=1e-9, atol=0)


def test_bounds_and_invariances():
    x, labels = torch.randn(12, 30, dtype=F64), torch.arange(12) % 3
    q, order = torch.linalg.qr(torch.randn(30, 30, dtype=F64))[0], torch.randperm(12)
    assert 0 <= ops.cosine_contrastive_loss(x) <= math.log(12)
    same = ops.cosine_contrastive_loss(x[:1].expand(12, 30))
    assert same.item() == pytest.approx(math.log(12), abs=1e-12)
    scales = torch.rand(12, 1, dtype=F64) + 0.1
    for moved, lab in ((x @ q, labels), (x[order], labels[order]), (x * scales, labels)):
        torch.testing.assert_close(ops.cosine_contrastive_loss(moved), ops.cosine_contrastive_loss(x))
        torch.testing.assert_close(ops.supcon_loss(moved, lab), ops.supcon_loss(x, labels))
    for moved in (x @ q, x[order], x + 100):
        hinge = ops.distance_hinge_loss(moved, margin=70.0)
        torch.testing.assert_close(hinge, ops.distance_hinge_loss(x, margin=70.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_rows_in_low_precision_do_not_overflow(dtype):
    """e^(1/tau) is 22026: the sum over 128 equal rows would overflow in float16."""
    x = torch.randn(1, 64).expand(128, 64).to(dtype).requires_grad_()
    loss = ops.cosine_contrastive_loss(x, tau=0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(128), rel=1e-5)
    loss.backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    assert ops.supcon_loss(x, torch.zeros(128, dtype=torch.int64)).item() == pytest.approx(math.log(127), rel=1e-5)


def test_small_losses_keep_their_digits():
    """Orthogonal rows: the loss is log1p(11 e^-10) = 5e-4, of which lse - 10 in float32 would keep three digits."""
    x = torch.eye(12)
    assert ops.cosine_contrastive_loss(x).item() == pytest.approx(math.log1p(11 * math.exp(-10)), rel=1e-6)


def test_nearly_equal_rows_and_a_common_offset():
    torch.manual_seed(0)
    base = torch.randn(1, 256)
    for x in (base + 1e-3 * torch.randn(20, 256), torch.randn(20, 256) + 100 * base / base.norm()):
        for f in (
            lambda v: ops.cosine_contrastive_loss(v),
            lambda v: ops.cosine_contrastive_loss(v, include_self=False),
            lambda v: ops.supcon_loss(v, torch.arange(20) % 4),
        ):
            assert abs(f(x).double() - f(x.double())) < 1e-5
        near = ops.distance_hinge_loss(x.double(), margin=600.0)
        assert abs(ops.distance_hinge_loss(x, margin=600.0).double() - near) < 1e-5 * (1 + near)


def edge_rows(odd, N, D, dtype):
    """Row 4 is an odd one; rows 0 and 1 have one direction, rows 2 and 3 opposite ones; lengths as they come."""
    x = torch.randn(N, D, dtype=F64)
    x[1], x[3] = 2 * x[0], -3 * x[2]
    x[4] *= odd if odd != odd else odd / x[4].norm()
    return x.to(dtype)


PLANS = pytest.mark.parametrize("split_k", [False, True], ids=["stream", "split"])
SHAPES = pytest.mark.parametrize(("N", "D"), [(8, 5), (70, 1100)])
LOSSES = pytest.mark.parametrize("loss", ["cosine", "others", "supcon"])


def value_and_gradient(loss, backend, x, split_k):
    x = x.clone().requires_grad_()
    weight = torch.linspace(0.1, 1, len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    if loss == "supcon":
        value = call("supcon", backend, x, torch.arange(len(x)) // 2 % 3, weight, 0.3, split_k)[0]
    else:
        negatives = 8 * x[3:6].detach().flip(0)
        value = call("cosine_contrastive", backend, x, negatives, weight, 0.3, loss == "cosine", split_k)[0]
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1e-30, 2e-12, 1e-8, 1e25, 1e30])
@LOSSES
@SHAPES
@PLANS
def test_a_row_of_any_length(backend, dtype, length, loss, N, D, split_k):
    """Its square may be beyond float32; up to 1e-12 it has no direction, hence cosine 0 and no gradient."""
    x = edge_rows(length, N, D, dtype)
    exact, want = value_and_gradient(loss, "reference", x.double(), split_k)
    got, grad = value_and_gradient(loss, backend, x, split_k)
    assert abs(got - exact) <= 2e-6 * (1 + exact)
    # A gradient goes with the inverse of its row's length.
    size = x.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    error, most = ((grad.double() - want) * size).abs(), (want * size).abs().max()
    assert grad.isfinite().all()
    assert error.max() <= (5e-6 if dtype == torch.float32 else 2e-2) * most
    assert bool(grad[4].any()) == (length > 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [-20, 15, 55, 60])
@LOSSES
@SHAPES
@PLANS
def test_only_directions_count(backend, exponent, loss, N, D, split_k):
    """All rows longer: the same loss, a gradient smaller by as much. Squares may overflow, and products of lengths."""
    x = torch.randn(N, D)
    value, grad = value_and_gradient(loss, backend, x, split_k)
    other, smaller = value_and_gradient(loss, backend, x * 2.0**exponent, split_k)
    assert abs(other - value) <= 1e-6 * (1 + value.abs())
    assert (smaller * 2.0**exponent - grad).abs().max() <= 1e-5 * grad.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@LOSSES
@SHAPES
@PLANS
def test_a_row_of_nan_reaches_all(backend, loss, N, D, split_k):
    x = edge_rows(math.nan, N, D, torch.float32)
    value, grad = value_and_gradient(loss, backend, x, split_k)
    assert value.isnan()
    assert grad.isnan().all()


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_compare_is_zero_with_zero_gradient(n):
    labels = torch.zeros(n, dtype=torch.int64)
    for f in (
        lambda v: ops.cosine_contrastive_loss(v),
        lambda v: ops.cosine_contrastive_loss(v, include_self=False),
        lambda v: ops.supcon_loss(v, labels),
        lambda v: ops.distance_hinge_loss(v, margin=1.0),
    ):
        x = torch.randn(n, 5, requires_grad=True)
        loss = f(x)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()


def test_no_valid_anchor_is_zero_with_zero_gradient():
    x = torch.randn(5, 3, requires_grad=True)
    loss = ops.supcon_loss(x, torch.arange(5))
    loss.backward()
    assert loss == 0
    assert not x.grad.any()


def test_a_hinge_of_nan_is_nan():
    x = torch.randn(5, 4)
    x[2, 1] = torch.nan
    assert ops.distance_hinge_loss(x, margin=1.0).isnan()


x, label = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("f", "args", "more", "error", "text"),
    [
        ("cosine_contrastive", ([1.0],), {}, TypeError, "x must be a tensor"),
        ("cosine_contrastive", (x.long(),), {}, TypeError, "x must be one of float32"),
        ("cosine_contrastive", (x,), {"tau": 0.0}, ValueError, "tau must be a positive finite number, got 0.0"),
        ("cosine_contrastive", (x,), {"tau": math.nan}, ValueError, "tau must be a positive finite number, got nan"),
        ("cosine_contrastive", (x,), {"weight": torch.ones(2)}, ValueError, r"weight must be \[N\] = \[3\]"),
        ("cosine_contrastive", (x,), {"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight is a constant"),
        ("cosine_contrastive", (x,), {"negatives": x[:, :2]}, ValueError, r"negatives must be \[M, ...\]"),
        ("cosine_contrastive", (x,), {"negatives": x.double()}, TypeError, "negatives must have x's dtype"),
        ("cosine_contrastive", (x,), {"negatives": x.clone().requires_grad_()}, ValueError, "negatives is a constant"),
        ("supcon", (x, label[:2]), {}, ValueError, r"labels must be \[N\] = \[3\]"),
        ("supcon", (x, label.float()), {}, TypeError, "labels must be one of int64"),
        ("supcon", (x, [0, 0, 0]), {}, TypeError, "labels must be a tensor"),
        ("supcon", (x, label), {"tau": -1.0}, ValueError, "tau must be a positive finite number, got -1.0"),
        ("distance_hinge", (x,), {"margin": 0.0}, ValueError, "margin must be a positive finite number, got 0.0"),
        ("distance_hinge", (torch.zeros(()),), {"margin": 1.0}, ValueError, "x must be .*, got a scalar"),
    ],
)
def test_refusals(f, args, more, error, text):
    with pytest.raises(error, match=f"{f}_loss: {text}"):
        getattr(ops, f"{f}_loss")(*args, **more)
