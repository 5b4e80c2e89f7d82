"""The CUDA kernels' arithmetic, indices and barriers, run on the CPU: the threads of a block are threads here.

References are float64 and written from the definitions. Every buffer lies between bands of NaN: a read outside poisons
the result, a write outside is found.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc/cuda"
COMPILER = os.environ.get("CXX", "g++")
# IMBDIFF_FILL=3: three blocks fill this "GPU", so that small sizes take both the split and the unsplit road.
FLAGS = ["-std=c++20", "-Wno-unknown-pragmas", "-DIMBDIFF_EMULATE", "-DIMBDIFF_FILL=3", f"-I{CUDA}"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BAND = 64  # elements of NaN before and after
# Half a unit in the last place of the rows' dtype, to which gradients are rounded.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER} (set CXX)")


def compile_driver(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [COMPILER, *FLAGS, str(HERE / "driver.cpp"), *arguments, "-lpthread"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    compile_driver("-O2", "-fPIC", "-shared", "-o", str(library)).check_returncode()
    loaded = ctypes.CDLL(str(library))
    loaded.two_branch_scratch.restype = ctypes.c_int64
    return loaded


class Buffer:
    """Rows [n, D] with `gap` elements between them and NaN in the gaps and around; or what a kernel shall write."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, gap: int = 0, shift: int = 0) -> None:
        *_, width = shape
        count = math.prod(shape[:-1])
        self.stride = width + gap
        self.whole = torch.full((2 * BAND + shift + count * self.stride,), math.nan, dtype=dtype)
        self.view = self.whole[BAND + shift :].as_strided((count, width), (self.stride, 1), BAND + shift)
        self.pointer = self.view.data_ptr() if self.view.numel() else self.whole[BAND:].data_ptr()

    def fill(self, values: Tensor) -> Buffer:
        self.view.copy_(values.reshape(self.view.shape))
        return self

    def untouched_around(self) -> bool:
        around = self.whole.clone()
        around.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(math.nan)
        return bool(around.isnan().all())


def pointers(*buffers: Buffer | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(buffers)))(*[b.pointer if b else None for b in buffers])


def rows(shape: tuple[int, int], dtype: torch.dtype, seed: int, gap: int = 0, shift: int = 0) -> Buffer:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Buffer(shape, dtype, gap, shift).fill(values)


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32, most: float = 2e-6) -> None:
    """Within a few float32 roundings of the largest, plus the rounding of the output's dtype."""
    assert torch.equal(got.isnan(), want.isnan())
    if not got.numel():
        return
    error, scale = (got.double() - want).abs().nan_to_num(), want.abs().nan_to_num()
    smallest = 6e-8 if dtype == torch.float16 else 1e-30
    assert (error <= most * scale.max() + ROUNDING[dtype] * scale + smallest).all(), error.max()


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


def negative_distance(
    x: Tensor, y: Tensor, weight: Tensor | None, scale: float, include_self: bool, per_row: bool
) -> tuple[Tensor, Tensor]:
    N, columns = len(x), torch.cat([x, y.detach()])
    energy = scale * (x[:, None] - columns[None]).square().sum(2)
    minus = -energy if include_self else (-energy).masked_fill(torch.eye(N, len(columns), dtype=torch.bool), -math.inf)
    lse, c = minus.logsumexp(1), len(columns) - (not include_self)
    if not per_row:
        return lse.logsumexp(0) - math.log(N * c), lse
    return ((lse - math.log(c)) * (1 if weight is None else weight)).mean(), lse


