"""Cases of the pairwise families beside negative_distance, for `test_every_op.py`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imbdiff.ops.reference.gaussian import pairwise
from imbdiff.ops.reference.posterior import log_posterior

from .case import Case

Make = Callable[[torch.dtype], tuple[Any, ...]]
LABELS = torch.tensor([0, 1, 2, 1, 0, 3, 3, 1])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def first(count: int) -> Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], list[Tensor]]]:
    """Fresh leaves for the leading arguments, of which lists are spread out."""

    def leaves(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
        fresh = [[x.detach().requires_grad_() for x in (a if isinstance(a, list) else [a])] for a in args[:count]]
        heads = [f if isinstance(a, list) else f[0] for a, f in zip(args, fresh, strict=False)]
        return (*heads, *args[count:]), [x for part in fresh for x in part]

    return leaves


def gaussians(count: int, D: int, leading: tuple[int, ...], shared: bool, dtype: torch.dtype, offset: float) -> Any:
    mean = (torch.randn(*leading, count, D) + offset).to(dtype)
    if shared:
        return mean, torch.randn(*leading, count, 1, dtype=accumulator(dtype))
    return mean, torch.randn(*leading, count, D).to(dtype)


def _divergence(L: int, N: int, M: int, D: int, shared: tuple[bool, bool], kind: int, offset: float) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        p, q = (gaussians(n, D, (L,), s, dtype, offset) for n, s in zip((N, M), shared, strict=True))
        return *p, *q, kind

    return make


def _overlap(N: int, M: int | None, D: int, form: int, pairs: int, masked: bool, weighted: bool, mean: bool) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        p = gaussians(N, D, (), False, dtype, 0.0)
        q = p if M is None else gaussians(M, D, (), True, dtype, 0.0)
        m = N if M is None else M
        labels = (LABELS.repeat(9)[:N], LABELS.repeat(9)[-m:] if m else LABELS[:0])
        empty = (torch.empty(0, dtype=torch.int64),) * 2
        mask = torch.rand(N, m) < 0.4 if masked else torch.empty(0, 0, dtype=torch.bool)
        weight = torch.rand(N if weighted else 0, dtype=accumulator(dtype))
        settings = (0, form, 3.0 * D, 1.0 if form == 0 else 1 / D, pairs, mean, M is None)
        return *p, *q, *(labels if pairs else empty), mask, weight, *settings, [True] * 4

    return make


def _overlap_leaves(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """p's own tensors stand in for q's where the two sets are one."""
    same_set = args[-2]
    fresh, leaves = first(2 if same_set else 4)(args)
    return ((*fresh[:2], *fresh[:2], *fresh[4:]) if same_set else fresh), leaves


def _rows(N: int, D: int, layout: str, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    x = (torch.randn(N, D) + offset).to(dtype)
    # opcheck cannot copy a slice of no rows.
    return x if layout == "dense" or N == 0 else torch.cat([x, x], 1)[:, :D]


def _hinge(N: int, D: int, layout: str, margin: float, split_k: bool) -> Make:
    return lambda dtype: (_rows(N, D, layout, dtype, 1.0), margin, 1 / D, split_k)


def _cosine(N: int, D: int, M: int, include_self: bool, weighted: bool, layout: str, tau: float, split_k: bool) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        weight = torch.rand(N if weighted else 0, dtype=accumulator(dtype))
        rows = _rows(N, D, layout, dtype, 0.5), _rows(M, D, layout, dtype, 0.5)
        return *rows, weight, tau, include_self, split_k

    return make


def _supcon(N: int, D: int, weighted: bool, layout: str, split_k: bool) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        weight = torch.rand(N if weighted else 0, dtype=accumulator(dtype))
        return _rows(N, D, layout, dtype, 0.5), LABELS.repeat(20)[:N], weight, 0.1, split_k

    return make


def _product(K: int, B: int, D: int, shared: bool) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        pairs = [gaussians(B, D, (), shared and k % 2 == 0, dtype, 0.0) for k in range(K)]
        exponents = torch.rand(K, B, dtype=accumulator(dtype)) + 0.1
        return [m for m, _ in pairs], [l for _, l in pairs], exponents

    return make


def _bank(B: int, N: int, D: int, prior: bool, level: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    bank, acc = torch.randn(N, D).clamp(-1, 1), accumulator(dtype)
    levels = level - 0.02 * torch.rand(B, dtype=acc)
    signal, sigma = levels.cos(), levels.sin()
    x_t = signal[:, None] * bank[torch.arange(B) % max(N, 1)] + sigma[:, None] * torch.randn(B, D)
    return x_t.to(dtype), bank.to(dtype), signal, sigma, torch.randn(N if prior else 0, dtype=acc)


def _posterior(B: int, N: int, D: int, prior: bool, level: float) -> Make:
    return lambda dtype: _bank(B, N, D, prior, level, dtype)


def _draw(B: int, N: int, D: int, prior: bool, level: float, gate: int) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        x_t, bank, signal, sigma, log_prior = _bank(B, N, D, prior, level, dtype)
        exact = (v.double() for v in (x_t, bank, signal, sigma, log_prior))
        p = log_posterior(*exact).softmax(1)
        # In the middle of the likeliest row's share, or the next one's: rounding does not reach an edge.
        row = p.topk(min(2, N), 1).indices[torch.arange(B), torch.arange(B) % min(2, N)]
        row = torch.where(p[torch.arange(B), row] > 1e-3, row, p.argmax(1))
        u = (p.cumsum(1) - p / 2).gather(1, row[:, None])[:, 0]
        counts = torch.randint(1, 5, (B + N,)).double() if gate else torch.empty(0, dtype=torch.float64)
        own = torch.arange(B) % N
        return x_t, bank, signal, sigma, u, own, counts[:B], counts[B:], log_prior, gate

    return make


def _posterior_condition(args: tuple[Any, ...]) -> float:
    """What rounds before the exponential, the largest logit, times what cancels in the mean of rows of either sign."""
    if not args[0].numel():
        return 0.0
    x_t, bank, signal, sigma, log_prior = (v.double() for v in args[:5])
    centre = bank.mean(0)
    a, b = x_t - signal[:, None] * centre, bank - centre
    logit = (signal * a.norm(dim=1) * b.norm(dim=1).max() / sigma**2).max()
    p = log_posterior(x_t, bank, signal, sigma, log_prior).softmax(1)
    return float((1 + logit) * (p @ bank.abs()).max() / (p @ bank).abs().max())


def _balls(N: int, M: int, D: int) -> Make:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        radii = 2 * D * (0.8 + 0.4 * torch.rand(M, dtype=accumulator(dtype)))
        return _rows(N, D, "dense", dtype), _rows(M, D, "slice", dtype), radii

    return make


def _distance_condition(args: tuple[Any, ...]) -> float:
    x, scale = args[0].double(), args[2]
    return 8 * scale * float((x - x.mean(0)).square().sum(1).max()) if x.numel() else 0.0


def _hinge_condition(args: tuple[Any, ...]) -> float:
    """What a distance loses, the margin less the distance loses too, and it may be a hundredth of it."""
    x, margin, scale = args[0].double(), *args[1:3]
    short = margin - scale * float(torch.pdist(x).square().min()) if len(x) > 1 else 0.0
    return _distance_condition(args) / (min(short, 1.0) if short > 0 else 1.0)


def _sums(args: tuple[Any, ...]) -> float:
    """Sums of D terms in another order."""
    return 4.0


def _slopes_cancel(args: tuple[Any, ...], grads: list[Tensor]) -> float:
    """The sizes of the slopes of a Gaussian's pairs, summed, over their sum, both the largest of all Gaussians."""
    rows, kind, worst = args[:4], args[4], 1.0
    if not all(x.numel() for x in rows):
        return worst
    pairs = [
        x.unsqueeze(side).expand(*grads[0].shape, x.shape[-1])[..., None, :]
        for x, side in zip(rows, (2, 2, 1, 1), strict=True)
    ]
    pairs = [x.detach().clone().requires_grad_() for x in pairs]
    slopes = torch.autograd.grad(pairwise(*pairs, kind)[..., 0, 0], pairs, grads[0])
    for slope, side in zip(slopes, (2, 2, 1, 1), strict=True):
        worst = max(worst, float(slope.abs().sum(side).max() / slope.sum(side).abs().max()))
    return worst


