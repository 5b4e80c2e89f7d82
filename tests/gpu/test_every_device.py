"""What only a GPU can show, of every operation x back end of its table; `make gpu` runs the tests marked `gpu`.

Where there is none they are skipped. The same functions run here on the CPU's back ends wherever they mean something.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from imbdiff import ops
from imbdiff.ops._backends import CAPABILITIES
from imbdiff.ops._op import REGISTRY, call, overload

from ..ops.case import Case
from ..ops.cases import CASES
from ..ops.rules import (
    back_ends,
    check_deterministic,
    check_values_and_gradients,
    gpu_marks,
    gradients,
    mapped,
    moved,
    rows,
    runs,
)

DEVICES = ("cpu", "cuda")
COMPILED = [op for op in REGISTRY if {"triton", "cuda"} & CAPABILITIES[op].keys()]
PLACES = [
    pytest.param(
        op, backend, device, id=f"{op}-{backend}-{device}", marks=gpu_marks(backend) if device == "cuda" else []
    )
    for op in COMPILED
    for device in DEVICES
    for backend in back_ends(op, device)
    if (device, backend) != ("cuda", "reference")
]
ON_GPU = [place for place in PLACES if place.id.endswith("-cuda")]
everywhere = pytest.mark.parametrize(("op", "backend", "device"), PLACES)
FAR = 2**31


@pytest.mark.parametrize(("case", "backend", "dtype"), runs("cuda"))
def test_values_and_gradients(case: Case, backend: str, dtype: torch.dtype) -> None:
    check_values_and_gradients(case, backend, dtype, "cuda")


@pytest.mark.parametrize(("op", "backend", "device"), ON_GPU)
def test_the_same_bits_twenty_times(op: str, backend: str, device: str) -> None:
    check_deterministic(op, backend, device)


@pytest.mark.parametrize(("case", "backend", "dtype"), runs("cuda", [torch.float32]))
def test_outputs_are_laid_out_as_the_fake_says(case: Case, backend: str, dtype: torch.dtype) -> None:
    args = moved(case.make(dtype), "cuda")
    out = overload(f"{case.op}_{backend}")(*args)
    for o, f in zip(out, REGISTRY[case.op].fake(backend, *args), strict=True):
        assert (o.shape, o.dtype, o.stride(), o.device) == (f.shape, f.dtype, f.stride(), f.device)


def test_moving_keeps_the_layout() -> None:
    """Else the strided cases above would be dense ones."""
    sliced, expanded = torch.randn(5, 9)[:, 2:6], torch.randn(1, 4).expand(3, 4)
    for x, y in zip([sliced, expanded], moved([sliced, expanded], "meta"), strict=True):
        assert y.device.type == "meta"
        assert (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())


@contextlib.contextmanager
def busy_stream(device: str) -> Iterator[None]:
    """A stream of its own that is busy for a while, so that work on another one would overtake it."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        yield
    torch.cuda.synchronize()


@everywhere
def test_runs_on_the_current_stream(op: str, backend: str, device: str) -> None:
    case = max((c for c in CASES if c.op == op), key=lambda c: rows(c.make(torch.float32)).numel())
    args = moved(case.make(torch.float32), device)
    grads = [torch.ones_like(o) for o in call(op, "reference", *args)]
    want = gradients(case, backend, args, grads)
    pairs: list[tuple[Tensor, Tensor]] = []

    def not_yet(x: Tensor) -> Tensor:
        pairs.append((torch.full_like(x, torch.nan if x.is_floating_point() else -1), x))
        return pairs[-1][0]

    late = mapped(args, not_yet)
    with busy_stream(device):
        for empty, values in pairs:
            empty.copy_(values)
        got = gradients(case, backend, late, grads)
    for g, w in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        torch.testing.assert_close(g, w)


def two_branch(own: Tensor, target: Tensor, other: Tensor) -> Tensor:
    ones = torch.ones(1, len(own), device=own.device)
    base, terms = ops.two_branch_loss(own, target, [other], ones, ones.new_tensor([[1.0, 0.25, 1.25]]))
    return base.mean() + terms.sum()


def negative_distance(x: Tensor, negatives: Tensor, _: Tensor) -> Tensor:
    return ops.negative_distance_loss(x, tau=1.0, per_dim=True, negatives=negatives)


def distance_hinge(x: Tensor, *_: Tensor) -> Tensor:
    return ops.distance_hinge_loss(x, margin=2.5, per_dim=True)


def cosine_contrastive(x: Tensor, negatives: Tensor, _: Tensor) -> Tensor:
    return ops.cosine_contrastive_loss(x, negatives=negatives, include_self=False)