def run_negative_distance(
    kernels: ctypes.CDLL, x: Buffer, y: Buffer, weight: Tensor | None, scale: float, include_self: bool, per_row: bool,
    split_k: bool, grad: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (N, D), M = x.view.shape, y.view.shape[0]
    code, dtype = DTYPES.index(x.whole.dtype), x.whole.dtype
    sizes = (ctypes.c_int64 * 2)()
    N_, M_, D_ = (ctypes.c_int64(n) for n in (N, M, D))
    kernels.contrast_scratch(N_, M_, D_, int(split_k), sizes)
    loss, lse, saved = Buffer((1,)), Buffer((N,)), Buffer((N, N + M) if split_k else (0,))
    grad_x = Buffer((N, D), dtype)
    scratch, scratch_bwd, upstream = Buffer((sizes[0],)), Buffer((sizes[1],)), Buffer((1,)).fill(torch.tensor(grad))
    w = None if weight is None else Buffer((N,)).fill(weight)
    common = (
        code, N_, M_, D_,
        ctypes.c_void_p(x.pointer), ctypes.c_int64(x.stride), ctypes.c_void_p(y.pointer), ctypes.c_int64(y.stride),
        ctypes.c_double(scale), int(include_self), int(per_row), int(split_k), ctypes.c_void_p(w and w.pointer),
    )  # fmt: skip
    kernels.contrast_forward(*common, pointers(loss, lse, saved), ctypes.c_void_p(scratch.pointer))
    kernels.contrast_backward(
        *common, pointers(upstream, lse, saved), ctypes.c_void_p(grad_x.pointer), ctypes.c_void_p(scratch_bwd.pointer)
    )
    for buffer in (x, y, loss, lse, saved, grad_x, scratch, scratch_bwd, upstream):
        assert buffer.untouched_around()
    return loss.view[0, 0], lse.view[0], grad_x.view


@pytest.mark.parametrize("split_k", [False, True], ids=["streaming", "split"])
@pytest.mark.parametrize(
    ("N", "M", "D", "dtype", "include_self", "per_row", "weighted"),
    [
        (5, 0, 9, torch.float32, True, False, False),
        (70, 9, 67, torch.float32, False, True, True),  # tiles cut on every side
        (70, 9, 67, torch.bfloat16, True, True, False),
        (33, 200, 40, torch.float16, False, False, False),
        (6, 3, 1100, torch.float32, False, False, False),  # the width in parts
        (130, 0, 35, torch.float32, True, False, False),  # tiles below the diagonal
        (1, 2, 3, torch.float32, False, True, True),
        (2, 0, 0, torch.float32, True, False, False),
        (3, 260, 5, torch.float32, False, True, True),  # several tiles in a part
    ],
)
def test_negative_distance(
    kernels: ctypes.CDLL, N: int, M: int, D: int, dtype: torch.dtype, include_self: bool, per_row: bool, weighted: bool,
    split_k: bool,
) -> None:  # fmt: skip
    x, y = rows((N, D), dtype, 1, gap=D % 3, shift=D % 2), rows((M, D), dtype, 2, gap=D % 5)
    x.view.add_(10)  # a common offset: what cancels in a Gram form
    y.view.add_(10)
    weight = torch.rand(N, generator=torch.Generator().manual_seed(3)) if weighted else None
    scale = 2.0 / max(D, 1)
    loss, lse, grad = run_negative_distance(kernels, x, y, weight, scale, include_self, per_row, split_k, grad=3.0)
    leaf = x.view.double().requires_grad_()
    want, want_lse = negative_distance(leaf, y.view.double(), weight, scale, include_self, per_row)
    close(loss, want.detach(), most=3e-6)
    close(lse, want_lse.detach(), most=3e-6)
    if D:
        (want_grad,) = torch.autograd.grad(3.0 * want, leaf)
        close(grad, want_grad, dtype, most=4e-6)


@pytest.mark.parametrize("split_k", [False, True], ids=["streaming", "split"])
def test_negative_distance_golden_values_and_limits(kernels: ctypes.CDLL, split_k: bool) -> None:
    i, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5)
    x, none = Buffer((4, 5)).fill(torch.sin(i + 2 * d)), Buffer((0, 5))
    for scale, include_self, per_row, want in [
        (0.4, True, False, -0.8729599714688224),
        (0.4, False, False, -1.4978172438078718),
        (1.0, False, True, -3.0389838674846428),
    ]:
        loss, _, _ = run_negative_distance(kernels, x, none, None, scale, include_self, per_row, split_k)
        assert loss.item() == pytest.approx(want, abs=1e-6)
    # Far apart, without the self term: exp(-E) underflows, its logarithm must not; nor may the diagonal overflow.
    for per_row in (False, True):
        loss, _, grad = run_negative_distance(kernels, x, none, None, 1e4, False, per_row, split_k)
        leaf = x.view.double().requires_grad_()
        want, _ = negative_distance(leaf, none.view.double(), None, 1e4, False, per_row)
        close(loss, want.detach())
        close(grad, torch.autograd.grad(want, leaf)[0], most=2e-2)  # E itself is 1e4, to seven digits
    # Equal rows have distance exactly 0; NaN in, NaN out.
    x.fill(torch.full((4, 5), 1 / 3))
    loss, _, grad = run_negative_distance(kernels, x, none, None, 1.0, True, False, split_k)
    assert abs(loss.item()) < 1e-6
    assert grad.abs().max() == 0
    x.view[2, 4] = math.nan
    loss, lse, grad = run_negative_distance(kernels, x, none, None, 1.0, True, False, split_k)
    assert loss.isnan()
    assert lse.isnan().all()
    assert grad.isnan().any(1).all()


def test_same_bits_every_time(kernels: ctypes.CDLL) -> None:
    """Whatever the threads' order, which is the machine's choice."""
    x, y = rows((66, 530), torch.float32, 1), rows((4, 530), torch.float32, 2)
    for split_k in (False, True):
        first, *rest = (run_negative_distance(kernels, x, y, None, 1e-3, True, True, split_k) for _ in range(2))
        assert all(torch.equal(a, b) for other in rest for a, b in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("races") / "races"
    built = compile_driver("-O1", "-g", "-fsanitize=thread", "-DRACES", "-o", str(program))
    if built.returncode and "tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    if "unexpected memory mapping" in run_races(program, str(0)).stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    return program


def run_races(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, check=False)


def test_no_data_race(races: Path) -> None:
    done = run_races(races)
    assert done.returncode == 0, done.stderr
    assert "WARNING: ThreadSanitizer" not in done.stderr


BARRIERS = sum(path.read_text().count("__syncthreads();") for path in CUDA.glob("*.cu*"))


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_every_barrier_is_needed(races: Path, barrier: int) -> None:
    """Proof that the test above can fail: without this one __syncthreads a race is reported.

    ThreadSanitizer remembers four accesses to a word, of 256 threads here, so a single run may miss one.
    """
    assert any("WARNING: ThreadSanitizer: data race" in run_races(races, str(barrier)).stderr for _ in range(6))
