"""Golden values, laws and refusals of posterior_mean and posterior_draw."""

import pytest
import torch

from imbdiff import ops
from imbdiff.diffusion import make_path


def golden(dtype=torch.float64):
    i, d = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(5.0, dtype=torch.float64)
    bank, noise = torch.sin(i + 2 * d), torch.cos(5 * i + 3 * d)
    signal, sigma = torch.full((4,), 0.3**0.5, dtype=torch.float64), torch.full((4,), 0.7**0.5, dtype=torch.float64)
    x_t = signal[:, None] * bank + sigma[:, None] * noise
    return [v.to(dtype) for v in (x_t, bank, signal, sigma)]


ROWS = [
    [0.4733193298, 0.2865157125, 0.129205646, 0.1109593118],
    [0.1512329162, 0.3961144501, 0.3275079042, 0.1251447295],
]


def test_golden_weights_by_the_mean():
    x_t, bank, signal, sigma = golden()
    want = torch.tensor(ROWS, dtype=torch.float64) @ bank
    torch.testing.assert_close(ops.posterior_mean(x_t, bank, signal, sigma)[:2], want, atol=2e-9, rtol=0)


def test_draw_inverts_the_distribution_function():
    """Just below and just above each edge of row 0 the index changes by one."""
    x_t, bank, signal, sigma = golden()
    edges = torch.tensor(ROWS[0], dtype=torch.float64).cumsum(0)[:3]
    own = torch.zeros(1, dtype=torch.int64)
    for j, edge in enumerate(edges):
        for step, want in ((-1e-6, j), (1e-6, j + 1)):
            u = (edge + step)[None]
            got = ops.posterior_draw(x_t[:1], bank, signal[:1], sigma[:1], u, own=own, gate="full")
            assert got.tolist() == [want]


def test_a_row_of_no_weight_is_never_drawn():
    """Not even by the largest u below 1, where rounding may leave u of all the weights not less than all."""
    B, N, D = 48, 150, 6
    bank = torch.cat([torch.randn(N, D), torch.full((40, D), 1e4)])
    x_t, ones = torch.randn(B, D), torch.ones(B)
    u = torch.full((B,), 1.0, dtype=torch.float64).nextafter(torch.zeros(B, dtype=torch.float64))
    drawn = ops.posterior_draw(x_t, bank, ones, ones, u, own=torch.zeros(B, dtype=torch.int64), gate="full")
    assert (drawn < N).all()


