import pytest
import torch

from imbdiff.diffusion import make_path
from imbdiff.methods import Batch
from imbdiff.models.types import LabelCond


@pytest.fixture
def make_batch():
    """A random batch on either path: `make_batch("flow", B=8, drop=0.5)`."""

    def make(path="ddpm", B=12, drop=0.2, shape=(1, 4, 4), counts=(90, 30, 10), noise=None):
        p, C = make_path(path), len(counts)
        u = torch.rand(B) if noise is None else torch.full((B,), noise)
        t = p.time(u)
        signal, sigma, level = p.coefficients(t)
        x0, eps = torch.rand(B, *shape) * 2 - 1, torch.randn(B, *shape)
        group = torch.randint(0, C, (B,))
        return Batch(
            x0=x0,
            eps=eps,
            x_t=p.add_noise(x0, eps, signal, sigma),
            t=t,
            signal=signal,
            sigma=sigma,
            noise=level,
            cond=LabelCond(group),
            null=LabelCond(torch.full((B,), C)),
            dropped=torch.rand(B) < drop,
            group=group,
            counts=torch.tensor(counts),
            seed=int(torch.randint(0, 1000, ())),
            key=torch.arange(B) + 100,
        )

    return make
