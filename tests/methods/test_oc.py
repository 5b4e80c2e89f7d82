"""OC's property tests: when it moves a target, where to, and that it is nothing but a target."""

import dataclasses

import pytest
import torch

from imbdiff.diffusion import make_path
from imbdiff.errors import InputError
from imbdiff.methods import OC, OCConfig


def source_of(batch, x0):
    """[B] index of the batch image that each target is."""
    return (x0[:, None] == batch.x0[None]).flatten(2).all(2).int().argmax(1)


def test_one_distinct_image_keeps_the_noise(make_batch):
    batch = make_batch(noise=0.9)
    batch = dataclasses.replace(batch, x0=batch.x0[:1].expand_as(batch.x0))
    assert torch.equal(OC(OCConfig(transfer="full")).x0_target(batch), batch.x0)


def test_clean_images_are_their_own_target(make_batch):
    batch = make_batch(noise=0.0, shape=(3, 8, 8))
    for transfer in ("t2h", "h2t", "full"):
        assert torch.equal(OC(OCConfig(transfer=transfer)).x0_target(batch), batch.x0)
    torch.testing.assert_close(OC(OCConfig(transfer="soft")).x0_target(batch), batch.x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", ["ddpm", "flow"])
@pytest.mark.parametrize(("transfer", "sign"), [("t2h", 1), ("h2t", -1)])
def test_the_gate_by_class_frequency(make_batch, path, transfer, sign):
    batch = make_batch(path, B=64, noise=0.02 if path == "flow" else 0.95)
    z = source_of(batch, OC(OCConfig(transfer=transfer)).x0_target(batch))
    counts = batch.counts[batch.group]
    assert ((counts[z] - counts) * sign >= 0).all()
    assert (z != torch.arange(64)).any()


def test_no_transfer_above_max_noise(make_batch):
    batch = make_batch(B=64)
    target = OC(OCConfig(transfer="full", max_noise=0.8)).x0_target(batch)
    above = batch.noise >= 0.8
    assert torch.equal(target[above], batch.x0[above])
    assert not torch.equal(target[~above], batch.x0[~above])


def test_the_target_is_what_leads_from_x_t_to_the_other_image(make_batch):
    for name in ("ddpm", "flow"):
        batch, path = make_batch(name, noise=0.5), make_path(name)
        x0 = OC(OCConfig(transfer="full")).x0_target(batch)
        target = path.retarget(path.target(batch.x0, batch.eps), batch.x0, x0, batch.signal, batch.sigma)
        torch.testing.assert_close(path.to_x0(target, batch.x_t, batch.signal, batch.sigma), x0, atol=1e-4, rtol=1e-4)


def test_weight_is_a_switch():
    with pytest.raises(InputError, match="0 \\(off\\) or 1 \\(on\\), got 0.5"):
        OC(OCConfig(weight=0.5))
