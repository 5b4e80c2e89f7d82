"""Samplers as pure functions: (model, x, path, steps) -> x0, where `model(x_t, t)` is the native prediction, t is [B].

`x` [B, ...] is the starting noise. No global random state is touched: where a sampler needs noise it asks
`draw(step)`, step 0 being the noisiest, for standard normals shaped like x. The same x and draws give the same bits.
Every sampler walks the nodes `path.grid(steps)` and ends at the clean node (signal 1, sigma 0). The coefficients are
float64 numbers, the images float32 (float64 if x is). `progress(done, steps)` is called after each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imbdiff.diffusion._walk import Draw, Model, Progress, call, draw_noise, walk, widened, x0_and_eps
from imbdiff.diffusion.paths import Path, split_variance
from imbdiff.errors import InputError


@torch.no_grad()
def ddpm_ancestral(
    model: Model,
    x: Tensor,
    path: Path,
    *,
    steps: int = 1000,
    draw: Draw | None,
    variance: str = "fixedlarge",
    clip: bool = True,
    parity: bool = False,
    spacing: str = "linspace",
    progress: Progress | None = None,
) -> Tensor:
    """The reverse Markov chain x' ~ N(mean(x, x0), var), also on a part of the 1000 steps (ddpm path only).

    With a = signal/signal' and beta = sigma^2 - a^2 sigma'^2, the noise that the forward chain adds between two nodes:

        mean = (signal' beta x0 + a sigma'^2 x) / sigma^2,    posterior variance = beta sigma'^2 / sigma^2

    variance: "fixedlarge" beta, "fixedsmall" the posterior variance, "learned" between the two in the logarithm, by
    values v in -1 .. 1 in the second half of the 2C channels that the model must then return.
    clip: the predicted x0 is held in [-1, 1] before the mean is formed. parity: the descendants of pytorch-ddpm (CBDM,
    OC, CORAL, CM) form the mean before they clip, so that only the returned image is clipped; True reproduces that.
    Their fixedlarge has the first entry replaced by the posterior variance of t = 1; no noise is drawn there, at the
    last step, so it needs no counterpart here. Ho et al. 2020; learned: Nichol & Dhariwal 2021.
    """
    check_sampler("ddpm_ancestral", path)
    if variance not in ("fixedlarge", "fixedsmall", "learned"):
        raise InputError(f"variance must be one of fixedlarge, fixedsmall, learned, got {variance!r}")
    if parity and not clip:
        raise InputError("parity=True clips the returned image and nothing else; it has no meaning with clip=False")
    if draw is None:
        raise ValueError("ddpm_ancestral needs draw(step) for its noise, got None")
    x = widened(x)
    for step, here, there in walk(path, steps, spacing, progress):
        out = call(model, x, here, learned=variance == "learned")
        pred, v = split_variance(out, x.shape[1])
        x0, _ = x0_and_eps(pred, x, path, here, clip and not parity)
        if there.sigma == 0:
            x = x0
            continue
        a = here.signal / there.signal
        beta = here.sigma**2 - (a * there.sigma) ** 2
        posterior = beta * (there.sigma / here.sigma) ** 2
        mean = (there.signal * beta / here.sigma**2) * x0 + (a * (there.sigma / here.sigma) ** 2) * x
        std: Tensor | float = math.sqrt(posterior if variance == "fixedsmall" else beta)
        if v is not None:
            std = torch.exp(math.log(posterior) / 2 + (v + 1) / 4 * math.log(beta / posterior))
        x = mean + std * draw_noise(draw, step, x)
    return x.clamp(-1, 1) if parity else x


@torch.no_grad()
def ddim(
    model: Model,
    x: Tensor,
    path: Path,
    *,
    steps: int,
    eta: float = 0.0,
    clip: bool = False,
    draw: Draw | None = None,
    spacing: str = "linspace",
    progress: Progress | None = None,
) -> Tensor:
    """x' = signal' x0 + sqrt(sigma'^2 - s^2) eps + s z,   s^2 = eta^2 * posterior variance (see ddpm_ancestral).

    eta 0 is a first-order step of the probability-flow ODE and needs no draw; eta 1 is ancestral sampling with
    fixedsmall variance. For both paths: nothing in the formula asks for signal^2 + sigma^2 = 1.
    Song et al. 2021, equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta must lie in 0..1, got {eta}")
    if eta and draw is None:
        raise ValueError(f"ddim with eta {eta} needs draw(step) for its noise, got None")
    x = widened(x)
    for step, here, there in walk(path, steps, spacing, progress):
        x0, eps = x0_and_eps(call(model, x, here), x, path, here, clip)
        beta = here.sigma**2 - (here.signal / there.signal * there.sigma) ** 2
        variance = eta**2 * beta * (there.sigma / here.sigma) ** 2
        # For eta = 1 at the first step of the flow path the two variances are equal, up to rounding.
        x = there.signal * x0 + math.sqrt(max(there.sigma**2 - variance, 0.0)) * eps
        if draw is not None and variance > 0:
            x = x + math.sqrt(variance) * draw_noise(draw, step, x)
    return x


@torch.no_grad()
def dpmpp_2m(
    model: Model,
    x: Tensor,
    path: Path,
    *,
    steps: int,
    clip: bool = False,
    spacing: str = "linspace",
    progress: Progress | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order by extrapolating x0 in lambda = log(signal / sigma) from the last two nodes.

        x' = sigma'/sigma x - signal' (e^-h - 1) D,   D = x0 + h / (2 h_last) (x0 - x0_last),   h = lambda' - lambda

    The first step and the last, whose h is infinite, are of first order (D = x0); at the noisy end of the flow path,
    where lambda is minus infinity, the formula falls back to first order by itself. Lu et al. 2022 (DPM-Solver++),
    algorithm 2.
    """
    x = widened(x)
    last: tuple[Tensor, float] | None = None
    for _, here, there in walk(path, steps, spacing, progress):
        x0, _ = x0_and_eps(call(model, x, here), x, path, here, clip)
        h = there.log_snr - here.log_snr
        d = x0
        if last is not None and there.sigma > 0:
            x0_last, h_last = last
            d = x0 + h / (2 * h_last) * (x0 - x0_last)
        x = there.sigma / here.sigma * x - there.signal * math.expm1(-h) * d
        last = (x0, h)
    return x


@torch.no_grad()
def euler(model: Model, x: Tensor, path: Path, *, steps: int, progress: Progress | None = None) -> Tensor:
    """x' = x + (t' - t) v: the flow ODE dx/dt = v from t = 0 to 1 in first order, one evaluation a step."""
    check_sampler("euler", path)
    x = widened(x)
    for _, here, there in walk(path, steps, "linspace", progress):
        x = x + (there.t - here.t) * call(model, x, here)
    return x


@torch.no_grad()
def heun(model: Model, x: Tensor, path: Path, *, steps: int, progress: Progress | None = None) -> Tensor:
    """x' = x + (t' - t) (v + v') / 2, v' at the Euler point: the flow ODE in second order, two evaluations a step.

    The last v' is asked at t = 1, where the velocity is finite (x0 - E[eps]), unlike the score.
    """
    check_sampler("heun", path)
    x = widened(x)
    for _, here, there in walk(path, steps, "linspace", progress):
        dt = there.t - here.t
        v = call(model, x, here)
        x = x + dt / 2 * (v + call(model, x + dt * v, there))
    return x


@dataclass(frozen=True)
class Sampler:
    """An entry of the registry: the function, the paths it is for, whether it takes `draw`, its further switches."""

    run: Callable[..., Tensor]
    paths: tuple[str, ...]
    draws: bool = False
    options: tuple[str, ...] = ()


SAMPLERS: dict[str, Sampler] = {
    "ddpm_ancestral": Sampler(ddpm_ancestral, ("ddpm",), draws=True, options=("clip", "parity")),
    "ddim": Sampler(ddim, ("ddpm", "flow"), draws=True, options=("clip",)),
    "dpmpp_2m": Sampler(dpmpp_2m, ("ddpm", "flow"), options=("clip",)),
    "euler": Sampler(euler, ("flow",)),
    "heun": Sampler(heun, ("flow",)),
}


def sample(
    name: str, model: Model, x: Tensor, path: Path, *, steps: int, draw: Draw | None = None, **options: Any
) -> Tensor:
    """Run the sampler called `name`; `options` are its further keyword arguments (clip, eta, spacing, progress, ..)."""
    check_sampler(name, path)
    if SAMPLERS[name].draws:
        options["draw"] = draw
    return SAMPLERS[name].run(model, x, path, steps=steps, **options)


def check_sampler(name: str, path: Path) -> None:
    """Refuse a sampler that does not exist or is not for this path."""
    if name not in SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    if path.name not in SAMPLERS[name].paths:
        fitting = ", ".join(other for other, entry in SAMPLERS.items() if path.name in entry.paths)
        raise InputError(
            f"the sampler {name} is for the path {' or '.join(SAMPLERS[name].paths)}, got {path.name}; "
            f"the samplers for {path.name} are {fitting}"
        )
