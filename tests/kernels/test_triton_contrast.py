"""The streaming plans of negative_distance and distance_hinge in Triton, interpreted, against float64 code."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the triton back end needs triton")
from imbdiff.kernels import contrast, engine

NONE = torch.empty(0)
FORMS = list(product((False, True), (False, True)))  # include_self, per_row
# Rows, negatives, width: one and two rows, more than a tile of either, odd widths, more than one step of contraction.
SIZES = [(1, 3, 4), (2, 0, 5), (17, 0, 64), (17, 9, 129), (66, 65, 20), (5, 3, 300), (33, 1, 1)]


def reference(x: Tensor, negatives: Tensor, weight: Tensor, scale: float, include_self: bool, per_row: bool):
    y, N, c = torch.cat([x, negatives]), len(x), len(x) + len(negatives) - (not include_self)
    energy = scale * (x[:, None] - y[None]).square().sum(-1)
    if not include_self:
        energy = energy.masked_fill(torch.eye(N, len(y), dtype=torch.bool), math.inf)
    lse = (-energy).logsumexp(1)
    if not per_row:
        return lse.logsumexp(0) - math.log(N * c), lse
    return ((weight if len(weight) else 1) * (lse - math.log(c))).mean(), lse


def both(x: Tensor, *args, grad: float = 1.0):
    """Loss, lse and gradient of the reference in x's dtype."""
    x = x.clone().requires_grad_()
    loss, lse = reference(x, *args)
    (gradient,) = torch.autograd.grad(loss, x, torch.tensor(grad, dtype=x.dtype))
    return loss.detach(), lse.detach(), gradient


def compare(close, x, negatives, weight, scale, include_self, per_row, grad=0.7):
    form = (scale, include_self, per_row)
    loss, lse, saved = contrast.negative_distance(x, negatives, weight, *form)
    got = contrast.negative_distance_bwd(torch.tensor(grad), x, negatives, weight, lse, saved, *form)
    assert got.dtype == x.dtype
    assert loss.dtype == lse.dtype == torch.float32
    assert saved.shape == (0,)
    assert got.is_contiguous()
    exact = both(x.double(), negatives.double(), weight.double(), *form, grad=grad)
    # bfloat16 is not rounded in the interpreter; float16 is, once, where the engine says.
    centre = x.double().mean(0)
    dtype = torch.float16 if x.dtype == torch.float16 else torch.float64
    rounded = [(v.double() - centre).to(dtype) for v in (x, negatives)]
    plain = both(*(v.float() for v in rounded), weight, *form, grad=grad)
    # Norms and products cancel in a distance, log N c in a loss: float32 carries eps of the largest of them.
    widest = max(v.double().square().sum(1).max().item() for v in rounded if len(v))
    largest = 4 * scale * widest + math.log(len(x) * (len(x) + len(negatives)))
    slack = torch.finfo(torch.float32).eps * largest
    close(loss, exact[0], plain[0], slack=slack * max(1.0, weight.abs().max().item() if len(weight) else 1.0))
    close(lse, exact[1], plain[1], slack=slack)
    close(got, exact[2], plain[2].to(x.dtype), factor=3, slack=slack * exact[2].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("include_self", "per_row"), FORMS)
def test_loss_and_gradient(include_self, per_row, dtype, guard, bands, close):
    for N, M, D in SIZES if dtype == torch.float32 else SIZES[1:6:2]:
        g = torch.Generator().manual_seed(N + 100 * M + D)
        x, negatives = (guard(torch.randn(n, D, generator=g).to(dtype), gap) for n, gap in ((N, 3), (M, 1)))
        weight = guard(torch.rand(N, generator=g)) if per_row and N % 2 else NONE
        compare(close, x, negatives, weight, 1 / D, include_self, per_row)


def test_golden_values():
    mu = torch.tensor([[math.sin(i + 2 * d) for d in range(5)] for i in range(4)])
    for form, value in [
        ((1 / 2.5, True, False), -0.8729599714688224),
        ((1 / 2.5, False, False), -1.4978172438078718),
        ((1.0, False, True), -3.0389838674846428),
    ]:
        assert abs(contrast.negative_distance(mu, mu[:0], NONE, *form)[0].item() - value) < 4e-7


