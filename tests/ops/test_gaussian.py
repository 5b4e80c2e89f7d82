"""Golden values, laws, numerics and refusals of gaussian_divergence and gaussian_overlap_loss."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from imbdiff import ops
from imbdiff.ops import _gaussians

from .rules import back_ends

F64 = torch.float64
KINDS = ("kl", "jeffreys", "bhattacharyya")


def golden():
    i, j, d = (torch.arange(float(n), dtype=F64) for n in (4, 3, 5))
    i, j = i[:, None], j[:, None]
    return torch.sin(i + 2 * d), 0.5 * torch.cos(2 * i - d), torch.cos(3 * j + d), 0.3 * torch.sin(j + d)


def random(N, D, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, D, generator=g, dtype=F64).to(dtype) for _ in range(2)]


def overlap_brute(d, form, margin, chosen, weight, reduction):
    f = (margin - d).clamp_min(0) if form == "hinge" else 1 / (1 + d)
    total = torch.where(chosen, f * weight[:, None], 0).sum()
    return total / chosen.sum().clamp_min(1) if reduction == "mean" else total


def test_golden_values():
    p, q = golden()[:2], golden()[2:]
    kl = ops.gaussian_divergence(*p, *q)
    torch.testing.assert_close(
        kl[0], torch.tensor([2.7200256856, 2.8783594828, 2.7324569456], dtype=F64), atol=1e-10, rtol=0
    )
    assert kl.sum().item() == pytest.approx(35.653699754087256, rel=1e-14)
    assert ops.gaussian_divergence(*q, *p).sum().item() == pytest.approx(37.59218433939574, rel=1e-14)
    assert ops.gaussian_divergence(*p, *q, "jeffreys").sum().item() == pytest.approx(73.245884093483, rel=1e-14)
    assert ops.gaussian_divergence(*p, *q, "bhattacharyya").sum().item() == pytest.approx(8.814471384232125, rel=1e-14)
    hinge = ops.gaussian_overlap_loss(*p, *q, margin=6.0, pairs="all", reduction="sum")
    assert hinge.item() == pytest.approx(36.346300245912744, rel=1e-14)


def test_golden_gradients():
    leaves = [x.requires_grad_() for x in golden()]
    grads = torch.autograd.grad(ops.gaussian_divergence(*leaves).sum(), leaves)
    want = [
        [-0.9618057524, 1.6254205661, -2.0237720397, -0.0321284207, 4.3640160218],
        [0.592355102, 0.1355430843, -0.2920599126, -0.4189964298, -0.1745394986],
        [2.1081115803, 2.1959274101, -0.2484971655, -5.5011220557, -3.1021159029],
        [-1.2846630874, -1.3437641555, -0.1220667341, -4.2021271599, -2.9953709265],
    ]
    for g, w in zip(grads, want, strict=True):
        torch.testing.assert_close(g[0], torch.tensor(w, dtype=F64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shared", [(False, False), (True, False), (True, True)])
def test_against_torch_distributions(shared):
    (mp, lp), (mq, lq) = random(5, 7), random(4, 7, seed=1)
    lp, lq = (x[:, :1] if s else x for x, s in zip((lp, lq), shared, strict=True))
    p = Independent(Normal(mp[:, None], (lp[:, None] / 2).exp().expand(5, 1, 7)), 1)
    q = Independent(Normal(mq[None], (lq[None] / 2).exp().expand(1, 4, 7)), 1)
    forward, reverse = kl_divergence(p.expand((5, 4)), q.expand((5, 4))), kl_divergence(q.expand((5, 4)), p)
    torch.testing.assert_close(ops.gaussian_divergence(mp, lp, mq, lq), forward)
    torch.testing.assert_close(ops.gaussian_divergence(mp, lp, mq, lq, "jeffreys"), forward + reverse)


def test_bhattacharyya_against_integration():
    x = torch.linspace(-30, 30, 400_001, dtype=F64)
    (mp, lp), (mq, lq) = random(3, 1), random(2, 1, seed=1)
    for i in range(3):
        for j in range(2):
            p, q = Normal(mp[i], (lp[i] / 2).exp()), Normal(mq[j], (lq[j] / 2).exp())
            bc = torch.trapezoid(((p.log_prob(x) + q.log_prob(x)) / 2).exp(), x)
            d = ops.gaussian_divergence(mp[i : i + 1], lp[i : i + 1], mq[j : j + 1], lq[j : j + 1], "bhattacharyya")
            assert math.exp(-d.item()) == pytest.approx(bc.item(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True), (True, True)])
def test_gradients_of_the_divergence(kind, shared):
    (mp, lp), (mq, lq) = random(3, 4), random(2, 4, seed=1)
    lp, lq = (x[:, :1] if s else x for x, s in zip((lp, lq), shared, strict=True))
    leaves = [x.clone().requires_grad_() for x in (mp, lp, mq, lq)]
    assert torch.autograd.gradcheck(lambda *x: ops.gaussian_divergence(*x, kind), leaves)


@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 77_680), (torch.bfloat16, 155_360)])
@pytest.mark.parametrize("kind", ["kl", "bhattacharyya"])
def test_gradients_of_more_than_a_cache_holds(kind, dtype, D):
    """Rows of whole cache lines are written past the caches; a dimension more, alike in both sets, makes them none."""
    x, more = random(14, D, dtype) + random(13, D, dtype, seed=1), torch.randn(14, 13)

    def gradients(x):
        leaves = [v.clone().requires_grad_() for v in x]
        return torch.autograd.grad(ops.gaussian_divergence(*leaves, kind), leaves, more)

    for whole, cut in zip(gradients(x), gradients([torch.nn.functional.pad(v, (0, 1)) for v in x]), strict=True):
        torch.testing.assert_close(whole, cut[:, :-1])


@pytest.mark.parametrize("form", ["hinge", "reciprocal"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_overlap(kind, form):
    leaves = [x.clone().requires_grad_() for x in (*random(4, 3), *random(3, 3, seed=1))]
    more = {"kind": kind, "form": form, "margin": 3.0 if form == "hinge" else None, "weight": torch.rand(4, dtype=F64)}
    chosen = torch.rand(4, 3) < 0.7
    assert torch.autograd.gradcheck(lambda *x: ops.gaussian_overlap_loss(*x, mask=chosen, **more), leaves)
    own = leaves[:2]
    assert torch.autograd.gradcheck(lambda *x: ops.gaussian_overlap_loss(*x, pairs="all", **more), own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["hinge", "reciprocal"])
@pytest.mark.parametrize("pairs", ["different", "same", "all", "mask"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("own", [True, False])
def test_overlap_against_the_matrix(kind, form, pairs, reduction, own):
    p, q = random(9, 5), random(9 if own else 6, 5, seed=1)
    q = p if own else q
    labels_p = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2, 5])
    labels_q = labels_p if own else torch.tensor([2, 1, 0, 7, 7, 1])
    mask = torch.arange(9 * len(labels_q)).view(9, -1) % 3 == 0
    weight = torch.rand(9, dtype=F64)
    equal = labels_p[:, None] == labels_q
    chosen = {"different": ~equal, "same": equal, "all": torch.ones_like(equal), "mask": mask}[pairs]
    chosen = chosen & ~torch.eye(9, dtype=torch.bool) if own else chosen
    more = {"mask": mask} if pairs == "mask" else {"pairs": pairs}
    if pairs in ("different", "same"):
        more |= {"labels_p": labels_p} | ({} if own else {"labels_q": labels_q})
    margin = 1.5 if form == "hinge" else None
    got = ops.gaussian_overlap_loss(
        *p,
        *(() if own else q),
        kind=kind,
        form=form,
        margin=margin,
        per_dim=True,
        weight=weight,
        reduction=reduction,
        **more,
    )
    d = ops.gaussian_divergence(*p, *q, kind) / 5
    torch.testing.assert_close(got, overlap_brute(d, form, margin, chosen, weight, reduction))


@pytest.mark.parametrize("form", ["hinge", "reciprocal"])
def test_no_selected_pair_is_zero_with_zero_gradient(form):
    margin = 2.0 if form == "hinge" else None
    for n, more in [
        (3, {"labels_p": torch.zeros(3, dtype=torch.int64)}),
        (3, {"mask": torch.zeros(3, 3, dtype=torch.bool)}),
        (1, {"pairs": "all"}),
        (0, {"pairs": "all"}),
    ]:
        mean, logvar = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4, requires_grad=True)
        loss = ops.gaussian_overlap_loss(mean, logvar, form=form, margin=margin, **more)
        loss.backward()
        assert loss == 0
        assert not mean.grad.any()
        assert not logvar.grad.any()


def test_a_hinge_leaves_distant_pairs_alone():
    mean = 100 * torch.eye(4, dtype=F64).requires_grad_()
    loss = ops.gaussian_overlap_loss(mean, 0.0, margin=5000.0, pairs="all")
    assert loss == 0
    assert not torch.autograd.grad(loss, mean)[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_nonnegative_zero_for_itself_and_unmoved_by_a_shift(kind):
    (mp, lp), (mq, lq) = random(6, 8), random(6, 8, seed=1)
    d = ops.gaussian_divergence(mp, lp, mq, lq, kind)
    assert (d > 0).all()
    torch.testing.assert_close(ops.gaussian_divergence(mp + 3, lp, mq + 3, lq, kind), d)
    torch.testing.assert_close(ops.gaussian_divergence(mp * 2, lp + math.log(4), mq * 2, lq + math.log(4), kind), d)
    for dtype in (F64, torch.float32):
        own = ops.gaussian_divergence(*[x.to(dtype) for x in (mp, lp, mp, lp)], kind)
        assert torch.equal(own.diag(), torch.zeros(6, dtype=dtype))
    if kind != "kl":
        torch.testing.assert_close(ops.gaussian_divergence(mq, lq, mp, lp, kind), d.T)


def test_leading_sizes_scalars_and_images_of_them():
    mean_p, mean_q = torch.randn(2, 3, 4, 5, dtype=F64), torch.randn(2, 3, 6, 5, dtype=F64)
    logvar = torch.randn((), dtype=F64)
    got = ops.gaussian_divergence(mean_p, logvar, mean_q, -0.5)
    want = ops.gaussian_divergence(mean_p[1, 2], logvar.expand(4, 5), mean_q[1, 2], torch.full((6, 1), -0.5, dtype=F64))
    assert got.shape == (2, 3, 4, 6)
    torch.testing.assert_close(got[1, 2], want)


def near_and_far(logvar, offset=0.0, D=2048):
    """40 rows q, and rows p of which each lies near one of them, in float32."""
    g = torch.Generator().manual_seed(0)
    scale = math.exp(logvar / 2)
    shift = torch.randn(D, generator=g)
    q = torch.randn(40, D, generator=g) + offset * shift / shift.norm()
    p = q[:30] + 0.05 * scale * torch.randn(30, D, generator=g)
    return [p, logvar + 0.02 * torch.randn(30, D, generator=g), q, logvar + 0.02 * torch.randn(40, D, generator=g)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("logvar", "offset"), [(math.log(1e-4), 0), (math.log(1e4), 0), (0, 100), (-30, 0), (30, 0)])
def test_close_pairs_keep_their_digits(kind, logvar, offset):
    """Nearly equal rows among distant ones, at variances from e^-30 to e^30 and a common offset of norm 100."""
    rows = near_and_far(logvar, offset)
    got = ops.gaussian_divergence(*rows, kind)
    exact = ops.gaussian_divergence(*[x.double() for x in rows], kind)
    close = exact < 20
    assert close.sum() >= 30
    assert ((got.double() - exact).abs() <= 1e-4 * (1 + exact))[close].all()
    assert got.isfinite().all()
    margin = 8.0
    loss = ops.gaussian_overlap_loss(*rows, kind=kind, margin=margin, pairs="all", reduction="sum")
    want = (margin - exact).clamp_min(0).sum()
    assert abs(loss.double() - want) <= 1e-5 * want


def test_gradients_near_overlap_keep_their_digits():
    rows = [x.requires_grad_() for x in near_and_far(math.log(1e-4), 100)]
    more = {"margin": 8.0, "pairs": "all", "reduction": "sum"}
    got = torch.autograd.grad(ops.gaussian_overlap_loss(*rows, **more), rows)
    exact = [x.detach().double().requires_grad_() for x in rows]
    want = torch.autograd.grad(ops.gaussian_overlap_loss(*exact, **more), exact)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= 1e-5 * w.abs().max()


@pytest.mark.parametrize("backend", [b for b in back_ends("gaussian_divergence", "cpu") if b != "reference"])
@pytest.mark.parametrize("kind", ["kl", "jeffreys"])
def test_a_row_whose_variance_overflows_leaves_the_others_alone(kind, backend):
    """e^l of the first Gaussians is more than float32 holds beside the others': they meet each other, nobody else does.

    The derivative of torch's own exponential times a gradient of 0 is NaN there.
    """
    level = torch.tensor([54.0] + [-40.0] * 39)[:, None]
    rows = [x for _ in range(2) for x in (torch.randn(40, 4) * math.exp(-20), torch.randn(40, 4) + level)]
    meet = (level == level.T).float()

    def gradients(dtype, backend):
        x = [v.to(dtype).requires_grad_() for v in rows]
        with ops.use(backend):
            return torch.autograd.grad(ops.gaussian_divergence(*x, kind), x, meet.to(dtype))

    for got, want in zip(gradients(torch.float32, backend), gradients(F64, "reference"), strict=True):
        assert ((got.double() - want).abs().amax(1) <= 1e-5 * want.abs().amax(1)).all()
    x = [v.clone().requires_grad_() for v in rows]
    with ops.use(backend):
        loss = ops.gaussian_overlap_loss(*x, kind=kind, margin=5.0, pairs="all")
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, x))


def test_overflow_is_infinite_not_clamped():
    d = ops.gaussian_divergence(torch.zeros(1, 3), 100.0, torch.ones(1, 3), -100.0)
    assert d.item() == math.inf
    assert ops.gaussian_divergence(torch.zeros(1, 3), 40.0, torch.ones(1, 3), -40.0).isfinite()


def test_nan_in_nan_out():
    mean = torch.zeros(3, 4)
    mean[1, 2] = torch.nan
    d = ops.gaussian_divergence(mean, 0.0, torch.zeros(2, 4), 0.0)
    assert d[1].isnan().all()
    assert not d[[0, 2]].isnan().any()
    assert ops.gaussian_overlap_loss(mean, 0.0, margin=1.0, pairs="all").isnan()


def test_a_matrix_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    rows = torch.zeros(1, 1).expand(3_000_000, 1)
    with pytest.raises(
        ValueError, match=r"3000000 x 3000000 matrix would take 33527.6 GiB, cpu has .* GiB free; gauss"
    ):
        ops.gaussian_divergence(rows, 0.0, rows, 0.0)
    monkeypatch.setattr(_gaussians, "free_bytes", lambda device: 2**29)
    rows = torch.zeros(1, 1, requires_grad=True).expand(10_000, 1)
    with pytest.raises(
        ValueError, match="matrix and its gradient would take 0.7 GiB, cpu has 0.5 GiB free; gaussian_ov"
    ):
        ops.gaussian_divergence(rows, 0.0, rows, 0.0)
    # Without a gradient there is one copy, and 0.37 GiB are there.
    _gaussians.refuse_what_does_not_fit("f", (10_000, 10_000), rows, 1, "")


def test_free_memory_is_known_here():
    assert 2**20 < _gaussians.free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("more", [{"labels_p": torch.tensor([0, 1, 0, 2])}, {"pairs": "all"}])
def test_the_overlap_of_a_set_with_itself_compiles_into_one_graph(more):
    torch._dynamo.reset()
    p = [x.requires_grad_() for x in random(4, 5)]

    def loss(*p):
        return ops.gaussian_overlap_loss(*p, margin=9.0, **more)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*p), p), torch.autograd.grad(loss(*p), p), strict=True):
        torch.testing.assert_close(a, b)


m, label = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (([1.0], m, m, m), TypeError, "mean_p must be a tensor"),
        ((m[0], m[0], m, m), ValueError, r"mean_p must be \[..., N, D\], got"),
        ((m, m, m[:, :3], m), ValueError, r"mean_q must be \[..., M, D\] with mean_p's other sizes = \[any, 4\]"),
        ((m[None], m[None], m, m), ValueError, "mean_q must be"),
        ((m, m, m.double(), m), TypeError, "mean_q must have mean_p's dtype"),
        ((m, m[:2], m, m), ValueError, "logvar_p must be mean_p's shape, that with a last 1, or a scalar"),
        ((m, m, m, m.double()), TypeError, "logvar_q must have mean_q's dtype"),
        ((m, math.inf, m, m), ValueError, "logvar_p must be finite, got inf"),
        ((m, None, m, m), TypeError, "logvar_p must be a tensor"),
        ((m, m, m.to("meta"), m), ValueError, "mean_q must be on cpu"),
        ((m, m, m, m, "js"), ValueError, "kind must be one of 'kl', 'jeffreys', 'bhattacharyya', got 'js'"),
    ],
)
def test_refusals_of_the_divergence(args, error, text):
    with pytest.raises(error, match=f"gaussian_divergence: {text}"):
        ops.gaussian_divergence(*args)


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        ({}, ValueError, "which pairs"),
        ({"pairs": "different"}, ValueError, "pairs='different' compares labels; pass labels_p"),
        ({"pairs": "some"}, ValueError, "pairs must be one of 'all', 'different', 'same', got 'some'"),
        ({"labels_p": label, "mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "labels and mask both select"),
        ({"labels_p": label[:2]}, ValueError, r"labels_p must be \[N\] = \[3\]"),
        ({"labels_p": label.float()}, TypeError, "labels_p must be one of int64"),
        ({"labels_p": label.int()}, TypeError, "labels_p must be one of int64"),
        ({"labels_p": label, "labels_q": label}, ValueError, "labels_q are the labels of mean_q"),
        ({"labels_p": label, "mean_q": m, "logvar_q": m}, ValueError, r"labels_q \[M\] must come with labels_p"),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"mask must be \[N, M\] = \[3, 3\]"),
        ({"mask": torch.ones(3, 3)}, TypeError, "mask must be one of bool"),
        ({"pairs": "all", "mean_q": m}, ValueError, "mean_q and logvar_q come together"),
        ({"pairs": "all", "margin": None}, ValueError, "the hinge needs a margin; there is no default"),
        ({"pairs": "all", "margin": 0.0}, ValueError, "margin must be a positive finite number, got 0.0"),
        ({"pairs": "all", "form": "reciprocal"}, ValueError, "margin belongs to form 'hinge'"),
        ({"pairs": "all", "form": "square"}, ValueError, "form must be one of 'hinge', 'reciprocal', got 'square'"),
        ({"pairs": "all", "reduction": "none"}, ValueError, "reduction must be one of 'sum', 'mean', got 'none'"),
        ({"pairs": "all", "weight": torch.ones(2)}, ValueError, r"weight must be \[N\] = \[3\]"),
        ({"pairs": "all", "weight": torch.ones(3, requires_grad=True)}, ValueError, "weight is a constant"),
    ],
)
def test_refusals_of_the_overlap(more, error, text):
    with pytest.raises(error, match=f"gaussian_overlap_loss: {text}"):
        ops.gaussian_overlap_loss(m, m, **{"margin": 1.0, **more})
