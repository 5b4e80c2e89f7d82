"""For each operation: random arguments, and a float64 loss that its gradients are compared with."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cases_pairwise
from .case import Case


def _two_branch(B: int, D: int, K: int, margins: list[float], layout: str) -> Callable[[torch.dtype], tuple[Any, ...]]:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        acc = torch.float64 if dtype == torch.float64 else torch.float32

        def rows() -> Tensor:
            if layout == "slice":
                return torch.randn(B, 2 * D + 3).to(dtype)[:, 1 : 1 + D]
            if layout == "expanded":
                return torch.randn(1, D).to(dtype).expand(B, D)
            return torch.randn(B, D).to(dtype)

        others = [rows() for _ in range(K)]
        return (
            rows(),
            rows(),
            others,
            torch.randn(K, B, dtype=acc),
            torch.randn(K, 3, dtype=acc),
            margins[:K],
        )

    return make


def _two_branch_leaves(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    own, target, others, *small = args
    fresh = [x.detach().requires_grad_() for x in (own, *others)]
    return (fresh[0], target, fresh[1:], *small), fresh


def _contrast(
    N: int, D: int, M: int, include_self: bool, per_row: bool, weighted: bool, layout: str, offset: float, split_k: bool
) -> Callable[[torch.dtype], tuple[Any, ...]]:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        acc = torch.float64 if dtype == torch.float64 else torch.float32

        def rows(n: int) -> Tensor:
            x = torch.randn(n, D) + offset
            return x.to(dtype) if layout == "dense" else torch.cat([x, x], 1).to(dtype)[:, :D]

        weight = torch.rand(N, dtype=acc) if weighted else torch.empty(0, dtype=acc)
        return rows(N), rows(M), weight, 0.7 / D, include_self, per_row, split_k

    return make


def _contrast_leaves(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    x = args[0].detach().requires_grad_()
    return (x, *args[1:]), [x]


def _contrast_condition(args: tuple[Any, ...]) -> float:
    """Distances come from norms and products of centred rows, the loss from logarithms of N (N + M) terms."""
    x, negatives, _, scale, *_ = args
    if not x.numel():
        return 0.0
    rows = torch.cat([x, negatives]).double()
    return 4 * scale * float((rows - x.double().mean(0)).square().sum(1).max()) + math.log(len(x) * len(rows))


MIXED = [0.0, 1.5, 3.0, 0.01, 2.0]
CASES = [
    Case(
        "two_branch",
        f"B{B}-D{D}-K{K}-{layout}",
        _two_branch(B, D, K, MIXED, layout),
        _two_branch_leaves,
        outputs=2,
        condition=lambda args: 4.0,  # margin - d cancels, and sums of D terms differ in their order
    )
    for B, D, K, layout in [
        (3, 7, 0, "dense"),
        (2, 1, 1, "dense"),
        (5, 72, 1, "slice"),
        (4, 65, 2, "expanded"),
        (1, 40_000, 1, "dense"),
        (3, 3072, 4, "dense"),
        (2, 127, 3, "slice"),
        (0, 5, 2, "dense"),
    ]
]
CASES += [
    Case(
        "negative_distance",
        f"N{N}-D{D}-M{M}-{'self' if own else 'noself'}-{'rows' if rows else 'all'}-{layout}-{offset:g}-{plan}",
        _contrast(N, D, M, own, rows, w, layout, offset, plan == "split"),
        _contrast_leaves,
        outputs=1,
        condition=_contrast_condition,
        rounds_rows=True,
    )
    for plan in ("stream", "split")
    for N, D, M, own, rows, w, layout, offset in [
        (4, 5, 0, True, False, False, "dense", 0.0),
        (4, 5, 0, False, False, False, "dense", 0.0),
        (63, 72, 0, True, True, True, "dense", 0.0),
        (65, 3, 7, False, True, True, "slice", 0.0),
        (64, 128, 5, True, False, False, "slice", 0.0),
        (127, 384, 0, False, True, False, "dense", 1.0),
        (130, 33, 0, True, False, False, "dense", 10.0),
        (20, 9000, 3, True, True, True, "slice", 0.0),
        (17, 20_000, 0, False, False, False, "dense", 1.0),
        (1, 6, 0, True, False, False, "dense", 0.0),
        (1, 6, 0, False, False, False, "dense", 0.0),
        (1, 6, 4, False, True, True, "dense", 0.0),
        (0, 6, 2, True, False, False, "dense", 0.0),
    ]
]
CASES += cases_pairwise.CASES
