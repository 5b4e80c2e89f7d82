"""The seam: one base loss, stacked branches, shared branches, and weight 0 that changes nothing."""

import itertools

import pytest
import torch

from imbdiff.diffusion import make_path
from imbdiff.errors import InputError
from imbdiff.methods import CBDM, DDPM, OC, CBDMConfig, Method, MethodConfig, OCConfig
from imbdiff.train.objective import Objective

from .stand_ins import Align, Capacity, NullAgain, Projector, Push, Reweight, ToyNet


def build(path="ddpm", **methods):
    torch.manual_seed(0)
    return Objective(ToyNet(), make_path(path), methods)


def gradients(objective, batch):
    objective.zero_grad()
    losses = objective(batch)
    torch.stack(list(losses.values())).sum().backward()
    return losses, {n: p.grad for n, p in objective.net.named_parameters()}


def plain_loss(objective, batch):
    own = objective.net(batch.x_t, batch.t, batch.cond.where(~batch.dropped, batch.null)).pred
    return (own - objective.path.target(batch.x0, batch.eps)).square().mean()


ZERO = MethodConfig(weight=0.0)


@pytest.mark.parametrize("path", ["ddpm", "flow"])
@pytest.mark.parametrize(
    "method",
    [
        CBDM(CBDMConfig(weight=0.0)),
        OC(OCConfig(weight=0.0)),
        Align(ZERO),
        Capacity(ZERO),
        Projector(ZERO),
        Push(ZERO),
        Reweight(ZERO),
    ],
    ids=lambda m: type(m).__name__,
)
def test_weight_zero_is_ddpm_bit_for_bit(make_batch, path, method):
    batch = make_batch(path)
    want = gradients(build(path, ddpm=DDPM()), batch)
    got = gradients(build(path, method=method), batch)
    assert torch.equal(want[0]["base"], got[0]["base"])
    assert list(got[0]) == ["base"]
    assert all(torch.equal(want[1][n], got[1][n]) or want[1][n] is got[1][n] for n in want[1])


def test_strength_zero_with_the_branch_computed_leaves_the_gradients(make_batch):
    """tau = 0 runs CBDM's second forward with weights of zero: the same gradients, to rounding of the stacked sums."""
    batch = make_batch()
    want = gradients(build(ddpm=DDPM()), batch)[1]
    got = gradients(build(cbdm=CBDM(CBDMConfig(tau=0.0))), batch)[1]
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("path", ["ddpm", "flow"])
def test_base_is_the_plain_loss_whatever_is_added(make_batch, path):
    batch = make_batch(path)
    everything = {"cbdm": CBDM(), "align": Align(), "cap": Capacity(), "proj": Projector(), "push": Push()}
    for n in range(len(everything) + 1):
        for names in itertools.combinations(everything, n):
            objective = build(path, **{name: everything[name] for name in names})
            losses = objective(batch)
            torch.testing.assert_close(losses["base"], plain_loss(objective, batch))
            assert {key.split("/")[0] for key in losses} == {"base", *names}


def test_rows(make_batch):
    """Own and all branches with gradient are one forward; those without a second; shared ones appear once."""
    batch = make_batch(B=5)
    objective = build(cbdm=CBDM(), align=Align(), again=NullAgain(), cap=Capacity(), push=Push())
    objective(batch)
    assert objective.net.rows == [(5 * 4, True), (5, False)]  # own, other label, null, general; next label


def test_cbdm_against_two_separate_forwards(make_batch):
    batch, config = make_batch(), CBDMConfig(weight=0.7, tau=0.5, gamma=0.25)
    objective = build(cbdm=CBDM(config))
    losses, got = gradients(objective, batch)
    other = CBDM(config).branches(batch)["other"].cond
    objective.zero_grad()
    own = objective.net(batch.x_t, batch.t, batch.cond.where(~batch.dropped, batch.null)).pred
    second = objective.net(batch.x_t, batch.t, other).pred
    w = 0.7 * 0.5 * batch.noise * ~batch.dropped

    def d(a, b):
        return (w * (a - b).square().flatten(1).mean(1)).mean()

    reg = d(own, second.detach()) + 0.25 * d(own.detach(), second)
    (plain_loss(objective, batch) + reg).backward()
    torch.testing.assert_close(losses["cbdm/reg"], reg)
    for name, p in objective.net.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-7)


def test_shared_branch_keeps_gradient_for_those_who_want_it(make_batch):
    batch = make_batch()
    alone = gradients(build(align=Align()), batch)[1]["label.weight"][3]
    both = gradients(build(again=NullAgain(), align=Align()), batch)[1]["label.weight"][3]
    # NullAgain pulls the own rows only: the null row's gradient is what Align alone gives it, and not zero.
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-6)
    assert alone.abs().sum() > 0


def test_a_method_with_parameters_is_part_of_the_root(make_batch):
    objective = build(proj=Projector())
    names = [n for n, _ in objective.named_parameters()]
    assert "methods.proj.head.weight" in names
    gradients(objective, make_batch())
    assert objective.methods["proj"].head.weight.grad.abs().sum() > 0


def test_gate_reaches_only_the_rows_that_asked(make_batch):
    batch = make_batch()
    objective = build(cap=Capacity())
    with torch.no_grad():
        objective.net.up.weight.normal_()
    own, general = objective.net(batch.x_t, batch.t, batch.cond), None
    gate = torch.zeros(len(batch.t))
    general = objective.net(batch.x_t, batch.t, batch.cond.where(~batch.dropped, batch.null), gate)
    want = (objective.net(batch.x_t, batch.t, batch.cond.where(~batch.dropped, batch.null)).pred - general.pred) ** 2
    torch.testing.assert_close(objective(batch)["cap/con"], want.mean())
    assert not torch.allclose(own.pred, general.pred)


def test_reweighting_multiplies_the_base(make_batch):
    batch = make_batch()
    objective = build(a=Reweight(), b=Reweight())
    own = objective.net(batch.x_t, batch.t, batch.cond.where(~batch.dropped, batch.null)).pred
    each = (own - batch.eps).square().flatten(1).mean(1) / batch.counts[batch.group] ** 2
    torch.testing.assert_close(objective(batch)["base"], each.mean())


def test_two_target_methods_are_an_error(make_batch):
    with pytest.raises(InputError, match="only one method may replace the regression target, got a, b"):
        build(a=OC(), b=OC())(make_batch())


def test_requirements_are_checked_before_the_first_step():
    class Wants(Method):
        requires = frozenset({"neighbours"})

    with pytest.raises(InputError, match="method wants needs neighbours.*they provide expert, tap:mid"):
        build(wants=Wants())
    Objective(ToyNet(), make_path("ddpm"), {"wants": Wants()}, provides=frozenset({"neighbours"}))
