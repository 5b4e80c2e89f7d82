"""Metamorphic laws over generated shapes, layouts, offsets, scales and types, on every back end at hand.

More than 2,000 generated cases in all. A law compares an operation with itself on arguments that must give the same,
so it holds a compiled back end as it holds the reference. Tolerances are rounding: eps of float32 (float64 for float64)
times the size of what is added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from imbdiff import ops
from imbdiff.ops import _backends

F64 = torch.float64
CASES = 200
law = settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEED = st.integers(0, 2**20)
WIDTH = st.sampled_from([1, 2, 3, 5, 8, 17, 33, 64, 130])
COUNT = st.integers(2, 40)
DTYPE = st.sampled_from([F64, torch.float32, torch.bfloat16, torch.float16])
LAYOUT = st.sampled_from(["dense", "slice", "images"])
OFFSET = st.sampled_from([0.0, 1.0, 10.0])
SCALE = st.sampled_from([0.1, 1.0, 3.0])


def able(*names: str) -> list[str]:
    """Back ends that run all of these operations here."""
    rows = torch.zeros(1, 1)
    return [b for b in _backends.BACKENDS if all(not _backends.refusal(name, b, rows) for name in names)]


def back_ends(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", able(*names))


class Draw:
    """Rows from a seed, in float64: what a case is made of."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, *shape: int, offset: float = 0.0, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self.generator, dtype=F64) + offset

    def order(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def labels(self, n: int, classes: int = 4) -> Tensor:
        return torch.randint(0, classes, (n,), generator=self.generator)

    def rotation(self, d: int) -> Tensor:
        return torch.linalg.qr(self.rows(d, d))[0]


def laid_out(x: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    if layout == "slice":
        return torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]]
    return x.view(len(x), 1, x.shape[1], 1) if layout == "images" else x


def close(a: Tensor, b: Tensor, dtype: torch.dtype, size: float, factor: float = 64) -> None:
    """|a - b| <= factor eps size, eps of float32 for low-precision rows that were not rounded anew."""
    eps = torch.finfo(F64 if dtype == F64 else torch.float32).eps
    assert a.shape == b.shape
    worst = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    assert worst <= factor * eps * (1 + size), (worst, size)


def spread(x: Tensor) -> float:
    """The largest squared distance to the mean."""
    x = x.double().flatten(1)
    return float((x - x.mean(0)).square().sum(1).max())


LOSSES: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "dispersive": (
        "negative_distance",
        lambda x, labels: ops.negative_distance_loss(x, tau=2.0, per_dim=True),
        "distance",
    ),
    "rows": (
        "negative_distance",
        lambda x, labels: ops.negative_distance_loss(x, tau=2.0, per_dim=True, per_row=True, include_self=False),
        "distance",
    ),
    "hinge": ("distance_hinge", lambda x, labels: ops.distance_hinge_loss(x, margin=2.0, per_dim=True), "distance"),
    "cosine": ("cosine_contrastive", lambda x, labels: ops.cosine_contrastive_loss(x, tau=0.2), "cosine"),
    "others": (
        "cosine_contrastive",
        lambda x, labels: ops.cosine_contrastive_loss(x, tau=0.2, include_self=False),
        "cosine",
    ),
    "supcon": ("supcon", lambda x, labels: ops.supcon_loss(x, labels, tau=0.2), "cosine"),
}


@pytest.mark.parametrize(("loss", "backend"), [(loss, b) for loss, (op, _, _) in LOSSES.items() for b in able(op)])
@law
@given(SEED, COUNT, WIDTH, DTYPE, LAYOUT, OFFSET, SCALE)
def test_contrast(backend, loss, seed, n, d, dtype, layout, offset, scale):
    """The order of rows, of columns and the layout do not matter; a rotation, and a shift or a scale, neither."""
    draw, (_, f, kind) = Draw(seed), LOSSES[loss]
    exact = draw.rows(n, d, offset=offset, scale=scale)
    x, labels, order, columns = laid_out(exact, layout, dtype), draw.labels(n), draw.order(n), draw.order(d)
    size = 8 * spread(x) / d + math.log(n) if kind == "distance" else 20
    with ops.use(backend):
        value = f(x, labels)
        close(f(laid_out(exact[order], layout, dtype), labels[order]), value, dtype, size)
        close(f(exact.to(dtype)[:, columns], labels), value, dtype, size)
        low = -math.log(n) if loss == "dispersive" else -math.inf if loss in ("rows", "others") else 0
        high = {"dispersive": 0.0, "cosine": math.log(n), "hinge": 4.0}.get(loss, math.inf)
        assert low - 1e-5 <= value <= high + 1e-5
        if dtype in (F64, torch.float32):
            turned = exact.to(dtype).double() @ draw.rotation(d)
            moved = turned + 5 if kind == "distance" else turned * (0.5 + draw.rows(n, 1).abs())
            close(f(moved.to(dtype), labels), value, dtype, size + 40 * d**0.5)


