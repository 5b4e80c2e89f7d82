"""Schedules against the published constants; every conversion there and back; both ends of both paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imbdiff.diffusion import DDPM, Flow, Path, expand, make_path, split_variance

ALPHA_BAR = {0: 0.9999, 1: 0.99978, 2: 0.99964, 10: 0.997807, 50: 0.969951, 100: 0.895142, 200: 0.656347, 300: 0.394011}
ALPHA_BAR |= {500: 0.0777967, 700: 6.868e-3, 900: 2.702e-4, 999: 4.036e-5}
NOISE_TO_SIGNAL = {0: 1e-4, 1: 2.2e-4, 2: 3.598e-4, 10: 2.198e-3, 50: 0.03098, 100: 0.11714, 200: 0.52358, 300: 1.538}
NOISE_TO_SIGNAL |= {500: 11.854, 700: 144.6, 900: 3699.0, 999: 24777.0}


@pytest.fixture(params=["ddpm", "flow"])
def path(request: pytest.FixtureRequest) -> Path:
    return make_path(request.param)


def noised(path: Path, B: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x0, eps, x_t, signal, sigma) in float64, over all times."""
    torch.manual_seed(0)
    x0, eps = torch.randn(2, B, 3, 4, 4, dtype=torch.float64)
    signal, sigma, _ = path.coefficients(path.time(torch.linspace(0.01, 0.99, B, dtype=torch.float64)))
    return x0, eps, path.add_noise(x0, eps, signal, sigma), signal, sigma


def test_ddpm_tables_are_the_published_ones() -> None:
    signal, sigma, noise = DDPM().coefficients(torch.tensor(list(ALPHA_BAR)).float())
    assert signal.dtype == sigma.dtype == noise.dtype == torch.float32
    torch.testing.assert_close(signal**2, torch.tensor(list(ALPHA_BAR.values())), rtol=2e-4, atol=0)
    torch.testing.assert_close((sigma / signal) ** 2, torch.tensor(list(NOISE_TO_SIGNAL.values())), rtol=5e-4, atol=0)
    torch.testing.assert_close(noise, torch.tensor([t / 1000 for t in ALPHA_BAR]))


def test_ddpm_float32_keeps_its_digits_at_the_clean_end() -> None:
    signal, sigma, _ = DDPM().coefficients(torch.arange(1000.0))
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    error = ((sigma / signal).double() ** 2 / (1 / abar - 1) - 1).abs()
    assert float((sigma[0] / signal[0]) ** 2) == pytest.approx(1 / 0.9999 - 1, rel=1e-5)
    assert error.max() < 1e-6


