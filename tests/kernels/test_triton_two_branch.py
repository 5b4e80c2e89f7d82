"""The Triton kernels of two_branch, interpreted, against float64 code written from the contract."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the triton back end needs triton")
from imbdiff.kernels import rows
from imbdiff.kernels import two_branch as kernels

from imbdiff.ops.reference import two_branch as plain

LOW = [torch.float32, torch.bfloat16, torch.float16]
MARGINS = [0.0, 2.0, 0.0, 9.0]  # pull, a push that acts on about half of the rows, pull, a push on all
SIZES = [(1, 1), (5, 3), (9, 100), (3, 129), (3, 513), (2, 1025), (2, 4097), (17, 72)]


def reference(own: Tensor, target: Tensor, others: list[Tensor], weight: Tensor, scales: Tensor, margin: list[float]):
    bound = own.new_tensor(margin)[:, None]
    base = (own - target).square().mean(1)
    distance = torch.stack([(own - o).square().mean(1) for o in others]) if others else weight.new_zeros(0, len(own))
    loss = torch.where(bound == 0, distance, (bound - distance).clamp(min=0))
    return base, scales[:, 2:] * weight * loss, distance


def reference_bwd(grad_base, grad_terms, own, target, others, weight, scales, margin, distance):
    D, bound = own.shape[1], own.new_tensor(margin)[:, None]
    sign = torch.where(bound == 0, 1.0, -(bound > distance).to(own.dtype))
    c = grad_terms * weight * sign * 2 / D
    own_grad = grad_base[:, None] * 2 / D * (own - target)
    for k, other in enumerate(others):
        own_grad = own_grad + scales[k, 0] * c[k][:, None] * (own - other)
    return own_grad, [-scales[k, 1] * c[k][:, None] * (own - other) for k, other in enumerate(others)]


def inputs(B: int, D: int, K: int, dtype: torch.dtype, guard: Callable[..., Tensor] = lambda x, gap=0: x):
    g = torch.Generator().manual_seed(B * 10000 + D * 10 + K)
    tensors = [guard(torch.randn(B, D, generator=g).to(dtype), gap) for gap in (0, 5, 3, 0, 1, 2)][: 2 + K]
    small = [torch.rand(K, B, generator=g), torch.randn(K, 3, generator=g)]
    grads = [torch.randn(B, generator=g), torch.randn(K, B, generator=g)]
    return tensors[0], tensors[1], tensors[2:], *(guard(x) for x in small), MARGINS[:K], *(guard(x) for x in grads)


def cast(value, dtype: torch.dtype):
    if isinstance(value, float):
        return value
    return [cast(v, dtype) for v in value] if isinstance(value, (list, tuple)) else value.to(dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("K", range(5))
def test_forward_and_backward(K, dtype, guard, bands, close):
    for B, D in SIZES[K::2] if dtype == torch.float32 else SIZES[K : K + 2]:
        *args, grad_base, grad_terms = inputs(B, D, K, dtype, guard)
        exact, plain = (reference(*cast(args, t)) for t in (torch.float64, torch.float32))
        got = kernels.two_branch(*args)
        for result in zip(got, exact, plain, strict=True):
            close(*result)
        assert all(x.is_contiguous() and x.dtype == torch.float32 for x in got)

        # The sign of a push follows the kernel's own distance.
        exact, plain = (
            reference_bwd(*cast((grad_base, grad_terms, *args, got[2]), t)) for t in (torch.float64, torch.float32)
        )
        own, others = kernels.two_branch_bwd(grad_base, grad_terms, *args, got[2], [True] * (1 + K))
        for result, *want in zip([own, *others], [exact[0], *exact[1]], [plain[0], *plain[1]], strict=True):
            close(result, *(w.to(dtype).double() if w is want[1] else w for w in want), factor=3)
            assert result.is_contiguous()
            assert result.dtype == dtype


def test_split_rows(bands, close):
    B, D, K = 2, 9000, 2
    assert rows.split(B, D)[0] == 3
    *args, _, _ = inputs(B, D, K, torch.float32)
    got = kernels.two_branch(*args)
    for result in zip(got, reference(*cast(args, torch.float64)), reference(*args), strict=True):
        close(*result)
    assert all(torch.equal(a, b) for a, b in zip(got, kernels.two_branch(*args), strict=True))


def test_split_depends_on_sizes_and_covers_the_row():
    for B, D in product((1, 3, 128, 512, 100_000), (1, 127, 3072, 4097, 294_912)):
        parts, span = rows.split(B, D)
        assert (parts - 1) * span < D <= parts * span
        assert span % rows.config(D).columns == 0
        assert parts == 1 or parts * B <= 2 * rows.PROGRAMS


@pytest.mark.parametrize("K", range(5))
def test_every_subset_of_needs(K, bands):
    *args, grad_base, grad_terms = inputs(3, 5, K, torch.float32)
    distance = kernels.two_branch(*args)[2]
    own, others = kernels.two_branch_bwd(grad_base, grad_terms, *args, distance, [True] * (1 + K))
    for needs in product((False, True), repeat=1 + K):
        part, parts = kernels.two_branch_bwd(grad_base, grad_terms, *args, distance, list(needs))
        for need, some, whole in zip(needs, [part, *parts], [own, *others], strict=True):
            assert torch.equal(some, whole) if need else some.shape == (0,)


def test_what_is_not_needed_is_not_read():
    own, target, others, weight, scales, margin, grad_base, grad_terms = inputs(3, 5, 2, torch.float32)
    distance = kernels.two_branch(own, target, others, weight, scales, margin)[2]
    bad = torch.full_like(own, torch.nan)
    args = (grad_base, grad_terms, own, bad, [others[0], bad], weight, scales, margin, distance, [False, True, False])
    assert kernels.two_branch_bwd(*args)[1][0].isfinite().all()


def test_expanded_rows_and_channel_slices(close):
    _, target, others, *small, grad_base, grad_terms = inputs(5, 24, 2, torch.float32)
    args = (torch.randn(5, 48)[:, 24:], target[:1].expand(5, 24), [others[0][:1].expand(5, 24), others[1]], *small)
    got = kernels.two_branch(*args)
    for result in zip(got, reference(*cast(args, torch.float64)), reference(*args), strict=True):
        close(*result)
    dense = cast((args[0].contiguous(), args[1].contiguous(), [o.contiguous() for o in args[2]]), torch.float32)
    strided, plain = (
        kernels.two_branch_bwd(grad_base, grad_terms, *a, *small, got[2], [True] * 3) for a in (args[:3], dense)
    )
    assert all(torch.equal(a, b) for a, b in zip([strided[0], *strided[1]], [plain[0], *plain[1]], strict=True))


def test_rows_more_than_2_to_the_31_elements_apart():
    stride = 2**30 + 16  # the memory between the rows is never touched
    own, target, others, *small, grad_base, grad_terms = inputs(3, 5, 1, torch.bfloat16)
    far = torch.empty(2 * stride + 8, dtype=torch.bfloat16).as_strided((3, 5), (stride, 1)).copy_(own)
    results = []
    for x in (own, far):
        forward = kernels.two_branch(x, target, others, *small)
        grad, _ = kernels.two_branch_bwd(grad_base, grad_terms, x, target, others, *small, forward[2], [True, False])
        results.append((*forward, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_comes_out_where_it_went_in():
    own, target, others, *small, grad_base, grad_terms = inputs(3, 5, 2, torch.float32)
    own[1, 2] = torch.nan
    base, terms, distance = kernels.two_branch(own, target, others, *small)
    for result in (base[None], terms, distance):
        assert result.isnan().any(0).tolist() == [False, True, False]
        assert result[:, 1].isnan().all()
    grad, _ = kernels.two_branch_bwd(grad_base, grad_terms, own, target, others, *small, distance, [True] * 3)
    assert grad[1, 2].isnan()
    assert grad[[0, 2]].isfinite().all()


def test_a_push_whose_distance_is_nan_has_the_slope_of_the_reference():
    own, target, others, weight, scales, _, grad_base, grad_terms = inputs(3, 5, 1, torch.float32)
    own[1, 2] = torch.nan
    args = (own, target, others, weight, scales, [0.5])
    distance = kernels.two_branch(*args)[2]
    got = kernels.two_branch_bwd(grad_base, grad_terms, *args, distance, [True, True])
    want = plain.two_branch_bwd(grad_base, grad_terms, *args, distance, [True, True])
    for a, b in [(got[0], want[0]), (got[1][0], want[1][0])]:
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(("B", "D"), [(0, 5), (0, 0), (3, 0)])
@pytest.mark.parametrize("K", [0, 2])
def test_empty(B, D, K):
    *args, grad_base, grad_terms = inputs(B, D, K, torch.bfloat16)
    base, terms, distance = kernels.two_branch(*args)
    assert (base.shape, terms.shape, distance.shape) == ((B,), (K, B), (K, B))
    assert base.isnan().all()
    assert distance.isnan().all()
    own, others = kernels.two_branch_bwd(grad_base, grad_terms, *args, distance, [True] * (1 + K))
    assert all(grad.shape == (B, D) for grad in (own, *others))
