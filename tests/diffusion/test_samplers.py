"""Samplers against closed forms: exact denoisers of Gaussian mixtures, and the exact ODE map of a single Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from imbdiff.diffusion import DDPM, SAMPLERS, Flow, Path, ddim, ddpm_ancestral, dpmpp_2m, euler, heun, make_path, sample
from imbdiff.diffusion._walk import Draw, Model

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-0.6, -0.5], [0.6, -0.3], [0.1, 0.7]], dtype=torch.float64)
STDS = torch.tensor([0.12, 0.08, 0.1], dtype=torch.float64)

ONE = torch.ones(1, dtype=torch.float64)
CENTRE = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
SPREAD = torch.tensor([0.5], dtype=torch.float64)


def exact(path: Path, weights: Tensor = WEIGHTS, means: Tensor = MEANS, stds: Tensor = STDS) -> Model:
    """The native prediction that knows the data: E[x0 | x_t] of a mixture of isotropic Gaussians [K], [K, D], [K]."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        signal, sigma, _ = (v[:, None] for v in path.coefficients(t.double()))
        x = x_t.double()
        variance = signal**2 * stds**2 + sigma**2
        away = x[:, None] - signal[:, None] * means
        post = (weights.log() - away.square().sum(2) / (2 * variance) - x.shape[1] / 2 * variance.log()).softmax(1)
        x0 = (post[:, :, None] * (means + (signal * stds**2 / variance)[:, :, None] * away)).sum(1)
        # eps without dividing x_t - signal x0 by sigma, so that the clean end of the flow path is no 0 / 0.
        eps = (post[:, :, None] * (sigma / variance)[:, :, None] * away).sum(1)
        return path.target(x0, eps).to(x_t.dtype)

    return model


def gaussian(path: Path) -> Model:
    return exact(path, ONE, CENTRE, SPREAD)


def ode_end(path: Path, x: Tensor) -> Tensor:
    """Where the probability-flow ODE of N(CENTRE, SPREAD^2) leads from x at the first node: it keeps the z-score."""
    signal, sigma, _ = path.coefficients(torch.tensor(path.grid(1), dtype=torch.float64))
    return CENTRE + SPREAD * (x - signal * CENTRE) / (signal**2 * SPREAD**2 + sigma**2).sqrt()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draws(x: Tensor) -> Draw:
    return lambda step: noise(*x.shape, seed=1000 + step, dtype=x.dtype)


def error(sampler: Callable[..., Tensor], path: Path, steps: int) -> float:
    x = noise(32, 2)
    return (sampler(gaussian(path), x, path, steps=steps) - ode_end(path, x)).norm(dim=1).mean().item()


class EvenInLogSNR(Flow):
    """The flow path walked in equal steps of lambda, the variable in which DPM-Solver++ is a second-order method."""

    def grid(self, steps: int, spacing: str = "linspace") -> list[float]:
        return [1 / (1 + math.exp(-(-7 + 16 * i / max(steps - 1, 1)))) for i in range(steps)]


# ---------------------------------------------------------------- the distribution


@pytest.mark.parametrize(
    ("name", "path", "steps", "options"),
    [
        ("ddpm_ancestral", "ddpm", 1000, {"variance": "fixedlarge", "clip": False}),
        ("ddpm_ancestral", "ddpm", 1000, {"variance": "fixedsmall"}),
        ("ddpm_ancestral", "ddpm", 1000, {"parity": True}),
        ("ddim", "ddpm", 500, {}),
        ("ddim", "ddpm", 500, {"eta": 1.0}),
        ("ddim", "flow", 300, {}),
        ("ddim", "flow", 500, {"eta": 1.0}),
        ("dpmpp_2m", "ddpm", 250, {}),
        ("dpmpp_2m", "flow", 100, {}),
        ("euler", "flow", 300, {}),
        ("heun", "flow", 60, {}),
    ],
)
def test_samples_of_a_mixture_have_its_weights_means_and_covariances(
    name: str, path: str, steps: int, options: dict[str, object]
) -> None:
    way, N = make_path(path), 3000
    x = noise(N, 2)
    out = sample(name, exact(way), x, way, steps=steps, draw=draws(x), **options)
    # The components lie more than eight standard deviations apart, so the nearest mean tells them.
    component = torch.cdist(out, MEANS).argmin(1)
    for k, (weight, mean, std) in enumerate(zip(WEIGHTS, MEANS, STDS, strict=True)):
        mine = out[component == k]
        n = len(mine)
        # 4.5 standard errors, over some 60 statistics in all; 3 % of std for the finite number of steps.
        assert abs(n / N - weight) < 4.5 * (weight * (1 - weight) / N).sqrt() + 0.005
        assert (mine.mean(0) - mean).abs().max() < std * (4.5 / math.sqrt(n) + 0.03)
        cov = mine.T.cov() / std**2
        assert (cov.diagonal() - 1).abs().max() < 4.5 * math.sqrt(2 / n) + 0.06
        assert cov[0, 1].abs() < 4.5 / math.sqrt(n)


# ---------------------------------------------------------------- the ODE


