"""gaussian in CUDA, emulated; see emulated.py."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, Buffer, close, needs_compiler, pointers, rows

pytestmark = [needs_compiler, pytest.mark.xdist_group("emulated_gaussian")]

KINDS = ("kl", "jeffreys", "bhattacharyya")
HINGE, RECIPROCAL = 0, 1
ALL, DIFFERENT, SAME = 0, 1, 2


def divergence(m: Tensor, l: Tensor, n: Tensor, k: Tensor, kind: str) -> Tensor:
    """[L, N, M] in float64 from the definitions; x - 1 and the like cancel, but float64 has digits to spare."""
    l, k = l.expand_as(m)[:, :, None], k.expand_as(n)[:, None]
    d = (m[:, :, None] - n[:, None]).square()
    if kind == "bhattacharyya":
        S = (l.exp() + k.exp()) / 2
        return (d / (4 * S) + S.log() - (l + k) / 2).sum(3) / 2
    kl = (k - l + (l - k).exp() + d * (-k).exp() - 1).sum(3) / 2
    return kl if kind == "kl" else kl + (l - k + (k - l).exp() + d * (-l).exp() - 1).sum(3) / 2


@dataclass
class Choice:
    """Arguments of the loss."""

    form: int = HINGE
    margin: float = 1.0
    pairs: int = ALL
    labels_p: Tensor | None = None
    labels_q: Tensor | None = None
    mask: Tensor | None = None
    weight: Tensor | None = None
    scale: float = 1.0
    mean: bool = True
    same_set: bool = False

    def loss(self, d: Tensor) -> tuple[Tensor, int]:
        """From the [N, M] divergences, with the number of selected pairs."""
        chosen = torch.ones(d.shape, dtype=torch.bool) if self.mask is None else self.mask
        if self.pairs != ALL:
            equal = self.labels_p[:, None] == self.labels_q[None]
            chosen = chosen & (equal if self.pairs == SAME else ~equal)
        if self.same_set:
            chosen = chosen & ~torch.eye(len(d), dtype=torch.bool)
        f = (self.margin - self.scale * d).relu() if self.form == HINGE else 1 / (1 + self.scale * d)
        weight = torch.ones(len(d)) if self.weight is None else self.weight
        count = int(chosen.sum())
        total = (weight.double()[:, None] * f)[chosen].sum()
        return total / max(count, 1) if self.mean else total, count


@dataclass
class Problem:
    """Arguments mean_p, logvar_p, mean_q, logvar_q, and what the driver wants to know of them."""

    kernels: ctypes.CDLL
    sizes: tuple[int, int, int, int]
    x: list[Buffer]

    def __post_init__(self) -> None:
        L, N, M, _ = self.sizes
        self.dtype = self.x[0].whole.dtype
        self.shared = [self.sizes[3] != 1 and b.view.shape[1] == 1 for b in self.x[1::2]]
        counts = (N, N, M, M)
        numbers = (self.sizes, [b.stride for b in self.x], [b.stride * n for b, n in zip(self.x, counts, strict=True)])
        sizes, strides, batches = ((ctypes.c_int64 * 4)(*some) for some in numbers)
        self.flags = (ctypes.c_int * 2)(*self.shared)
        self.common = (DTYPES.index(self.dtype), sizes, pointers(*self.x), strides, batches, self.flags)
        self.exact = [b.view.double().unflatten(0, (L, -1) if L else (1, 0)) for b in self.x]

    def scratch(self, which: int, grads: list[Buffer | None]) -> Buffer:
        floats = (ctypes.c_int64 * 3)()
        self.kernels.gaussian_scratch(*self.common[:2], self.flags, pointers(*grads), floats)
        return Buffer((floats[which],))

    def gradients(self, dtype: torch.dtype, needs: Sequence[bool]) -> list[Buffer | None]:
        shared = [False, self.shared[0], False, self.shared[1]]
        return [
            Buffer(b.view.shape, torch.float32 if one else dtype) if need else None
            for b, one, need in zip(self.x, shared, needs, strict=True)
        ]

    def divergence(self, kind: str) -> Tensor:
        L, N, M, _ = self.sizes
        matrix, scratch = Buffer((L * N, M)), self.scratch(0, [None] * 4)
        at = ctypes.c_void_p(matrix.pointer), ctypes.c_void_p(scratch.pointer)
        self.kernels.gaussian_divergence(*self.common, KINDS.index(kind), *at)
        assert all(b.untouched_around() for b in (*self.x, matrix, scratch))
        return matrix.view.reshape(L, N, M)

    def divergence_backward(self, kind: str, grad: Tensor, needs: Sequence[bool] = (True,) * 4) -> list[Buffer | None]:
        upstream, grads = Buffer((grad.numel(),)).fill(grad), self.gradients(self.dtype, needs)
        scratch = self.scratch(1, grads)
        at = ctypes.c_void_p(upstream.pointer), pointers(*grads), ctypes.c_void_p(scratch.pointer)
        self.kernels.gaussian_divergence_backward(*self.common, KINDS.index(kind), *at)
        assert all(b.untouched_around() for b in (*self.x, upstream, scratch, *grads) if b)
        return grads

    def overlap(
        self, kind: str, choice: Choice, needs: Sequence[bool] = (True,) * 4
    ) -> tuple[Tensor, Tensor, list[Buffer | None]]:
        """Loss, normalizer, slopes."""
        constants = [None if c is None else c.contiguous() for c in (choice.labels_p, choice.labels_q, choice.mask)]
        weight = None if choice.weight is None else Buffer((len(choice.weight),)).fill(choice.weight)
        of = (ctypes.c_void_p * 4)(*[None if c is None else c.data_ptr() for c in constants], weight and weight.pointer)
        how = (ctypes.c_int * 3)(choice.form, choice.pairs, choice.same_set)
        common = (*self.common, KINDS.index(kind), of, how, (ctypes.c_float * 2)(choice.margin, choice.scale))
        loss, normalizer, slopes = Buffer((1,)), Buffer((1,)), self.gradients(torch.float32, needs)
        scratch = self.scratch(2, slopes)
        at = pointers(loss, normalizer), pointers(*slopes), ctypes.c_void_p(scratch.pointer)
        self.kernels.gaussian_overlap(*common, int(choice.mean), *at)
        assert all(b.untouched_around() for b in (*self.x, loss, normalizer, scratch, weight, *slopes) if b)
        return loss.view[0, 0], normalizer.view[0, 0], slopes


def problem(
    kernels: ctypes.CDLL, sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32,
    shared: tuple[bool, bool] = (False, False), gap: int = 0, shift: int = 0,
) -> Problem:  # fmt: skip
    """Gaussians of which some nearly agree: every fourth of Q lies beside one of P."""
    L, N, M, D = sizes
    p, q = (rows((L * n, D), dtype, seed, gap * seed, shift) for seed, n in ((1, N), (2, M)))
    l, k = (
        rows((L * n, 1 if one else D), torch.float32 if one else dtype, seed, gap, shift)
        for seed, n, one in ((3, N, shared[0]), (4, M, shared[1]))
    )
    near = min(L * N, len(q.view[::4]))
    q.view[::4][:near] = p.view[:near] + q.view[::4][:near] / 64
    if shared[0] == shared[1]:
        k.view[::4][:near] = l.view[:near] + k.view[::4][:near] / 256
    return Problem(kernels, sizes, [p, l, q, k])


SIZES = [
    (1, 5, 7, 9),
    (2, 70, 9, 67),  # tiles cut on every side
    (1, 3, 4, 600),  # the width in parts
    (3, 2, 66, 1),
    (1, 66, 40, 130),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_divergence(
    kernels: ctypes.CDLL, sizes: tuple[int, int, int, int], shared: tuple[bool, bool], kind: str
) -> None:
    x = problem(kernels, sizes, shared=shared, gap=sizes[3] % 3, shift=sizes[3] % 2)
    got, want = x.divergence(kind).double(), divergence(*x.exact, kind)
    assert ((got - want).abs() <= 2e-6 * want + 1e-13).all()  # every digit of every pair, near or far
    if shared == (True, True) and sizes[3] > 100:
        return  # no dtype or layout is left that the gradients of the others do not show
    leaves = [v.clone().requires_grad_() for v in x.exact]
    out = divergence(*leaves, kind)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    want_grads = torch.autograd.grad(out, leaves, grad.double())
    for got_grad, want_grad in zip(x.divergence_backward(kind, grad), want_grads, strict=True):
        close(got_grad.view, want_grad.flatten(0, 1), most=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_close_pairs_keep_their_digits(kernels: ctypes.CDLL, kind: str) -> None:
    x = problem(kernels, (1, 5, 6, 40))
    for mine, theirs in zip(x.x[:2], x.x[2:], strict=True):
        theirs.view.copy_(mine.view[:1] + theirs.view / 4096)
        mine.view.copy_(mine.view[:1] + torch.randn(mine.view.shape, generator=torch.Generator().manual_seed(8)) / 4096)
    x.__post_init__()
    leaves = [v.clone().requires_grad_() for v in x.exact]
    out, grad = divergence(*leaves, kind), torch.ones(1, 5, 6)
    wants = torch.autograd.grad(out.sum(), leaves)
    for got, want in zip(x.divergence_backward(kind, grad), wants, strict=True):
        close(got.view, want[0], most=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_limits(kernels: ctypes.CDLL, kind: str) -> None:
    x = problem(kernels, (1, 4, 4, 20))
    for mine, theirs in zip(x.x[:2], x.x[2:], strict=True):
        theirs.view.copy_(mine.view)
    got = x.divergence(kind)[0]
    assert (got.diagonal() == 0).all()
    assert (got >= 0).all()
    for l, k in [(30, 30), (-30, -30), (30, -30), (-30, 30)]:
        x = problem(kernels, (1, 3, 4, 20))
        x.x[1].view.add_(l)
        x.x[3].view.add_(k)
        x.__post_init__()
        close(x.divergence(kind), divergence(*x.exact, kind), most=5e-6)  # l - k rounds by 4e-6
    # NaN in, NaN out; no other row notices.
    x = problem(kernels, (1, 4, 5, 20))
    x.x[0].view[1, 3] = x.x[3].view[2, 19] = math.nan
    nan = x.divergence(kind)[0].isnan()
    assert nan[1].all()
    assert nan[:, 2].all()
    assert nan.sum() == 8
    mean_p, _, _, logvar_q = x.divergence_backward(kind, torch.ones(4, 5))
    assert mean_p.view.isnan().any(1).all()  # through column 2
    assert logvar_q.view.isnan().any(1).all()
    # What is selected nowhere does not matter, finite or not.
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1], mask[:, 2] = False, False
    loss, number, slopes = x.overlap(kind, Choice(RECIPROCAL, mask=mask))
    assert number == 12
    assert all(b.isfinite().all() for b in (loss, *[s.view for s in slopes]))
    loss, _, _ = x.overlap(kind, Choice(margin=1e3))
    assert loss.isnan()


def test_a_pair_out_of_reach_has_no_gradient_even_if_it_is_infinite(kernels: ctypes.CDLL) -> None:
    x = problem(kernels, (1, 2, 8, 16))
    x.x[1].view[0].add_(100)
    x.__post_init__()
    assert x.divergence("kl")[0, 0].isinf().all()
    choice = Choice(margin=50.0)
    loss, _, slopes = x.overlap("kl", choice)
    rest = [v[0][1:] if n < 2 else v[0] for n, v in enumerate(x.exact)]
    want, _ = choice.loss(divergence(*[v[None] for v in rest], "kl")[0])
    close(loss, want / 2)
    assert all(s.view.isfinite().all() for s in slopes)
    assert slopes[0].view[0].eq(0).all()


N, M = 260, 200  # 5 x 4 tiles: with slopes the loss takes strips of them
LABELS_P, LABELS_Q = torch.arange(N) * 3 // N, torch.arange(M) * 3 // M  # sorted: tiles without a selected pair
WEIGHT = torch.rand(N, generator=torch.Generator().manual_seed(9))
CHOICES = {
    "hinge": Choice(margin=6.0, weight=WEIGHT, scale=0.5),
    "reciprocal": Choice(RECIPROCAL, mean=False),
    "same": Choice(margin=9.0, pairs=SAME, labels_p=LABELS_P, labels_q=LABELS_Q, mean=False),
    "different": Choice(RECIPROCAL, pairs=DIFFERENT, labels_p=LABELS_P, labels_q=LABELS_Q, weight=WEIGHT),
    "mask": Choice(margin=7.0, mask=torch.rand(N, M, generator=torch.Generator().manual_seed(1)) < 0.01),
    "nothing": Choice(mask=torch.zeros(N, M, dtype=torch.bool)),
}


def check_overlap(x: Problem, kind: str, choice: Choice, needs: Sequence[bool] = (True,) * 4) -> None:
    loss, normalizer, slopes = x.overlap(kind, choice, needs)
    leaves = [v.clone().requires_grad_() for v in x.exact]
    want, count = choice.loss(divergence(*leaves, kind)[0])
    close(loss, want.detach(), most=3e-6)
    assert normalizer == (max(count, 1) if choice.mean else 1)
    wants = torch.autograd.grad(want * normalizer, leaves)
    for got, exact, need in zip(slopes, wants, needs, strict=True):
        assert (got is not None) == need
        if got is not None:
            close(got.view, exact[0], most=4e-6)


NEEDS = [(True,) * 4, (True, False, False, False), (False, True, True, False), (False, False, True, True), (False,) * 4]


@pytest.mark.parametrize("name", CHOICES)
def test_overlap(kernels: ctypes.CDLL, name: str) -> None:
    """In strips of rows, of columns, of both, and in one piece without slopes."""
    at = list(CHOICES).index(name)
    x = problem(kernels, (1, N, M, 5), gap=3)
    for needs in {NEEDS[0], NEEDS[at % len(NEEDS)]}:
        check_overlap(x, KINDS[at % 3], CHOICES[name], needs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_overlap_in_low_precision(kernels: ctypes.CDLL, dtype: torch.dtype, kind: str) -> None:
    x = problem(kernels, (1, 40, 66, 37), dtype, (False, kind == "kl"), gap=5, shift=1)
    choice = Choice(margin=30.0, weight=WEIGHT[:40])
    for needs in NEEDS if kind == "jeffreys" else NEEDS[:1]:
        check_overlap(x, kind, choice, needs)


@pytest.mark.parametrize("form", [HINGE, RECIPROCAL])
def test_overlap_of_a_set_with_itself(kernels: ctypes.CDLL, form: int) -> None:
    x = problem(kernels, (1, 60, 60, 300), shared=(True, True))  # few tiles: the width in parts
    x.x[2:] = x.x[:2]
    x.__post_init__()
    check_overlap(x, "jeffreys", Choice(form, margin=200.0, same_set=True, scale=1 / 300))


@pytest.mark.parametrize("sizes", [(1, 0, 4, 3), (1, 4, 0, 3), (1, 2, 3, 0), (0, 2, 3, 4)], ids=str)
def test_nothing(kernels: ctypes.CDLL, sizes: tuple[int, int, int, int]) -> None:
    x = problem(kernels, sizes)
    L, N, M, _ = sizes
    assert (x.divergence("kl") == 0).all()
    assert all((g.view == 0).all() for g in x.divergence_backward("kl", torch.ones(L, N, M)))
    if L:
        loss, normalizer, slopes = x.overlap("kl", Choice(margin=2.0))
        assert loss == (2.0 if N * M else 0.0)
        assert normalizer == max(N * M, 1)
        assert all((s.view == 0).all() for s in slopes)


def test_same_bits_every_time(kernels: ctypes.CDLL) -> None:
    """Whatever the threads' order, which is the machine's choice."""
    x = problem(kernels, (1, 40, 50, 260), shared=(True, False))
    (loss, _, slopes), (other, _, others) = (x.overlap("kl", Choice(RECIPROCAL)) for _ in range(2))
    assert torch.equal(loss, other)
    assert all(torch.equal(a.view, b.view) for a, b in zip(slopes, others, strict=True))