@back_ends("gaussian_divergence", "gaussian_overlap")
@pytest.mark.parametrize("kind", ["kl", "jeffreys", "bhattacharyya"])
@law
@given(SEED, st.integers(1, 24), st.integers(1, 24), WIDTH, DTYPE, OFFSET, SCALE, st.booleans())
def test_gaussians(backend, kind, seed, n, m, d, dtype, offset, scale, shared):
    """>= 0 and 0 for itself; blocks are the whole; a shift, order and exchange; the loss is the matrix's."""
    draw = Draw(seed)
    wide = 1 if shared else d
    acc = F64 if dtype == F64 else torch.float32
    mp, mq = (draw.rows(k, d, offset=offset, scale=scale).to(dtype) for k in (n, m))
    lp, lq = (draw.rows(k, wide).to(acc if shared else dtype) for k in (n, m))
    with ops.use(backend):
        whole = ops.gaussian_divergence(mp, lp, mq, lq, kind)
        size = float(whole.max())
        assert (whole >= -1e-6 * d).all()
        assert (ops.gaussian_divergence(mp, lp, mp, lp, kind).diag().abs() <= 1e-6 * d).all()
        i, j = draw.order(n), draw.order(m)
        split = n // 2
        parts = [
            ops.gaussian_divergence(mp[i[a]], lp[i[a]], mq[j], lq[j], kind) for a in (slice(split), slice(split, n))
        ]
        close(torch.cat(parts), whole[i][:, j], dtype, size)
        columns = draw.order(d)
        again = [x if x.shape[1] == 1 else x[:, columns] for x in (mp, lp, mq, lq)]
        close(ops.gaussian_divergence(*again, kind), whole, dtype, size)
        if kind != "kl":
            close(ops.gaussian_divergence(mq, lq, mp, lp, kind).T, whole, dtype, size)
        if dtype in (F64, torch.float32):
            moved = ops.gaussian_divergence((mp.double() + 3).to(dtype), lp, (mq.double() + 3).to(dtype), lq, kind)
            close(moved, whole, dtype, size + 100 * d, factor=256)
        margin = max(float(whole.double().median()), 1e-3)
        loss = ops.gaussian_overlap_loss(mp, lp, mq, lq, kind=kind, margin=margin, pairs="all")
        close(loss, (margin - whole).clamp_min(0).mean(), dtype, size)
        chosen = draw.labels(n, 2)[:, None] != draw.labels(m, 2)
        loss = ops.gaussian_overlap_loss(mp, lp, mq, lq, kind=kind, form="reciprocal", mask=chosen)
        want = torch.where(chosen, 1 / (1 + whole), 0).sum() / max(int(chosen.sum()), 1)
        close(loss, want, dtype, 1)


@back_ends("product_of_gaussians")
@law
@given(SEED, st.integers(1, 5), st.integers(1, 12), WIDTH, DTYPE, OFFSET, SCALE, st.booleans())
def test_products(backend, seed, K, b, d, dtype, offset, scale, shared):
    """Order and grouping of the factors: (p1 p2) p3 = p1 (p2 p3), and the normalisers add up."""
    draw, acc = Draw(seed), F64 if dtype == F64 else torch.float32
    means = [draw.rows(b, d, offset=offset, scale=scale).to(dtype) for _ in range(K)]
    logvars = [draw.rows(b, 1 if shared else d).to(acc if shared else dtype) for _ in range(K)]
    exponents = draw.rows(K, b).abs() + 0.1
    with ops.use(backend):
        whole = ops.product_of_gaussians(means, logvars, exponents.to(acc))
        sizes = [float(x.abs().max()) for x in whole]
        # A mean comes back in the rows' type: one unit in its last place.
        sizes[0] *= torch.finfo(dtype).eps / torch.finfo(acc).eps
        order = draw.order(K).tolist()
        again = [[v[k] for k in order] for v in (means, logvars)]
        for a, w, size in zip(ops.product_of_gaussians(*again, exponents[order].to(acc)), whole, sizes, strict=True):
            close(a, w, dtype, size + 10 * d)
        if K > 1 and dtype in (F64, torch.float32):
            first = ops.product_of_gaussians(means[:-1], logvars[:-1], exponents[:-1].to(dtype))
            last = torch.stack([torch.ones(b, dtype=F64), exponents[-1]]).to(dtype)
            pair = ops.product_of_gaussians([first[0], means[-1]], [-first[1], *expanded(logvars[-1:], d)], last)
            for a, w, size in zip((*pair[:2], pair[2] + first[2]), whole, sizes, strict=True):
                close(a, w, dtype, size + 10 * d * (1 + offset) ** 2, factor=256)


def expanded(logvars: list[Tensor], d: int) -> list[Tensor]:
    return [v.expand(len(v), d) for v in logvars]


