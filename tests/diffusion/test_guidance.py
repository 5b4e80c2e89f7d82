"""One convention of classifier-free guidance, and the stacked forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imbdiff.diffusion import guide, guided
from imbdiff.models.types import LabelCond


class Recorder:
    """A "network" whose output depends on x_t, t and the label; remembers how many rows it was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: LabelCond) -> Tensor:
        self.rows.append(len(x_t))
        return x_t * (1 + cond.ids.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1)


@pytest.fixture
def x_t() -> Tensor:
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_both_conventions_agree() -> None:
    cond, null = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    omega = 1.5
    torch.testing.assert_close(guide(cond, null, 1 + omega), cond + omega * (cond - null))


def test_scale_one_is_the_conditional_and_zero_the_unconditional() -> None:
    cond, null = torch.randn(2, 3, 4, 2, 2)
    assert torch.equal(guide(cond, null, 1.0), cond)
    assert torch.equal(guide(cond, null, 0.0), null)


def test_only_the_first_channels_are_guided() -> None:
    cond, null = torch.randn(2, 3, 4, 2, 2)
    out = guide(cond, null, 4.0, channels=3)
    assert torch.equal(out[:, :3], guide(cond, null, 4.0)[:, :3])
    assert torch.equal(out[:, 3:], cond[:, 3:])
    assert torch.equal(guide(cond, null, 4.0, channels=4), guide(cond, null, 4.0))


def test_low_precision_is_combined_in_float32() -> None:
    cond, null = torch.randn(2, 3, 4, 2, 2).bfloat16()
    out = guide(cond, null, 7.5)
    assert out.dtype == torch.float32
    assert torch.equal(out, null.float() + 7.5 * (cond.float() - null.float()))
    assert guide(cond, null, 1.0).dtype == torch.float32
    assert guide(cond.double(), null.double(), 2.0).dtype == torch.float64


def test_stacked_forward_equals_two(x_t: Tensor) -> None:
    net, cond, null = Recorder(), LabelCond(torch.tensor([1, 2, 3])), LabelCond(torch.full((3,), 9))
    t = torch.tensor([0.1, 0.2, 0.3])
    out = guided(net, cond, null, 2.5, channels=3)(x_t, t)
    assert net.rows == [6]
    assert torch.equal(out, guide(net(x_t, t, cond), net(x_t, t, null), 2.5, channels=3))


def test_scale_one_leaves_the_null_half_out(x_t: Tensor) -> None:
    net, cond, null = Recorder(), LabelCond(torch.tensor([1, 2, 3])), LabelCond(torch.full((3,), 9))
    out = guided(net, cond, null, 1.0)(x_t, torch.zeros(3))
    assert net.rows == [3]
    assert torch.equal(out, net(x_t, torch.zeros(3), cond))


def test_misuse_says_what_was_expected() -> None:
    x = torch.zeros(2, 4, 1, 1)
    with pytest.raises(ValueError, match=r"one shape, got \[2, 4, 1, 1\] and \[1, 4, 1, 1\]"):
        guide(x, x[:1], 2.0)
    with pytest.raises(ValueError, match=r"channels must be 1\.\.4 or None, got 5"):
        guide(x, x, 2.0, channels=5)
    with pytest.raises(ValueError, match="finite number"):
        guide(x, x, float("nan"))
    with pytest.raises(ValueError, match="got 1 for 2"):
        guided(Recorder(), LabelCond(torch.zeros(2).long()), LabelCond(torch.zeros(1).long()), 2.0)