@pytest.mark.parametrize(("include_self", "per_row"), FORMS)
def test_a_common_offset_cancels(include_self, per_row, close):
    g = torch.Generator().manual_seed(0)
    x, negatives = torch.randn(20, 32, generator=g), torch.randn(7, 32, generator=g)
    offset = torch.randn(32, generator=g)
    offset *= 100 / offset.norm()
    # Without the centre the norms would be 10^4 and the distances off by 10^-3.
    compare(close, x + offset, negatives + offset, NONE, 0.05, include_self, per_row)


def test_rows_that_coincide_and_rows_far_away(close):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=g).repeat(2, 1)  # distances of exactly 0 off the diagonal
    compare(close, x, x[:2], NONE, 0.5, False, False)
    far = torch.randn(9, 8, generator=g)
    far[4] += 60  # exp(-E) of this row underflows: only its own maximum keeps it
    for per_row in (False, True):
        compare(close, far, far[:0], NONE, 1.0, False, per_row)


def test_the_diagonal_is_exactly_zero():
    x = 30 * torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    assert (contrast.negative_distance(x, x[:0], NONE, 1.0, True, True)[1] == 0).all()


def test_rows_more_than_2_to_the_31_elements_apart(close):
    stride = 2**30 + 16  # the memory between the rows is never touched
    x = torch.empty(2 * stride + 8, dtype=torch.bfloat16).as_strided((3, 5), (stride, 1)).copy_(torch.randn(3, 5))
    compare(close, x, x[:2], NONE, 0.3, False, True)


def test_expanded_rows(close):
    compare(close, torch.randn(1, 8).expand(5, 8), torch.randn(3, 8), NONE, 0.3, False, True)
    compare(close, torch.randn(5, 8), torch.randn(1, 8).expand(3, 8), NONE, 0.3, True, False)


def test_weights_of_any_size_in_float16(close):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 16, generator=g).half()
    for size in (1e-6, 1e6):
        compare(close, x, x[:0], size * torch.randn(20, generator=g), 0.1, False, True, grad=1 / size)
    none = torch.zeros(20)
    grad = contrast.negative_distance_bwd(torch.tensor(1.0), x, x[:0], none, none, NONE, 0.1, False, True)
    assert (grad == 0).all()


@pytest.mark.parametrize(("include_self", "per_row"), FORMS)
def test_nan_in_nan_out(include_self, per_row):
    for spoil in range(2):
        x, negatives = torch.randn(3, 4), torch.randn(2, 4)
        (x, negatives)[spoil][1, 2] = torch.nan
        form = (0.5, include_self, per_row)
        loss, lse, saved = contrast.negative_distance(x, negatives, NONE, *form)
        grad = contrast.negative_distance_bwd(torch.tensor(1.0), x, negatives, NONE, lse, saved, *form)
        assert loss.isnan()
        assert lse.isnan().all()
        assert grad.isnan().any()


@pytest.mark.parametrize("per_row", [False, True])
def test_nothing_to_compare(per_row):
    for N, M, D, include_self in [(0, 0, 3, True), (0, 4, 3, False), (1, 0, 3, False), (0, 0, 0, True)]:
        x, negatives = torch.randn(N, D), torch.randn(M, D)
        form = (1.0, include_self, per_row)
        loss, lse, saved = contrast.negative_distance(x, negatives, NONE, *form)
        grad = contrast.negative_distance_bwd(torch.tensor(1.0), x, negatives, NONE, lse, saved, *form)
        assert loss.shape == ()
        assert loss == 0
        assert torch.equal(lse, torch.zeros(N))
        assert torch.equal(grad, torch.zeros(N, D))
    loss, lse, _ = contrast.negative_distance(torch.empty(3, 0), torch.empty(2, 0), NONE, 1.0, False, per_row)
    assert loss.abs() < 1e-6
    assert (lse - math.log(4)).abs().max() < 1e-6


