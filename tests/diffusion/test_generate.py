"""`generate` passes labels, noise and switches on as it says."""

import pytest
import torch

from imbdiff.data import to_uint8
from imbdiff.diffusion import SamplingConfig, generate, make_path
from imbdiff.errors import InputError
from imbdiff.models.types import Out


class Constant(torch.nn.Module):
    """Predicts that x0 is the label's grey level, whatever x_t is."""

    def __init__(self, path):
        super().__init__()
        self.path, self.calls = path, 0

    def forward(self, x_t, t, cond):
        self.calls += 1
        level = torch.tensor([-0.5, 0.0, 0.5])[cond.ids].view(-1, 1, 1, 1).expand_as(x_t)
        signal, sigma, _ = self.path.coefficients(t)
        return Out(self.path.from_x0(level, x_t, signal, sigma), {})


LABELS = torch.tensor([0, 1, 1, 0, 1])


def draw(path_name="ddpm", labels=LABELS, index=None, batch_size=256, **config):
    path = make_path(path_name)
    index = torch.arange(len(labels)) if index is None else index
    return generate(
        Constant(path),
        path,
        labels,
        index,
        image_shape=(1, 4, 4),
        null_label=2,
        config=SamplingConfig(**{"steps": 5, **config}),
        batch_size=batch_size,
    )


@pytest.mark.parametrize(("path", "sampler"), [("ddpm", "auto"), ("flow", "euler")])
def test_each_image_is_its_labels_whatever_the_batch(path, sampler):
    want = to_uint8(torch.tensor([-0.5, 0.0])[LABELS].view(-1, 1, 1, 1).expand(-1, 1, 4, 4))
    for batch_size in (1, 2, 256):
        assert (draw(path, sampler=sampler, batch_size=batch_size).int() - want.int()).abs().max() <= 1


def test_guidance_goes_away_from_null():
    # null is 0.5, so scale 1.5 takes the label at 0 to -0.25.
    assert (
        draw(labels=torch.tensor([1]), guidance_scale=1.5).int() - int(to_uint8(torch.tensor(-0.25)))
    ).abs().max() <= 1


def test_ancestral_noise_is_a_function_of_the_index():
    a = draw(sampler="ddpm_ancestral", parity=True)
    b = draw(sampler="ddpm_ancestral", parity=True, labels=LABELS[2:], index=torch.arange(2, 5))
    assert torch.equal(a[2:], b)


@pytest.mark.parametrize(
    ("path", "config", "text"),
    [
        ("ddpm", {"sampler": "heun"}, "the samplers for ddpm are"),
        ("flow", {"sampler": "ddpm_ancestral"}, "the samplers for flow are"),
        ("ddpm", {"sampler": "magic"}, "sampler must be one of"),
        ("ddpm", {"parity": True}, "parity is a switch of the sampler ddpm_ancestral, got sampler ddim"),
        ("ddpm", {"steps": 2000}, "steps must be 1..1000, got 2000"),
        ("flow", {"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_refusals_before_anything_is_drawn(path, config, text):
    with pytest.raises(InputError, match=text):
        draw(path, **config)
