"""What all samplers share: the nodes they walk, and one call of the network at a node."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from imbdiff.diffusion.paths import Path

Model = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int], Tensor]
Progress = Callable[[int, int], None]


class Node(NamedTuple):
    """A point of the walk: the time for the network, and x_t = signal * x0 + sigma * eps there."""

    t: float
    signal: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = log(signal / sigma), with its infinities at pure noise and at the clean end."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.signal / self.sigma) if self.signal else -math.inf


def walk(path: Path, steps: int, spacing: str, progress: Progress | None) -> Iterator[tuple[int, Node, Node]]:
    """(step, here, there) along the grid, the last `there` being the clean node."""
    times = torch.tensor(path.grid(steps, spacing), dtype=torch.float64, device="cpu")
    signal, sigma, _ = path.coefficients(times)
    nodes = [Node(*values) for values in zip(times.tolist(), signal.tolist(), sigma.tolist(), strict=True)]
    # The clean node's t is used by the flow path only, where it is 1; a ddpm network is never asked there.
    nodes.append(Node(1.0, 1.0, 0.0))
    for step in range(steps):
        yield step, nodes[step], nodes[step + 1]
        if progress is not None:
            progress(step + 1, steps)


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def call(model: Model, x: Tensor, node: Node, learned: bool = False) -> Tensor:
    t = torch.full((len(x),), node.t, dtype=torch.float32, device=x.device)
    out = model(x, t)
    expected = [len(x), (1 + learned) * x.shape[1], *x.shape[2:]]
    if list(out.shape) != expected:
        raise ValueError(f"the model must return {expected} for x of shape {list(x.shape)}, got {list(out.shape)}")
    return out.to(x.dtype)


def x0_and_eps(pred: Tensor, x: Tensor, path: Path, node: Node, clip: bool) -> tuple[Tensor, Tensor]:
    """The predicted x0 and eps; with `clip`, x0 held in [-1, 1] and the eps that goes with it."""
    x0 = path.to_x0(pred, x, node.signal, node.sigma)
    if not clip:
        return x0, path.to_eps(pred, x, node.signal, node.sigma)
    x0 = x0.clamp(-1, 1)
    return x0, (x - node.signal * x0) / node.sigma


def draw_noise(draw: Draw, step: int, x: Tensor) -> Tensor:
    noise = draw(step)
    if noise.shape != x.shape:
        raise ValueError(f"draw({step}) must return the shape of x, {list(x.shape)}, got {list(noise.shape)}")
    return noise.to(x)