@pytest.mark.parametrize(
    ("sampler", "path", "order"),
    [(ddim, DDPM(), 1), (ddim, Flow(), 1), (euler, Flow(), 1), (heun, Flow(), 2), (dpmpp_2m, EvenInLogSNR(), 2)],
)
def test_error_falls_with_the_order_of_the_method(sampler: Callable[..., Tensor], path: Path, order: int) -> None:
    coarse, fine, finer = (error(sampler, path, steps) for steps in (60, 120, 240))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert math.log2(fine / finer) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", [DDPM(), Flow()])
def test_second_order_solver_beats_ddim_on_the_usual_grids(path: Path) -> None:
    assert error(dpmpp_2m, path, 160) < error(ddim, path, 160) / 3


def test_ddim_with_all_steps_is_the_ode() -> None:
    assert error(ddim, DDPM(), 1000) < 3e-3
    assert error(dpmpp_2m, DDPM(), 1000) < 1e-4


def test_on_the_flow_path_ddim_is_euler() -> None:
    x, path = noise(8, 2), Flow()
    torch.testing.assert_close(ddim(exact(path), x, path, steps=17), euler(exact(path), x, path, steps=17))


def test_one_step_of_ddim_is_the_predicted_image() -> None:
    x, path = noise(8, 2), DDPM()
    pred = exact(path)(x, torch.full((8,), 999.0))
    signal, sigma, _ = path.coefficients(torch.full((8,), 999.0, dtype=torch.float64))
    torch.testing.assert_close(ddim(exact(path), x, path, steps=1), path.to_x0(pred, x, signal, sigma))


# ---------------------------------------------------------------- the chain


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [37, 1000])
def test_ddim_with_eta_one_is_the_ancestral_chain_with_the_small_variance(steps: int, clip: bool) -> None:
    x, path = noise(8, 2), DDPM()
    # Data half outside [-1, 1], so that clipping, and the eps that goes with a clipped image, have something to do.
    model = exact(path, ONE, torch.tensor([[1.0, -1.0]]).double(), SPREAD)
    chain = ddpm_ancestral(model, x, path, steps=steps, variance="fixedsmall", clip=clip, draw=draws(x))
    torch.testing.assert_close(ddim(model, x, path, steps=steps, eta=1.0, clip=clip, draw=draws(x)), chain)


def test_large_variance_is_exact_for_unit_gaussian_data() -> None:
    """For x0 ~ N(0, 1) the reverse chain is x' = a x + sqrt(1 - a^2) z: every node keeps variance 1. Respaced too."""
    path, x, seen = DDPM(), noise(4, 2), []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return path.coefficients(t.double())[1][:, None] * x_t

    ddpm_ancestral(model, x, path, steps=25, clip=False, draw=draws(x))
    abar = path.alpha_bar[torch.tensor(path.grid(25)).long()]
    for step in range(24):
        a = (abar[step] / abar[step + 1]).sqrt()
        expected = a * seen[step] + (1 - a**2).sqrt() * draws(x)(step)
        torch.testing.assert_close(seen[step + 1], expected, rtol=1e-6, atol=1e-6)


