"""Golden values, laws and refusals of two_branch_loss. The oracle is autograd of losses written with .detach()."""

import pytest
import torch

from imbdiff import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def golden():
    i, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5.0, dtype=torch.float64)
    own, other, target = torch.sin(i + 2 * d), torch.sin(i + 2 * d + 0.3 * (1 + i)), torch.cos(5 * i + 3 * d)
    return own.requires_grad_(), other.requires_grad_(), target, (i[:, 0] + 1) / 4


def total(base, terms):
    return base.mean() + terms.mean(1).sum()


def oracle(own, target, others, weight, scales, margin):
    """Written from the definition, in another way than the reference: surrogate losses, one for each gradient."""

    def distance(a, b):
        return ((a - b) ** 2).flatten(1).mean(1)

    base = distance(own, target)
    values, surrogate = [], base.mean()
    for k, other in enumerate(others):

        def f(d, k=k):
            return weight[k] * (d if margin[k] is None else torch.clamp(margin[k] - d, min=0))

        values.append(scales[k, 2] * f(distance(own, other)))
        surrogate = surrogate + (scales[k, 0] * f(distance(own, other.detach()))).mean()
        surrogate = surrogate + (scales[k, 1] * f(distance(own.detach(), other))).mean()
    return base, torch.stack(values) if values else torch.zeros(0, len(own)), surrogate


def test_golden_cbdm():
    own, other, target, w = golden()
    base, terms = ops.two_branch_loss(own, target, [other], w[None], torch.tensor([[1.0, 0.25, 1.25]]).double())
    loss = total(base, terms)
    assert base.mean().item() == pytest.approx(1.0960122513193704, rel=1e-14)
    assert loss.item() == pytest.approx(1.4269858314742399, rel=1e-14)
    g_own, g_other = torch.autograd.grad(loss, [own, other])
    want_own = [0.047875749, 0.0578440268, -0.1127178791, 0.0364782844, 0.0980504457]
    want_other = [0.0019762827, -0.0072955056, 0.0040957205, 0.0038866634, -0.0073305658]
    torch.testing.assert_close(g_own[1], torch.tensor(want_own, dtype=torch.float64), atol=6e-11, rtol=0)
    torch.testing.assert_close(g_other[1], torch.tensor(want_other, dtype=torch.float64), atol=6e-11, rtol=0)


def test_golden_push():
    own, other, target, w = golden()
    ones = torch.ones(1, 3).double()
    _, terms = ops.two_branch_loss(own, target, [other], w[None], ones, margin=[0.3])
    assert terms.mean().item() == pytest.approx(0.03047470281485692, rel=1e-14)
    assert (terms[0] > 0).tolist() == [True, True, False, False]
    (g,) = torch.autograd.grad(terms.mean(), own)
    want = torch.tensor([0.0073880052, -0.0040898054, -0.003984086, 0.007405735, -0.0021796603], dtype=torch.float64)
    torch.testing.assert_close(g[0], want, atol=6e-11, rtol=0)
    assert not g[2:].any()


def test_golden_pogdiff_is_a_weighted_target():
    own, other, target, psi = golden()
    base, terms = ops.two_branch_loss(own, target, [other], psi[None], torch.tensor([[1.0, 0.0, 1.0]]).double())
    assert total(base, terms).item() == pytest.approx(1.360791115443266, rel=1e-13)
    mixed = ((target + psi[:, None] * other) / (1 + psi[:, None])).detach()
    single = ((1 + psi) * (own - mixed).square().mean(1)).mean()
    two = torch.autograd.grad(total(base, terms), [own, other])
    torch.testing.assert_close(two[0], torch.autograd.grad(single, own)[0])
    assert not two[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [0, 1, 4])