def hinge(x: Tensor, margin: float, scale: float, grad: float) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    short = (margin - scale * (x[:, None] - x[None]).square().sum(-1)).clamp(min=0)
    loss = short[~torch.eye(len(x), dtype=torch.bool)].square().mean()
    return loss.detach(), torch.autograd.grad(loss, x, torch.tensor(grad, dtype=x.dtype))[0]


def compare_hinge(close, x, margin, scale, grad=0.7):
    loss, saved = contrast.distance_hinge(x, margin, scale)
    got = contrast.distance_hinge_bwd(torch.tensor(grad), x, saved, margin, scale)
    assert (got.dtype, loss.dtype, saved.shape) == (x.dtype, torch.float32, (0,))
    exact = hinge(x.double(), margin, scale, grad)
    centred = x.double() - x.double().mean(0)
    rounded = centred.to(torch.float16 if x.dtype == torch.float16 else torch.float32)
    plain = hinge(rounded.float(), margin, scale, grad)
    # What norms and products leave of a distance, in units of the margin.
    slack = torch.finfo(torch.float32).eps * 8 * scale * centred.square().sum(1).max().item()
    close(loss, exact[0], plain[0], slack=slack * margin)
    largest = 8 * scale / len(x) * centred.norm(dim=1).max().item() * grad
    close(got, exact[1], plain[1].to(x.dtype), factor=3, slack=slack * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_distance_hinge(dtype, guard, bands, close):
    for N, D in [(2, 5), (17, 64), (66, 20), (5, 300), (33, 1)][:: 1 if dtype == torch.float32 else 2]:
        x = guard((torch.randn(N, D, generator=torch.Generator().manual_seed(N)) + 1).to(dtype), 3)
        for margin in (1.8, 9.0):  # some pairs, all pairs
            compare_hinge(close, x, margin, 1 / D)


def test_margins_of_any_size_in_float16(close):
    g = torch.Generator().manual_seed(0)
    for size in (1e-2, 30.0):
        x = (size * torch.randn(20, 16, generator=g)).half()
        compare_hinge(close, x, 32 * size**2, 1.0, grad=0.1 / size**3)
        compare_hinge(close, x, 32.0, 1 / size**2, grad=1.0)


def test_pairs_beyond_the_margin_count_for_nothing():
    x = 100 * torch.arange(20.0)[:, None] + torch.zeros(1, 8)
    for margin, few in [(1e-3, 0), (8e4 + 8, 38)]:  # none; each row with its neighbours
        loss, saved = contrast.distance_hinge(x, margin, 1.0)
        assert abs(loss - few * 64 / 380) <= 1e-2 * few
        grad = contrast.distance_hinge_bwd(torch.tensor(1.0), x, saved, margin, 1.0)
        assert (grad[1:-1].abs() < 1e-6 + 1e-2 * few).all()
        assert (grad[[0, -1]] != 0).all() == (few > 0)


def test_a_hinge_of_nan_and_of_nothing():
    x = torch.randn(3, 4)
    x[1, 2] = torch.nan
    assert contrast.distance_hinge(x, 1.0, 1.0)[0].isnan()
    assert contrast.distance_hinge_bwd(torch.tensor(1.0), x, NONE, 1.0, 1.0).isnan().all()
    for N, D in [(0, 3), (1, 3), (1, 0)]:
        x = torch.randn(N, D)
        assert contrast.distance_hinge(x, 1.0, 1.0)[0] == 0
        assert torch.equal(contrast.distance_hinge_bwd(torch.tensor(1.0), x, NONE, 1.0, 1.0), torch.zeros(N, D))
    assert contrast.distance_hinge(torch.empty(3, 0), 2.0, 1.0)[0] == 4


def test_every_line_of_the_tables_is_valid():
    for table, dtype in product((engine.FORWARD, engine.BACKWARD), (torch.float32, torch.float16)):
        for D in (1, 64, 65, 128, 129, 256, 257, 300_000):
            line = engine.config(table, dtype, D)
            assert min(line.rows, line.columns, line.depth) >= 16  # the least that tl.dot takes on a GPU
            assert not line.whole or line.depth >= D
            assert table is engine.FORWARD or line.output == line.depth or not line.whole