def test_frequencies():
    x_t, bank, signal, sigma = golden()
    n = 40_000
    u = torch.rand(n, dtype=torch.float64)
    rows = [v[:1].expand(n, *v.shape[1:]) for v in (x_t, signal, sigma)]
    drawn = ops.posterior_draw(rows[0], bank, *rows[1:], u, own=torch.zeros(n, dtype=torch.int64), gate="full")
    p = torch.tensor(ROWS[0], dtype=torch.float64)
    assert ((drawn.bincount(minlength=4) / n - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()


def brute_force(x_t, bank, signal, sigma, log_prior):
    x0 = x_t[:, None] - signal.view(-1, 1, 1) * bank[None]
    logits = -(x0**2).sum(2) / (2 * sigma[:, None] ** 2)
    return (logits + (0 if log_prior is None else log_prior)).softmax(1)


@pytest.mark.parametrize("t", [0, 300, 550, 650, 750, 999])
@pytest.mark.parametrize("with_prior", [False, True])
def test_every_noise_level_against_float64(t, with_prior):
    B, N, D = 5, 9, 300
    bank = torch.randn(N, D, dtype=torch.float64).clamp(-1, 1)
    signal, sigma, _ = make_path("ddpm").coefficients(torch.full((B,), float(t), dtype=torch.float64))
    x_t = signal[:, None] * bank[:B] + sigma[:, None] * torch.randn(B, D, dtype=torch.float64)
    prior = torch.randn(N, dtype=torch.float64) if with_prior else None
    p = brute_force(x_t, bank, signal, sigma, prior)
    got = ops.posterior_mean(x_t, bank, signal, sigma, log_prior=prior)
    torch.testing.assert_close(got, p @ bank, atol=1e-6 if t == 0 else 1e-10, rtol=0)
    low = [v.float() for v in (x_t, bank, signal, sigma)]
    got32 = ops.posterior_mean(*low, log_prior=None if prior is None else prior.float())
    torch.testing.assert_close(got32.double(), p @ bank, atol=3e-4, rtol=0)
    # The same draws in both precisions, but where u lies within 1e-4 of an edge.
    u = torch.rand(B, dtype=torch.float64)
    far = ((p.cumsum(1) - u[:, None]).abs() > 1e-4).all(1)
    args = {"own": torch.arange(B), "gate": "full"}
    z64 = ops.posterior_draw(x_t, bank, signal, sigma, u, **args, log_prior=prior)
    z32 = ops.posterior_draw(*low, u.float(), **args, log_prior=None if prior is None else prior.float())
    assert torch.equal(z64[far], z32[far])
    if t == 0 and not with_prior:
        assert torch.equal(z32, torch.arange(B))


def test_gates():
    """With pure noise every row is as likely, so the draw is u's and only the gate decides."""
    N = 4
    bank, counts = torch.zeros(N, 3), torch.tensor([100, 50, 20, 5])
    u = torch.tensor([0.1, 0.3, 0.6, 0.9])  # drawn rows 0, 1, 2, 3
    own = torch.tensor([2, 2, 2, 2])
    args = (torch.zeros(4, 3), bank, torch.zeros(4), torch.ones(4), u)
    gated = {"own": own, "counts_x": counts[own], "counts_bank": counts}
    assert ops.posterior_draw(*args, **gated, gate="t2h").tolist() == [0, 1, 2, 2]
    assert ops.posterior_draw(*args, **gated, gate="h2t").tolist() == [2, 2, 2, 3]
    assert ops.posterior_draw(*args, own=own, gate="full").tolist() == [0, 1, 2, 3]


def test_prior_of_minus_infinity_is_never_drawn():
    args = (torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3), torch.ones(3))
    prior = torch.tensor([-torch.inf, 0.0, -torch.inf])
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    drawn = ops.posterior_draw(*args, u, own=torch.zeros(3, dtype=torch.int64), gate="full", log_prior=prior)
    assert drawn.tolist() == [1, 1, 1]


def test_gradient_of_the_mean():
    x_t, bank, signal, sigma = golden()
    assert torch.autograd.gradcheck(
        lambda a, b: ops.posterior_mean(a, b, signal, sigma), (x_t.requires_grad_(), bank.requires_grad_())
    )


def test_images_keep_their_shape_and_empty_batches_work():
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    out = ops.posterior_mean(x, x, torch.ones(2), torch.ones(2))
    assert out.shape == x.shape
    assert out.dtype == torch.bfloat16
    none = ops.posterior_mean(x[:0], x, torch.ones(0), torch.ones(0))
    assert none.shape == (0, 3, 4, 4)


def test_a_common_offset_costs_no_digits():
    """An offset of norm 100 moves x_t and the bank together; nothing else does."""
    torch.manual_seed(0)
    bank = torch.randn(12, 300, dtype=torch.float64)
    signal, sigma = torch.full((12,), 0.5, dtype=torch.float64), torch.full((12,), 5.0, dtype=torch.float64)
    x_t = signal[:, None] * bank + sigma[:, None] * torch.randn_like(bank)
    offset = torch.randn(300, dtype=torch.float64)
    offset *= 100 / offset.norm()
    moved = [v.float() for v in (x_t + signal[:, None] * offset, bank + offset, signal, sigma)]
    exact = ops.posterior_mean(*[v.double() for v in moved])
    assert (exact - offset).abs().max() < 5
    assert (ops.posterior_mean(*moved).double() - exact).abs().max() < 1e-5


def test_two_copies_share_the_weight_at_the_largest_logits():
    """At t = 0 logits are 1e7: the weights are halves all the same, and so is what the gradient is made of."""
    bank = torch.randn(3, 3072)
    bank[2] = bank[0]
    args = (bank, torch.ones(3), torch.full((3,), 1e-2))
    x_t = bank.clone().requires_grad_()
    out = ops.posterior_mean(x_t, *args)
    torch.testing.assert_close(out, bank, atol=1e-5, rtol=0)
    rows = bank.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.posterior_mean(bank, rows, *args[1:]).sum(), rows)
    torch.testing.assert_close(grad, torch.ones_like(grad), atol=1e-4, rtol=0)