def test_against_autograd_of_detached_losses(dtype, K):
    shape = (3, 2, 5, 7)
    own, target, *others = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2 + K))
    weight, scales = torch.rand(K, 3), torch.randn(K, 3)
    margin = [None, 1.5, 3.0, 0.01][:K]
    leaves = [x.requires_grad_() for x in (own, *others)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    base, terms = ops.two_branch_loss(own, target, others, weight.to(dtype), scales.to(dtype), margin)
    assert base.dtype == terms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    args = (weight.to(dtype).double(), scales.to(dtype).double(), margin)
    base64, terms64, surrogate = oracle(exact[0], target.double(), exact[1:], *args)
    eps = torch.finfo(base.dtype).eps
    torch.testing.assert_close(base.double(), base64, rtol=20 * eps, atol=20 * eps)
    torch.testing.assert_close(terms.double(), terms64.double(), rtol=20 * eps, atol=40 * eps)
    got = torch.autograd.grad(total(base, terms) if K else base.mean(), leaves)
    want = torch.autograd.grad(surrogate, exact)
    for g, w, x in zip(got, want, leaves, strict=True):
        assert g.dtype == x.dtype
        torch.testing.assert_close(g.double(), w, rtol=0, atol=4 * torch.finfo(dtype).eps * float(w.abs().max()))


def test_weight_zero_leaves_the_base_gradient_bit_for_bit():
    own, target, other = torch.randn(3, 8, 1, 8, 8).unbind()
    own.requires_grad_()
    (plain,) = torch.autograd.grad(ops.two_branch_loss(own, target)[0].mean(), own)
    scales = torch.tensor([[1.0, 0.25, 1.25]])
    (zero,) = torch.autograd.grad(total(*ops.two_branch_loss(own, target, [other], torch.zeros(1, 8), scales)), own)
    assert torch.equal(plain, zero)


def test_strides_offsets_and_expansion():
    wide = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    own, target = wide[:, 1:3], torch.randn(5, 5, 2, 4, dtype=torch.float64).permute(3, 2, 0, 1)
    other = torch.randn(1, 2, 5, 5, dtype=torch.float64).expand(4, -1, -1, -1)
    args = (torch.rand(1, 4).double(), torch.randn(1, 3).double())
    strided = ops.two_branch_loss(own, target, [other], *args)
    dense = ops.two_branch_loss(own.contiguous(), target.contiguous(), [other.contiguous()], *args)
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_a_margin_below_the_smallest_number_still_pushes():
    own, other = torch.zeros(2, 3, 4).unbind()
    other[1] = 1
    _, terms = ops.two_branch_loss(own, own, [other], torch.ones(1, 3), torch.ones(1, 3), margin=[1e-60])
    assert terms.abs().max() < 1e-37  # a pull would be 1


def test_empty_batch_and_nan():
    empty = torch.zeros(0, 3)
    base, terms = ops.two_branch_loss(empty, empty, [empty], torch.zeros(1, 0), torch.ones(1, 3))
    assert base.shape == (0,)
    assert terms.shape == (1, 0)
    own = torch.zeros(2, 3)
    own[0, 1] = torch.nan
    base, terms = ops.two_branch_loss(own, torch.ones(2, 3), [torch.ones(2, 3)], torch.ones(1, 2), torch.ones(1, 3))
    assert base.isnan().tolist() == terms[0].isnan().tolist() == [True, False]


x = torch.zeros(2, 3)
w, s = torch.ones(1, 2), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (([1.0], x), TypeError, "own must be a tensor"),
        ((torch.zeros(()), torch.zeros(())), ValueError, "own must be \\[B, ...\\], got a scalar"),
        ((x.long(), x.long()), TypeError, "own must be one of float32"),
        ((x, torch.zeros(2, 4)), ValueError, "target must be own's shape = \\[2, 3\\]"),
        ((x, x.double()), TypeError, "target must have own's dtype torch.float32"),
        ((x, x.clone().requires_grad_()), ValueError, "target is a constant"),
        ((x, x, [torch.zeros(3, 3)], w, s), ValueError, "others\\[0\\] must be own's shape"),
        ((x, x, [x.to("meta")], w, s), ValueError, "others\\[0\\] must be on cpu"),
        ((x, x, [x]), ValueError, "weight \\[K, B\\] and scales \\[K, 3\\] are needed for K = 1"),
        ((x, x, [x], torch.ones(1, 3), s), ValueError, "weight must be \\[K, B\\] = \\[1, 2\\]"),
        ((x, x, [x], w, torch.ones(1, 2)), ValueError, "scales must be \\[K, 3\\] = \\[1, 3\\]"),
        ((x, x, [x, x], w, s), ValueError, "weight must be \\[K, B\\] = \\[2, 2\\]"),
        ((x, x, [x], w.clone().requires_grad_(), s), ValueError, "weight is a constant"),
        ((x, x, [x], w, s, [0.1, 0.2]), ValueError, "margin must have K = 1"),
        ((x, x, [x], w, s, [0.0]), ValueError, "margin\\[0\\] must be a positive finite number"),
        ((x, x, [x], w, s, [-1.0]), ValueError, "margin\\[0\\]"),
        ((x, x, [x], w, s, [float("inf")]), ValueError, "margin\\[0\\]"),
        ((x, x, [x], w, s, [float("nan")]), ValueError, "margin\\[0\\]"),
    ],
)
def test_refusals(args, error, text):
    with pytest.raises(error, match=text):
        ops.two_branch_loss(*args)