def supcon(x: Tensor, *_: Tensor) -> Tensor:
    return ops.supcon_loss(x, torch.arange(len(x), device=x.device) // 2)


def product_of_gaussians(x: Tensor, other: Tensor, logvar: Tensor) -> Tensor:
    mean, log_precision, log_normalizer = ops.product_of_gaussians([x, other], [logvar, 0.5])
    return mean.sum() + log_precision.sum() + log_normalizer.sum()


def gaussian_divergence(mean: Tensor, logvar: Tensor, other: Tensor) -> Tensor:
    return ops.gaussian_divergence(mean, logvar, other[:4], logvar[:4]).mean()


def gaussian_overlap(mean: Tensor, logvar: Tensor, other: Tensor) -> Tensor:
    return ops.gaussian_overlap_loss(mean, logvar, other, logvar, form="reciprocal", per_dim=True, pairs="all")


def posterior_mean(x: Tensor, bank: Tensor, _: Tensor) -> Tensor:
    level = torch.full((len(x),), 0.7, device=x.device)
    return ops.posterior_mean(x, bank, level, level).square().mean()


def knn_radius(x: Tensor, *_: Tensor) -> Tensor:
    return ops.knn_radius(x.detach(), 1)


def ball_count(points: Tensor, centers: Tensor, _: Tensor) -> Tensor:
    radii = torch.full((len(centers),), 2.0 * centers.shape[1], device=centers.device)
    return torch.cat(ops.ball_count(points.detach(), centers, radii))


def posterior_draw(x: Tensor, bank: Tensor, _: Tensor) -> Tensor:
    signal, own = torch.full((len(x),), 0.1, device=x.device), torch.arange(len(x), device=x.device)
    return ops.posterior_draw(x, bank, signal, 1 - signal, own / len(x), own=own, gate="full")


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "two_branch": two_branch,
    "negative_distance": negative_distance,
    "distance_hinge": distance_hinge,
    "cosine_contrastive": cosine_contrastive,
    "supcon": supcon,
    "product_of_gaussians": product_of_gaussians,
    "gaussian_divergence": gaussian_divergence,
    "gaussian_overlap": gaussian_overlap,
    "posterior_mean": posterior_mean,
    "knn_radius": knn_radius,
    "ball_count": ball_count,
    "posterior_draw": posterior_draw,
}


def test_every_operation_has_its_loss_here() -> None:
    assert LOSSES.keys() == set(COMPILED)


def value_and_gradient(f: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    """Indices and radii have no gradient."""
    x = args[0].detach().requires_grad_()
    value = f(x, *args[1:])
    return [value.detach(), *(torch.autograd.grad(value, x) if value.requires_grad else ())]


@everywhere
def test_compiles_whole(op: str, backend: str, device: str) -> None:
    torch._dynamo.reset()
    args = [torch.randn(6, 40, device=device) for _ in range(3)]
    compiled: Any = torch.compile(LOSSES[op], fullgraph=True, backend="aot_eager")
    with ops.use(backend):
        for c, e in zip(value_and_gradient(compiled, args), value_and_gradient(LOSSES[op], args), strict=True):
            torch.testing.assert_close(c, e)


@everywhere
@pytest.mark.slow
def test_rows_more_than_2_31_elements_apart(op: str, backend: str, device: str) -> None:
    """On the CPU the four gigabytes between the rows are never touched."""
    D = 256
    buffer = torch.empty(FAR + 3 * D, dtype=torch.bfloat16, device=device)
    far = [buffer.as_strided((2, D), (FAR, 1), n * D) for n in range(3)]
    near = [torch.randn(2, D, device=device).bfloat16() for _ in far]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    with ops.use(backend):
        got, want = value_and_gradient(LOSSES[op], far), value_and_gradient(LOSSES[op], near)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "backend", "device"), [p for p in PLACES if p.values[0] == "two_branch"])
def test_more_than_2_31_elements(op: str, backend: str, device: str) -> None:
    """On the GPU; on the CPU the same with few rows. Each row is its own: the last ones must be as they are alone."""
    D = 2**15
    B = FAR // D + 8 if device == "cuda" else 24
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    own, target, other = (torch.randn(B, D, device=device, dtype=torch.bfloat16) for _ in range(3))

    def run(*args: Tensor) -> list[Tensor]:
        x, y, z = (r.detach().requires_grad_(n != 1) for n, r in enumerate(args))
        ones = torch.ones(1, len(x), device=device)
        base, terms = ops.two_branch_loss(x, y, [z], ones, ones.new_tensor([[1.0, 0.25, 1.25]]))
        return [base.detach(), terms.detach()[0], *torch.autograd.grad(base.sum() + terms.sum(), [x, z])]

    with ops.use(backend):
        whole, last = run(own, target, other), run(*(r[-8:].clone() for r in (own, target, other)))
    for w, l in zip(whole, last, strict=True):
        torch.testing.assert_close(w[-8:], l)


@pytest.mark.parametrize(("op", "backend", "device"), ON_GPU)
def test_memory_peak(op: str, backend: str, device: str) -> None:
    """Of all pairs, streaming: nothing of size N x N. Of rows: as many tensors of their size as stand here.

    A product has two outputs, whose gradients are tensors of that size, and the gradient of its rows.
    """
    rows_alone = {"two_branch": 1, "product_of_gaussians": 3}
    N, D = (256, 16_384) if op in rows_alone else (8192, 64)
    args = [torch.randn(N, D, device=device) for _ in range(3)]
    with ops.use(backend):
        value_and_gradient(LOSSES[op], args)  # compiles, and creates what stays
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value_and_gradient(LOSSES[op], args)
        extra = torch.cuda.max_memory_allocated() - before
    assert extra < (rows_alone[op] * N * D * 4 + 2**20 if op in rows_alone else N * N)
