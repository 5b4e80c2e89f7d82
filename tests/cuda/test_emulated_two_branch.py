"""two_branch in CUDA, emulated; see emulated.py."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from .emulated import DTYPES, Buffer, close, needs_compiler, pointers, rows

pytestmark = [needs_compiler, pytest.mark.xdist_group("emulated_two_branch")]


def run_two_branch(
    kernels: ctypes.CDLL, x: list[Buffer], B: int, D: int, weight: Tensor, scales: Tensor, margin: Tensor,
    grad_base: Tensor, grad_terms: Tensor, needs: list[bool],
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    K, dtype = len(x) - 2, x[0].whole.dtype
    code = DTYPES.index(dtype)
    strides = (ctypes.c_int64 * len(x))(*[b.stride if b.view.shape[0] == B else 0 for b in x])
    small = [Buffer(t.shape).fill(t) for t in (weight, scales, margin, grad_base, grad_terms)]
    outputs = [Buffer((B,)), Buffer((K, B)), Buffer((K, B))]
    sizes = (ctypes.c_int64(B), ctypes.c_int64(D), K)
    kernels.two_branch_scratch.restype = ctypes.c_int64
    scratch = Buffer((kernels.two_branch_scratch(code, *sizes),))
    kernels.two_branch_forward(
        code, *sizes, pointers(*x), strides, pointers(*small), pointers(*outputs), ctypes.c_void_p(scratch.pointer)
    )
    grads = [Buffer((B, D), dtype) if need else None for need in needs]
    kernels.two_branch_backward(code, *sizes, pointers(*x), strides, pointers(*small, outputs[2]), pointers(*grads))
    assert all(b.untouched_around() for b in [*x, *small, *outputs, scratch, *grads] if b)
    return [b.view for b in outputs], [b.view if b else None for b in grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("K", "B", "D", "gap", "shift"),
    [
        (0, 3, 40, 0, 0),
        (1, 5, 3072, 0, 0),
        (2, 3, 129, 7, 1),  # odd rows, none of them aligned
        (3, 2, 9001, 0, 0),  # in parts
        (4, 2, 8200, 8, 3),
        (4, 4, 1, 0, 0),
        (2, 0, 5, 0, 0),
        (1, 2, 0, 0, 0),
    ],
)
def test_two_branch(kernels: ctypes.CDLL, dtype: torch.dtype, K: int, B: int, D: int, gap: int, shift: int) -> None:
    # Each tensor has its own distance between rows; the last one is a single row, expanded.
    x = [rows((B, D), dtype, n, gap * n, shift * n) for n in range(1 + K)]
    x.append(rows((min(B, 1) if K else B, D), dtype, 9))
    generator = torch.Generator().manual_seed(5)
    weight, grad_base, grad_terms = (torch.randn(s, generator=generator) for s in ((K, B), (B,), (K, B)))
    scales = torch.randn(K, 3, generator=generator)
    margin = torch.tensor([0.0, 3.0, 0.5, 0.0][:K])  # pull, push, push out of reach
    needs = [True] + [k != 2 for k in range(K)]
    constants = (weight, scales, margin, grad_base, grad_terms)
    (base, terms, distance), grads = run_two_branch(kernels, x, B, D, *constants, needs)

    own, target, *others = (b.view.double() for b in x)
    differences = [(own - o) for o in others]
    d = torch.stack([e.square().mean(1) for e in differences]) if K else torch.zeros(0, B)
    pull = (margin == 0)[:, None]
    f = torch.where(pull, d, (margin[:, None] - d).clamp_min(0))
    close(base.flatten(), (own - target).square().mean(1))
    close(distance, d)
    close(terms, scales[:, 2:].double() * weight * f)
    if D == 0:
        return
    slope = torch.where(pull, 1.0, -(margin[:, None] > d).double())
    c = grad_terms.double() * weight * slope * 2 / D
    total = grad_base[:, None].double() * 2 / D * (own - target)
    for k, e in enumerate(differences):
        total = total + scales[k, 0].double() * c[k, :, None] * e
        if grads[1 + k] is not None:
            close(grads[1 + k], -scales[k, 1].double() * c[k, :, None] * e, dtype)
    close(grads[0], total, dtype)


def test_two_branch_passes_nan_on_and_skips_what_is_not_needed(kernels: ctypes.CDLL) -> None:
    x = [rows((2, 20), torch.float32, n) for n in range(3)]
    x[2].view[1, 3] = math.nan
    one = torch.ones(1, 2)
    arguments = (x, 2, 20, one, torch.ones(1, 3), torch.ones(1) * 9, torch.ones(2), one)
    (base, terms, _), grads = run_two_branch(kernels, *arguments, [False, True])
    assert base.isfinite().all()
    assert terms.isnan().tolist() == [[False, True]]
    assert grads[0] is None
    assert grads[1].isnan().any(1).tolist() == [False, True]