KINDS = ("kl", "jeffreys", "bhattacharyya")
PLANS = ("stream", "split")
CASES = [
    Case(
        "gaussian_divergence",
        f"{KINDS[kind]}-L{L}-N{N}-M{M}-D{D}-{'shared' if any(s) else 'full'}{s[0]:d}{s[1]:d}-{offset:g}",
        _divergence(L, N, M, D, s, kind, offset),
        first(4),
        outputs=1,
        condition=_sums,
        cancels=_slopes_cancel,
    )
    for kind in range(3)
    for L, N, M, D, s, offset in [
        (1, 4, 3, 5, (False, False), 0.0),
        (2, 65, 67, 33, (False, False), 0.0),
        (1, 130, 3, 300, (False, False), 10.0),
        (3, 1, 7, 64, (True, True), 0.0),
        (1, 17, 5, 1, (True, True), 0.0),
        (1, 9, 8, 40, (False, True), 0.0),
        (1, 9, 8, 40, (True, False), 0.0),
        (1, 0, 3, 5, (False, False), 0.0),
    ]
]
CASES += [
    Case(
        "gaussian_overlap",
        f"{('hinge', 'reciprocal')[form]}-N{N}-M{M}-D{D}-pairs{pairs}-{'mask' if masked else 'nomask'}"
        f"-{'w' if w else 'now'}-{'mean' if mean else 'sum'}",
        _overlap(N, M, D, form, pairs, masked, w, mean),
        _overlap_leaves,
        outputs=1,
        condition=_sums,
    )
    for N, M, D, form, pairs, masked, w, mean in [
        (4, 3, 5, 0, 0, False, False, True),
        (65, 67, 33, 0, 1, False, True, True),
        (66, None, 40, 0, 1, False, False, True),
        (33, None, 40, 1, 2, False, True, False),
        (40, 70, 8, 0, 0, True, False, True),
        (20, None, 16, 1, 0, True, False, True),
        (1, None, 6, 0, 0, False, False, True),
        (0, 3, 5, 0, 0, False, False, True),
    ]
]
CASES += [
    Case(
        "distance_hinge",
        f"N{N}-D{D}-{layout}-{margin:g}-{plan}",
        _hinge(N, D, layout, margin, plan == "split"),
        first(1),
        1,
        _hinge_condition,
        rounds_rows=True,
    )
    for plan in PLANS
    for N, D, layout, margin in [
        (4, 5, "dense", 3.0),
        (65, 72, "slice", 2.0),
        (20, 9000, "dense", 2.0),
        (3, 8, "dense", 1e-3),
        (1, 6, "dense", 1.0),
        (0, 6, "dense", 1.0),
    ]
]
CASES += [
    Case(
        "cosine_contrastive",
        f"N{N}-D{D}-M{M}-{'self' if own else 'noself'}-{layout}-{tau:g}-{plan}",
        _cosine(N, D, M, own, w, layout, tau, plan == "split"),
        first(1),
        outputs=1,
        condition=lambda args: 4 / args[3],
        rounds_rows=True,
    )
    for plan in PLANS
    for N, D, M, own, w, layout, tau in [
        (4, 5, 0, True, False, "dense", 0.1),
        (63, 72, 0, False, True, "slice", 0.1),
        (65, 33, 7, True, True, "dense", 0.5),
        (64, 128, 5, False, False, "slice", 0.1),
        (20, 9000, 0, True, True, "dense", 0.1),
        (1, 6, 0, True, False, "dense", 0.1),
        (1, 6, 0, False, False, "dense", 0.1),
        (1, 6, 3, True, False, "dense", 0.1),
        (0, 6, 2, True, False, "dense", 0.1),
    ]
]
CASES += [
    Case(
        "supcon",
        f"N{N}-D{D}-{'w' if w else 'now'}-{layout}-{plan}",
        _supcon(N, D, w, layout, plan == "split"),
        first(1),
        outputs=1,
        condition=lambda args: 4 / args[3],
        rounds_rows=True,
    )
    for plan in PLANS
    for N, D, w, layout in [
        (8, 5, False, "dense"),
        (65, 72, True, "slice"),
        (20, 9000, False, "dense"),
        (3, 6, False, "dense"),
        (1, 6, False, "dense"),
        (0, 6, False, "dense"),
    ]
]
CASES += [
    Case(
        "product_of_gaussians",
        f"K{K}-B{B}-D{D}-{'shared' if shared else 'full'}",
        _product(K, B, D, shared),
        first(2),
        outputs=3,
        condition=lambda args: 8.0,
    )
    for K, B, D, shared in [
        (1, 3, 7, False),
        (2, 5, 72, False),
        (2, 4, 65, True),
        (3, 2, 3072, False),
        (4, 3, 127, True),
        (2, 0, 5, False),
    ]
]
CASES += [
    Case(
        "posterior_mean",
        f"B{B}-N{N}-D{D}-{'prior' if prior else 'uniform'}-{level:g}",
        _posterior(B, N, D, prior, level),
        first(2),
        outputs=1,
        condition=_posterior_condition,
    )
    for B, N, D, prior, level in [
        (4, 4, 5, False, 1.0),
        (7, 65, 33, True, 1.2),
        (65, 130, 72, False, 1.4),
        (3, 5000, 16, True, 1.5),
        (2, 450, 900, False, 1.5),
        (2, 9, 3072, False, 1.55),
        (3, 1, 6, False, 0.5),
        (0, 4, 5, False, 1.0),
    ]
]
CASES += [
    Case(
        "posterior_draw",
        f"B{B}-N{N}-D{D}-{'prior' if prior else 'uniform'}-{level:g}-gate{gate}",
        _draw(B, N, D, prior, level, gate),
        first(0),
        outputs=1,
        condition=_sums,
    )
    for B, N, D, prior, level, gate in [
        (4, 4, 5, False, 1.0, 0),
        (7, 65, 33, True, 1.2, 1),
        (65, 70, 300, False, 1.4, 2),
        (2, 9, 3072, False, 1.5, 1),
        (3, 1, 6, False, 0.5, 2),
        (0, 4, 5, False, 1.0, 0),
    ]
]
CASES += [
    Case(
        "knn_radius",
        f"N{N}-D{D}-k{k}-{layout}-{'squared' if squared else 'root'}",
        lambda dtype, N=N, D=D, k=k, layout=layout, squared=squared: (_rows(N, D, layout, dtype), k, squared),
        first(0),
        outputs=1,
        condition=_sums,
    )
    for N, D, k, layout, squared in [
        (4, 5, 1, "dense", True),
        (65, 33, 5, "slice", False),
        (600, 40, 3, "dense", True),
        (7, 3000, 6, "dense", False),
    ]
]
CASES += [
    Case("ball_count", f"N{N}-M{M}-D{D}", _balls(N, M, D), first(0), outputs=2, condition=_sums)
    for N, M, D in [(4, 3, 5), (65, 130, 33), (600, 20, 40), (3, 0, 5), (0, 3, 5)]
]