def test_full_chain_has_the_textbook_coefficients() -> None:
    """1000 steps: x' = (x - beta / sqrt(1 - abar) eps) / sqrt(alpha) + s z, Ho et al. algorithm 2, both variances."""
    path, x = DDPM(), noise(4, 2)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = (1 - beta).cumprod(0)
    small = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    for variance, var in (("fixedlarge", beta[1:]), ("fixedsmall", small)):
        y = x
        for step, t in enumerate(range(999, -1, -1)):
            eps = exact(path)(y, torch.full((4,), float(t)))
            y = (y - beta[t] / (1 - abar[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
            if t:
                y = y + var[t - 1].sqrt() * draws(x)(step)
        found = ddpm_ancestral(exact(path), x, path, variance=variance, clip=False, draw=draws(x))
        torch.testing.assert_close(found, y, rtol=1e-6, atol=1e-6)


def test_learned_variance_runs_from_small_to_large() -> None:
    path = DDPM()
    x = noise(4, 3, 2, 2)
    eps_model: Model = lambda x_t, t: 0.9 * x_t  # noqa: E731

    def run(variance: str, v: float = 0.0) -> Tensor:
        model: Model = lambda x_t, t: torch.cat([eps_model(x_t, t), torch.full_like(x_t, v)], 1)  # noqa: E731
        chosen = model if variance == "learned" else eps_model
        return ddpm_ancestral(chosen, x, path, steps=20, variance=variance, draw=draws(x))

    torch.testing.assert_close(run("learned", -1.0), run("fixedsmall"))
    torch.testing.assert_close(run("learned", 1.0), run("fixedlarge"))
    assert not torch.allclose(run("learned", 0.0), run("fixedlarge"))


def test_clipping() -> None:
    """A model that overshoots: proper clipping steers the chain, parity clips the returned image only."""
    path, x = DDPM(), noise(16, 2)
    model = exact(path, ONE, torch.tensor([[1.4, -1.4]]).double(), torch.tensor([0.2]).double())
    free, proper, parity = (
        ddpm_ancestral(model, x, path, steps=50, draw=draws(x), **options)  # type: ignore[arg-type]
        for options in ({"clip": False}, {}, {"parity": True})
    )
    assert free.abs().max() > 1.2
    assert torch.equal(parity, free.clamp(-1, 1))
    assert proper.abs().max() <= 1
    assert not torch.equal(proper, parity)
    for sampler in (ddim, dpmpp_2m):
        assert sampler(model, x, path, steps=20, clip=True).abs().max() <= 1
        assert sampler(model, x, path, steps=20).abs().max() > 1.2


def test_parity_makes_a_different_image_even_inside_the_range() -> None:
    path, x = DDPM(), noise(64, 2)
    model = exact(path, ONE, torch.tensor([[0.5, -0.5]]).double(), torch.tensor([0.4]).double())
    proper, parity = (ddpm_ancestral(model, x, path, steps=50, parity=p, draw=draws(x)) for p in (False, True))
    inside = (proper.abs() < 1) & (parity.abs() < 1)
    assert (proper - parity)[inside].abs().max() > 1e-3


# ---------------------------------------------------------------- behaviour of all


ALL = [(name, path) for name, entry in SAMPLERS.items() for path in entry.paths]


@pytest.mark.parametrize(("name", "path"), ALL)
def test_pure_same_input_same_bits_and_no_global_randomness(name: str, path: str) -> None:
    way, x = make_path(path), noise(6, 2, dtype=torch.float32)
    kept, state = x.clone(), torch.get_rng_state()
    first, second = (sample(name, exact(way), x, way, steps=7, draw=draws(x)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert not first.requires_grad


@pytest.mark.parametrize(("name", "path"), ALL)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_progress_and_low_precision(name: str, path: str, steps: int) -> None:
    way, x = make_path(path), noise(6, 2).bfloat16()
    seen: list[tuple[int, int]] = []
    out = sample(
        name, exact(way), x, way, steps=steps, draw=draws(x), progress=lambda done, of: seen.append((done, of))
    )
    assert seen == [(i + 1, steps) for i in range(steps)]
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_evaluations_and_draws_are_what_the_docstrings_say() -> None:
    path, x = DDPM(), noise(2, 2)
    times: list[float] = []
    asked: list[int] = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        assert t.dtype == torch.float32
        times.append(t[0].item())
        return x_t

    def draw(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros_like(x)

    ddpm_ancestral(model, x, path, steps=4, spacing="leading", draw=draw)
    assert times == [750, 500, 250, 0]
    assert asked == [0, 1, 2]
    times.clear()
    heun(model, x, Flow(), steps=2)
    assert times == [0, 0.5, 0.5, 1]


def test_misuse_says_what_was_expected() -> None:
    x, path = noise(2, 2), DDPM()
    with pytest.raises(
        ValueError, match="sampler must be one of ddpm_ancestral, ddim, dpmpp_2m, euler, heun, got 'lms'"
    ):
        sample("lms", exact(path), x, path, steps=2)
    with pytest.raises(ValueError, match=r"euler is for the path flow, got ddpm; .* ddpm_ancestral, ddim, dpmpp_2m"):
        sample("euler", exact(path), x, path, steps=2)
    with pytest.raises(ValueError, match="for the path ddpm, got flow"):
        ddpm_ancestral(exact(Flow()), x, Flow(), steps=2, draw=draws(x))
    with pytest.raises(ValueError, match=r"needs draw\(step\)"):
        sample("ddpm_ancestral", exact(path), x, path, steps=2)
    with pytest.raises(ValueError, match=r"eta 0\.5 needs draw\(step\)"):
        ddim(exact(path), x, path, steps=2, eta=0.5)
    with pytest.raises(ValueError, match=r"eta must lie in 0\.\.1, got 2"):
        ddim(exact(path), x, path, steps=2, eta=2)
    with pytest.raises(ValueError, match="variance must be one of fixedlarge, fixedsmall, learned, got 'large'"):
        ddpm_ancestral(exact(path), x, path, steps=2, variance="large", draw=draws(x))
    with pytest.raises(ValueError, match="no meaning with clip=False"):
        ddpm_ancestral(exact(path), x, path, steps=2, clip=False, parity=True, draw=draws(x))
    with pytest.raises(ValueError, match=r"must return \[2, 2\] for x of shape \[2, 2\], got \[2, 4\]"):
        ddim(lambda x_t, t: torch.cat([x_t, x_t], 1), x, path, steps=2)
    with pytest.raises(ValueError, match=r"must return \[2, 4\]"):
        ddpm_ancestral(exact(path), x, path, steps=2, variance="learned", draw=draws(x))
    with pytest.raises(ValueError, match=r"draw\(0\) must return the shape of x, \[2, 2\], got \[1, 2\]"):
        ddpm_ancestral(exact(path), x, path, steps=2, draw=lambda step: x[:1])
    with pytest.raises(TypeError, match="eta"):
        sample("heun", exact(Flow()), x, Flow(), steps=2, eta=1.0)