@back_ends("posterior_mean", "posterior_draw")
@law
@given(SEED, st.integers(1, 12), st.integers(1, 40), WIDTH, DTYPE, OFFSET, st.floats(0.1, 1.5))
def test_posteriors(backend, seed, b, n, d, dtype, offset, level):
    """Rows of weights sum to one; order and repetition of the bank; a shift of both; a draw inverts the weights."""
    draw, acc = Draw(seed), F64 if dtype == F64 else torch.float32
    bank = draw.rows(n, d, offset=offset)
    signal, sigma = (torch.full((b,), f(level), dtype=acc) for f in (math.cos, math.sin))
    x_t = math.cos(level) * bank[draw.order(n).repeat(b)[:b]] + math.sin(level) * draw.rows(b, d)
    x_t, low = x_t.to(dtype), bank.to(dtype)
    centred = bank - bank.mean(0)
    reach = float(centred.norm(dim=1).max())
    logit = (reach * (reach + 6 * d**0.5) + offset * d) / math.sin(level) ** 2
    # The mean comes back in the rows' type.
    size = reach * (1 + logit) + offset + (reach + offset) * torch.finfo(dtype).eps / torch.finfo(acc).eps
    with ops.use(backend):
        mean = ops.posterior_mean(x_t, low, signal, sigma)
        # Weights sum to one: with one coordinate constant over the bank, the mean has that coordinate.
        ones = torch.ones(1, dtype=dtype)
        tagged = ops.posterior_mean(
            torch.cat([x_t, ones.expand(b, 1)], 1), torch.cat([low, ones.expand(n, 1)], 1), signal, sigma
        )
        close(tagged[:, -1], ones.expand(b), dtype, torch.finfo(dtype).eps / torch.finfo(acc).eps)
        order = draw.order(n)
        close(ops.posterior_mean(x_t, low[order], signal, sigma), mean, dtype, size)
        close(ops.posterior_mean(x_t, torch.cat([low, low]), signal, sigma), mean, dtype, size)
        prior = torch.where(torch.arange(n) == int(order[0]), 0.0, -torch.inf).to(acc)
        only = ops.posterior_mean(x_t, low, signal, sigma, log_prior=prior)
        close(only, low[order[:1]].expand(b, d), dtype, reach + offset * 4)
        u = torch.rand(b, generator=draw.generator, dtype=F64)
        own = torch.zeros(b, dtype=torch.int64)
        drawn = ops.posterior_draw(x_t, low, signal, sigma, u, own=own, gate="full")
        exact = -((x_t.double()[:, None] - signal[:, None, None].double() * low.double()) ** 2).sum(2)
        cdf = (exact / (2 * sigma.double()[:, None] ** 2)).softmax(1).cumsum(1)
        far = (cdf - u[:, None]).abs().amin(1) > max(1e-5, 8 * torch.finfo(acc).eps * logit)
        assert torch.equal(drawn[far], (cdf <= u[:, None]).sum(1).clamp_max(n - 1)[far])
        assert (ops.posterior_draw(x_t, low, signal, sigma, u, own=own, gate="full", log_prior=prior) == order[0]).all()


@back_ends("knn_radius", "ball_count")
@law
@given(SEED, COUNT, st.integers(0, 30), WIDTH, DTYPE, LAYOUT, OFFSET, st.booleans())
def test_neighbours(backend, seed, n, m, d, dtype, layout, offset, ties):
    """k-NN is sorting, counting is comparing, both to the last digit; a set split in two is the whole."""
    draw = Draw(seed)

    def make(k):
        if not ties:
            return draw.rows(k, d, offset=offset)
        # On a grid of eighths every distance is exact, and many are equal.
        return torch.randint(0, 4, (k, d), generator=draw.generator).double() / 8 + offset

    centers, points = (laid_out(make(k), layout, dtype) for k in (n, m))
    acc, k = (F64 if dtype == F64 else torch.float32), 1 + seed % (n - 1)
    a, b = points.double().flatten(1), centers.double().flatten(1)
    own = (b[:, None] - b).square().sum(2).masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    apart = (a[:, None] - b).square().sum(2).to(acc)
    with ops.use(backend):
        radius = ops.knn_radius(centers, k, squared=True)
        want = own.sort(1).values[:, k - 1].to(acc)
        if dtype == F64 and not ties:
            torch.testing.assert_close(radius, want, rtol=1e-14, atol=0)
        else:
            assert torch.equal(radius, want)
        order = draw.order(n)
        torch.testing.assert_close(ops.knn_radius(centers[order], k, squared=True), radius[order], rtol=1e-14, atol=0)
        balls, inhabitants = ops.ball_count(points, centers, radius)
        assert torch.equal(balls, (apart < radius).sum(1))
        assert torch.equal(inhabitants, (apart < radius).sum(0))
        halves = [ops.ball_count(points[s], centers, radius) for s in (slice(m // 2), slice(m // 2, m))]
        assert torch.equal(torch.cat([h[0] for h in halves]), balls)
        assert torch.equal(halves[0][1] + halves[1][1], inhabitants)
        if m == 0:
            assert not inhabitants.any()


def test_there_are_enough_cases() -> None:
    laws = len(LOSSES) + 3 + 1 + 1 + 1
    assert laws * CASES >= 2000