def test_a_bank_of_many_parts_is_one_softmax():
    torch.manual_seed(1)
    bank, x_t = torch.randn(9000, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    small = (torch.full((3,), 0.6, dtype=torch.float64), torch.full((3,), 0.8, dtype=torch.float64))
    prior = torch.randn(9000, dtype=torch.float64)
    leaves = (x_t.requires_grad_(), bank.requires_grad_())
    got = ops.posterior_mean(*leaves, *small, log_prior=prior)
    want = brute_force(x_t, bank, *small, prior) @ bank
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    grad = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def assert_mean_and_gradients(got, given, want, leaves):
    atol = 1e-10 if got.dtype == torch.float64 else 3e-4
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=0)
    grad = torch.randn_like(got)
    found = torch.autograd.grad(got, given, grad)
    for a, b in zip(found, torch.autograd.grad(want, leaves, grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, atol=atol * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("D", [40, 1200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_noise_level_in_one_batch(D, dtype):
    """Rows of little noise have few weights, those of much have many; both in turn, in a bank of several blocks."""
    B, N = 68, 450  # the last four rows lie in two panels of six
    level = torch.linspace(0.4, 1.55, B, dtype=torch.float64)[torch.randperm(B)]
    bank = torch.randn(N, D, dtype=torch.float64).clamp(-1, 1)
    x_t = level.cos()[:, None] * bank[torch.randint(20, (B,))] + level.sin()[:, None] * torch.randn(B, D)
    given = [v.to(dtype).requires_grad_(v.ndim == 2) for v in (x_t, bank, level.cos(), level.sin())]
    leaves = [v.detach().double().requires_grad_(v.ndim == 2) for v in given]
    got, want = ops.posterior_mean(*given), brute_force(*leaves, None) @ leaves[1]
    assert_mean_and_gradients(got, given[:2], want, leaves[:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("excluded", [0, 5000, 12_000])
def test_a_bank_in_several_turns_whose_likely_rows_come_last(excluded, dtype):
    """The largest logits rise from turn to turn; before them, priors of minus infinity leave nothing at all."""
    B, N, D = 37, 12_000, 24
    bank = torch.randn(N, D, dtype=torch.float64) * torch.linspace(3, 0.1, N, dtype=torch.float64)[:, None]
    level = torch.linspace(0.3, 1.5, B, dtype=torch.float64)[torch.randperm(B)]
    x_t = level.cos()[:, None] * bank[-B:] + level.sin()[:, None] * torch.randn(B, D)
    prior = torch.randn(N, dtype=torch.float64)
    prior[:excluded] = -torch.inf
    given = [v.to(dtype).requires_grad_(v.ndim == 2) for v in (x_t, bank, level.cos(), level.sin())]
    leaves = [v.detach().double().requires_grad_(v.ndim == 2) for v in given]
    got = ops.posterior_mean(*given, log_prior=prior.to(dtype))
    if excluded == N:
        assert got.isnan().all()  # of no row at all
        return
    want = brute_force(*leaves, prior) @ leaves[1]
    assert_mean_and_gradients(got, given[:2], want, leaves[:2])


def test_the_gradient_of_x_is_the_same_with_the_bank_s_and_without():
    """More rows than are taken at once without it, several turns of the bank, rows so wide that its parts are few."""
    B, N, D = 210, 4700, 3200
    bank, level = torch.randn(N, D), torch.rand(B) * 1.2 + 0.3
    x_t = (level.cos()[:, None] * bank[:B] + level.sin()[:, None] * torch.randn(B, D)).requires_grad_()
    grad, grads = torch.randn(B, D), []
    for rows in (bank, bank.clone().requires_grad_()):
        grads += torch.autograd.grad(ops.posterior_mean(x_t, rows, level.cos(), level.sin()), x_t, grad)
    assert torch.equal(*grads)


def test_frequent_classes_are_never_moved_to_rarer_ones():
    """And one image repeated gives that image whatever is drawn."""
    torch.manual_seed(2)
    x_t, counts = torch.randn(200, 4), torch.randint(1, 9, (200,))
    own, u, level = torch.arange(200), torch.rand(200), torch.full((200,), 0.7)
    drawn = ops.posterior_draw(x_t, x_t, level, level, u, own=own, counts_x=counts, counts_bank=counts)
    assert (drawn != own).any()
    assert (counts[drawn] >= counts).all()
    same = x_t[:1].expand(200, 4)
    z = ops.posterior_draw(x_t, same, level, level, u, own=own, gate="full")
    assert torch.equal(same[z], same)


x, one, half = torch.zeros(2, 3), torch.ones(2), torch.full((2,), 0.5)
draw = {"own": torch.arange(2), "gate": "full"}
gated = {"gate": "t2h", "counts_x": torch.tensor([4, 1]), "counts_bank": torch.tensor([4, 0])}


@pytest.mark.parametrize(
    ("args", "more", "error", "text"),
    [
        ((x, torch.zeros(4, 5), one, one, one), draw, ValueError, "bank must be"),
        ((x, x[:0], one, one, one), draw, ValueError, "at least one row"),
        ((x, x.double(), one, one, one), draw, TypeError, "bank must have x_t's dtype"),
        ((x, x, one[:1], one, one), draw, ValueError, "signal must be \\[B\\] = \\[2\\]"),
        ((x, x, one, one, torch.ones(3)), draw, ValueError, "u must be \\[B\\]"),
        ((x, x, one, one, half), {"own": one, "gate": "full"}, TypeError, "own must be one of int64"),
        ((x, x, one, one, half), {**draw, "gate": "both"}, ValueError, "gate must be one of 'full', 't2h', 'h2t', got"),
        ((x, x, one, one, half), {**draw, "gate": "t2h"}, ValueError, "pass counts_x"),
        ((x, x, one, one, half), {**draw, "log_prior": one[:1]}, ValueError, "log_prior must be \\[N\\]"),
        ((x, x, one, one, one), draw, ValueError, r"u must be in \[0, 1\), got 1"),
        ((x, x, one, one, -half), draw, ValueError, r"u must be in \[0, 1\), got -0.5"),
        ((x, x, one, one, half / 0), draw, ValueError, r"u must be in \[0, 1\), got inf"),
        ((x, x, one, one, half), {**draw, **gated}, ValueError, "counts_bank must be positive, got 0"),
        ((x, x, one, one, half), {**draw, **gated, "counts_x": one[:1]}, ValueError, r"counts_x must be \[B\] = \[2\]"),
        ((x, x, one, one.clone().requires_grad_(), half), draw, ValueError, "sigma is a constant"),
    ],
)
def test_refusals(args, more, error, text):
    with pytest.raises(error, match=text):
        ops.posterior_draw(*args, **more)
