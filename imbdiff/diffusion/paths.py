"""The two ways from data to noise, x_t = signal * x0 + sigma * eps, and what a network predicts on each.

DDPM: Ho et al. 2020, linear betas, the network predicts eps. Flow: SiT's linear path (Ma et al. 2024), the network
predicts the velocity x0 - eps, and t = 0 is noise, t = 1 is data. Everything here is a pure function of tensors.
`signal` and `sigma` are [B], or plain floats where all samples share them; images are [B, ...].
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imbdiff.diffusion._broadcast import expand
from imbdiff.errors import InputError

Scalars = Tensor | float


class Path(ABC):
    """x_t = signal * x0 + sigma * eps, with a clock t, a native prediction and the conversions between predictions."""

    name: str
    prediction: str
    """What the network's output means: "eps" or "velocity"."""

    @abstractmethod
    def time(self, u: Tensor) -> Tensor:
        """The t that the network is fed, [B] floating point, for u [B] uniform on [0, 1)."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(signal, sigma, noise), each [B]: float32, or float64 for float64 t. `noise` is 0 clean .. 1 pure noise."""

    @abstractmethod
    def grid(self, steps: int, spacing: str = "linspace") -> list[float]:
        """The `steps` times, noisy to clean, at which a sampler evaluates the network. The clean end is implied."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What the network is trained to predict at x_t = signal * x0 + sigma * eps, exact: nothing is divided."""

    @abstractmethod
    def retarget(self, target: Tensor, x0: Tensor, other_x0: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """The target for `other_x0` at the same x_t, given the target for `x0`. Kinder in rounding than `from_x0`.

        Where the two images are the same the answer is `target` to the bit; recomputing it from x_t would amplify
        the rounding of x_t by 1/sigma, up to a hundredfold, on every sample whose image did not change.
        """

    @abstractmethod
    def from_eps(self, eps: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """The native prediction that says `eps`."""

    @abstractmethod
    def from_x0(self, x0: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """The native prediction that says `x0`: any clean image, not only the one in x_t. sigma > 0."""

    @abstractmethod
    def to_x0(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """The clean image that a native prediction means."""

    @abstractmethod
    def to_eps(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """The noise that a native prediction means."""

    @abstractmethod
    def to_velocity(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """x0 - eps: dx/dt of the straight path from noise (t = 0) to data (t = 1) with that x0 and that eps."""

    @abstractmethod
    def eps_factor(self, signal: Tensor, sigma: Tensor) -> Tensor:
        """[B] factor with ||d eps||^2 = factor * ||d native||^2 at fixed x_t."""

    def to_score(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """grad log p(x_t) = -E[eps | x_t] / sigma. Infinite at sigma = 0."""
        return -self.to_eps(pred, x_t, signal, sigma) / expand(sigma, x_t)

    def add_noise(self, x0: Tensor, eps: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """x_t = signal * x0 + sigma * eps."""
        return expand(signal, x0) * x0 + expand(sigma, x0) * eps


class DDPM(Path):
    """The variance-preserving chain with betas linear from 1e-4 to 0.02 in 1000 steps; native prediction eps.

    signal = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), noise = t / 1000. Times are whole numbers 0 .. 999 held in
    floating point, because the network embeds t as a real number. Ho et al. 2020, section 4.
    """

    name = "ddpm"
    prediction = "eps"
    timesteps = 1000

    def __init__(self) -> None:
        # 1 - alpha_bar is formed in float64: at t = 0 it is 1e-4, and float32 would keep only three digits of it.
        betas = torch.linspace(1e-4, 0.02, self.timesteps, dtype=torch.float64, device="cpu")
        self.alpha_bar = (1 - betas).cumprod(0)
        noise = torch.arange(self.timesteps, dtype=torch.float64, device="cpu") / self.timesteps
        self._table = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt(), noise])
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def time(self, u: Tensor) -> Tensor:
        # The clamp is for a u so near to 1 that the product rounds up.
        return (u * self.timesteps).floor().clamp(max=self.timesteps - 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
            low, high = t.min().item(), t.max().item()
            if not 0 <= low <= high < self.timesteps:
                raise ValueError(f"ddpm times lie in 0..{self.timesteps - 1}, got {low}..{high}")
        key = (t.device, torch.float64 if t.dtype == torch.float64 else torch.float32)
        if key not in self._tables:
            self._tables[key] = self._table.to(*key)
        signal, sigma, noise = self._tables[key].index_select(1, t.long()).unbind(0)
        return signal, sigma, noise

    def grid(self, steps: int, spacing: str = "linspace") -> list[float]:
        """Distinct whole times; a single "linspace" step is at 999.

        "linspace": from 999 to 0, evenly, rounded, as the 250 steps of the DiT paper are.
        "leading": multiples of 1000 // steps down to 0, e.g. 990, 980, .., 0, as OC and CM sample. It never sees the
        noisiest times, although the sampler starts from pure noise.
        """
        _check_steps(steps, self.timesteps)
        if spacing == "linspace":
            return [float(round((self.timesteps - 1) * (1 - i / max(steps - 1, 1)))) for i in range(steps)]
        if spacing == "leading":
            return [float(self.timesteps // steps * i) for i in reversed(range(steps))]
        raise InputError(f"spacing must be one of linspace, leading, got {spacing!r}")

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps

    def retarget(self, target: Tensor, x0: Tensor, other_x0: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """eps' = eps + signal * (x0 - other_x0) / sigma."""
        return target + expand(signal, x0) / expand(sigma, x0) * (x0 - other_x0)

    def from_eps(self, eps: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        return eps

    def from_x0(self, x0: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """eps = (x_t - signal * x0) / sigma."""
        return (x_t - expand(signal, x_t) * x0) / expand(sigma, x_t)

    def to_x0(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """x0 = (x_t - sigma * eps) / signal. signal is never below 6e-3 on this path."""
        return (x_t - expand(sigma, x_t) * pred) / expand(signal, x_t)

    def to_eps(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        return pred

    def to_velocity(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        return self.to_x0(pred, x_t, signal, sigma) - pred

    def eps_factor(self, signal: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(signal)


class Flow(Path):
    """The straight path x_t = t * x0 + (1 - t) * eps; native prediction the velocity dx/dt = x0 - eps.

    signal = t, sigma = noise = 1 - t, so signal + sigma = 1, which the formulas below use: with it x0 and eps follow
    from the velocity without a division, at both ends too. SiT, Ma et al. 2024 (linear interpolant).
    """

    name = "flow"
    prediction = "velocity"

    def time(self, u: Tensor) -> Tensor:
        return u

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = t if t.dtype == torch.float64 else t.float()
        return t, 1 - t, 1 - t

    def grid(self, steps: int, spacing: str = "linspace") -> list[float]:
        """0, 1/steps, .., 1 - 1/steps."""
        _check_steps(steps, None)
        if spacing != "linspace":
            raise InputError(f"the flow path has the spacing linspace only, got {spacing!r}")
        return [i / steps for i in range(steps)]

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        return x0 - eps

    def retarget(self, target: Tensor, x0: Tensor, other_x0: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """v' = v + (other_x0 - x0) / sigma."""
        return target + (other_x0 - x0) / expand(sigma, x0)

    def from_eps(self, eps: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """v = (x_t - eps) / signal. signal > 0: at t = 0 the noise is x_t itself and says nothing about the image."""
        return (x_t - eps) / expand(signal, x_t)

    def from_x0(self, x0: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """v = x0 - eps = (x0 - x_t) / sigma."""
        return (x0 - x_t) / expand(sigma, x_t)

    def to_x0(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """x0 = x_t + sigma * v."""
        return x_t + expand(sigma, x_t) * pred

    def to_eps(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        """eps = x_t - signal * v."""
        return x_t - expand(signal, x_t) * pred

    def to_velocity(self, pred: Tensor, x_t: Tensor, signal: Scalars, sigma: Scalars) -> Tensor:
        return pred

    def eps_factor(self, signal: Tensor, sigma: Tensor) -> Tensor:
        """signal^2, from eps = x_t - signal * v."""
        return signal.square()


PATHS: dict[str, type[Path]] = {"ddpm": DDPM, "flow": Flow}


def make_path(name: str) -> Path:
    """The path called "ddpm" or "flow"."""
    if name not in PATHS:
        raise InputError(f"path must be one of {', '.join(PATHS)}, got {name!r}")
    return PATHS[name]()


def split_variance(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(prediction, learned-variance values or None) of a network output [B, channels or 2 * channels, ...]."""
    if out.shape[1] == channels:
        return out, None
    if out.shape[1] == 2 * channels:
        return out[:, :channels], out[:, channels:]
    raise ValueError(f"expected {channels} or {2 * channels} output channels, got {out.shape[1]}")


def _check_steps(steps: int, most: int | None) -> None:
    if steps < 1 or (most is not None and steps > most):
        raise InputError(f"steps must be {'at least 1' if most is None else f'1..{most}'}, got {steps}")