def test_ddpm_times_are_whole_and_uniform() -> None:
    path = DDPM()
    t = path.time((torch.arange(4000) + 0.5) / 4000)
    assert torch.equal(t, (torch.arange(4000) // 4).float())
    assert path.time(torch.tensor([1 - 2.0**-24])).item() == 999


def test_flow_coefficients() -> None:
    signal, sigma, noise = Flow().coefficients(torch.tensor([0.0, 0.25, 1.0]))
    assert signal.tolist() == [0, 0.25, 1]
    assert sigma.tolist() == noise.tolist() == [1, 0.75, 0]
    u = torch.rand(5)
    assert torch.equal(Flow().time(u), u)


def test_float64_times_give_float64_coefficients(path: Path) -> None:
    t = path.time(torch.rand(5, dtype=torch.float64))
    assert {v.dtype for v in path.coefficients(t)} == {torch.float64}
    assert {v.dtype for v in path.coefficients(t.float())} == {torch.float32}


def test_every_conversion_there_and_back(path: Path) -> None:
    x0, eps, x_t, signal, sigma = noised(path)
    native = path.target(x0, eps)
    torch.testing.assert_close(path.to_x0(native, x_t, signal, sigma), x0)
    torch.testing.assert_close(path.to_eps(native, x_t, signal, sigma), eps)
    torch.testing.assert_close(path.to_velocity(native, x_t, signal, sigma), x0 - eps)
    torch.testing.assert_close(path.to_score(native, x_t, signal, sigma), -eps / sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(path.from_x0(x0, x_t, signal, sigma), native)
    torch.testing.assert_close(path.from_eps(eps, x_t, signal, sigma), native)


def test_conversions_of_any_prediction_stay_on_x_t(path: Path) -> None:
    """signal * to_x0 + sigma * to_eps = x_t, whatever was predicted."""
    x0, _, x_t, signal, sigma = noised(path)
    pred = torch.randn_like(x0)
    back = path.add_noise(path.to_x0(pred, x_t, signal, sigma), path.to_eps(pred, x_t, signal, sigma), signal, sigma)
    torch.testing.assert_close(back, x_t)


def test_one_number_for_all_samples_equals_one_each(path: Path) -> None:
    x0, eps, _, signal, sigma = noised(path)
    a, s = signal[7].item(), sigma[7].item()
    x_t = path.add_noise(x0, eps, a, s)
    for name in ("to_x0", "to_eps", "to_velocity", "to_score", "from_x0", "from_eps"):
        many = getattr(path, name)(x0, x_t, torch.full_like(signal, a), torch.full_like(sigma, s))
        torch.testing.assert_close(getattr(path, name)(x0, x_t, a, s), many)


def test_the_linear_velocity_is_the_derivative_of_the_flow_path() -> None:
    path = Flow()
    x0, eps = torch.randn(2, 4, 2, dtype=torch.float64)

    def x_at(t: Tensor) -> Tensor:
        signal, sigma, _ = path.coefficients(t)
        return path.add_noise(x0, eps, signal, sigma)

    t = torch.rand(4, dtype=torch.float64)
    torch.testing.assert_close((x_at(t + 0.01) - x_at(t - 0.01)) / 0.02, path.target(x0, eps))


def test_flow_conversions_are_exact_at_both_ends() -> None:
    path = Flow()
    x0, eps = torch.randn(2, 2, 3, 4, 4)
    signal, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    x_t = path.add_noise(x0, eps, signal, sigma)
    v = path.target(x0, eps)
    found_x0, found_eps = path.to_x0(v, x_t, signal, sigma), path.to_eps(v, x_t, signal, sigma)
    assert torch.equal(found_x0[1], x0[1])
    assert torch.equal(found_eps[0], eps[0])
    torch.testing.assert_close(found_x0[0], x0[0])
    torch.testing.assert_close(found_eps[1], eps[1])


def test_retarget_is_the_target_of_the_other_image(path: Path) -> None:
    x0, eps, x_t, signal, sigma = noised(path)
    other = x0.roll(1, 0)
    found = path.retarget(path.target(x0, eps), x0, other, signal, sigma)
    torch.testing.assert_close(found, path.from_x0(other, x_t, signal, sigma))
    # The other image is what this target leads to.
    torch.testing.assert_close(path.to_x0(found, x_t, signal, sigma), other)


def test_retarget_to_the_same_image_changes_no_bit(path: Path) -> None:
    x0, eps, x_t, signal, sigma = (v.float() for v in noised(path))
    target = path.target(x0, eps)
    assert torch.equal(path.retarget(target, x0, x0, signal, sigma), target)
    # Why there are two functions: going through x_t loses digits.
    assert not torch.equal(path.from_x0(x0, x_t, signal, sigma), target)


def test_eps_factor_is_the_jacobian(path: Path) -> None:
    x0, eps, x_t, signal, sigma = noised(path)
    pred, direction = path.target(x0, eps), torch.randn_like(x0)
    d_eps = path.to_eps(pred + direction, x_t, signal, sigma) - path.to_eps(pred, x_t, signal, sigma)
    ratio = d_eps.flatten(1).square().sum(1) / direction.flatten(1).square().sum(1)
    torch.testing.assert_close(path.eps_factor(signal, sigma), ratio)


def test_ddpm_grids() -> None:
    path = DDPM()
    for steps in (1, 2, 3, 7, 10, 50, 250, 333, 667, 999, 1000):
        times = path.grid(steps)
        assert len(times) == len(set(times)) == steps
        assert times[0] == 999
        assert times == sorted(times, reverse=True)
        assert all(t == int(t) and t >= 0 for t in times)
    assert path.grid(1000) == [float(t) for t in range(999, -1, -1)]
    assert path.grid(250)[-1] == 0
    assert path.grid(100, "leading") == [float(t) for t in range(990, -1, -10)]
    assert path.grid(50, "leading")[:2] == [980, 960]
    assert path.grid(1000, "leading") == path.grid(1000)


def test_flow_grid() -> None:
    assert Flow().grid(4) == [0, 0.25, 0.5, 0.75]


def test_variance_is_split_off() -> None:
    out = torch.randn(2, 6, 4, 4)
    pred, variance = split_variance(out, 3)
    assert variance is not None
    assert torch.equal(torch.cat([pred, variance], 1), out)
    same, none = split_variance(out, 6)
    assert torch.equal(same, out)
    assert none is None
    with pytest.raises(ValueError, match="expected 4 or 8 output channels, got 6"):
        split_variance(out, 4)


def test_misuse_says_what_was_expected(path: Path) -> None:
    with pytest.raises(ValueError, match="path must be one of ddpm, flow, got 'edm'"):
        make_path("edm")
    with pytest.raises(ValueError, match="got 0"):
        path.grid(0)
    with pytest.raises(ValueError, match="got 'trailing'"):
        path.grid(10, "trailing")
    with pytest.raises(ValueError, match=r"one number for each sample, shape \[2\], got \[3\]"):
        expand(torch.ones(3), torch.ones(2, 3))
    if path.name == "ddpm":
        with pytest.raises(ValueError, match=r"steps must be 1\.\.1000, got 1001"):
            path.grid(1001)
        with pytest.raises(ValueError, match=r"ddpm times lie in 0\.\.999, got -1"):
            path.coefficients(torch.tensor([-1.0]))
