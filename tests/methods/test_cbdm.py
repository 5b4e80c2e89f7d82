"""CBDM's label law, its weights and its gradient split."""

import dataclasses

import pytest
import torch

from imbdiff.methods import CBDM, CBDMConfig
from imbdiff.models.types import LabelCond, Out


@pytest.mark.parametrize(("law", "power"), [("train", 1.0), ("sqrt", 0.5), ("uniform", 0.0)])
def test_label_law(make_batch, law, power):
    counts = torch.tensor([500, 0, 40, 3])
    p = CBDM(CBDMConfig(law=law)).label_law(counts)
    want = torch.tensor([n**power if n else 0.0 for n in counts.tolist()], dtype=torch.float64)
    torch.testing.assert_close(p, want / want.sum())
    batch = make_batch(B=20_000, shape=(1, 1, 1), counts=(500, 0, 40, 3))
    drawn = CBDM(CBDMConfig(law=law)).branches(batch)["other"].cond.ids
    share = drawn.bincount(minlength=4) / 20_000
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_other_labels_are_a_function_of_the_sample_number(make_batch):
    batch = make_batch(B=16)
    ids = CBDM().branches(batch)["other"].cond.ids
    half = dataclasses.replace(batch, key=batch.key[8:], cond=LabelCond(batch.cond.ids[8:]))
    assert torch.equal(CBDM().branches(half)["other"].cond.ids, ids[8:])


def test_term(make_batch):
    batch = make_batch("flow")
    own = Out(torch.zeros(12, 1, 4, 4), {})
    (pair,) = CBDM(CBDMConfig(tau=0.3, gamma=0.5)).terms(batch, own, {"other": own})
    torch.testing.assert_close(pair.weight, 0.3 * batch.noise * (~batch.dropped).float())
    assert (pair.g_own, pair.g_other, pair.value, pair.margin) == (1.0, 0.5, 1.5, None)
