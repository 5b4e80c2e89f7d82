"""What a step does: refuses what is not finite, stops when asked, previews the average, keeps float32."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from imbdiff.data import DataOrder, load_training_data
from imbdiff.errors import InputError
from imbdiff.train import loop, preview
from imbdiff.train.batch import BatchSource
from imbdiff.train.build import build_objective
from imbdiff.train.config import OptimConfig, TrainConfig
from imbdiff.train.loop import train
from imbdiff.train.objective import Objective
from imbdiff.train.run import load_run
from imbdiff.train.state import TrainState


@pytest.fixture
def config(tmp_path):
    return TrainConfig(out=str(tmp_path / "run"), steps=6, batch_size=8, log_every=1, checkpoint_every=2)


def poison(monkeypatch, steps, value=float("nan")):
    """The base loss is `value` at these steps (counted from 1)."""
    forward, count = Objective.forward, [0]

    def bad(self, batch):
        losses = forward(self, batch)
        count[0] += 1
        return {**losses, "base": losses["base"] * (value if count[0] in steps else 1.0)}

    monkeypatch.setattr(Objective, "forward", bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(config, monkeypatch, capsys, value):
    poison(monkeypatch, {2}, value)
    one = replace(config, steps=1, optim=OptimConfig(schedule="constant"))
    two = replace(one, steps=2, out=config.out + "2")
    train(one)
    monkeypatch.undo()
    poison(monkeypatch, {2}, value)
    train(two)
    assert "step 2: base = " in capsys.readouterr().out
    for attribute in ("model", "ema"):
        files = [load_run(c.out, print).path for c in (one, two)]
        a, b = (
            (f / f"checkpoints/step-{c.steps:08d}/{attribute}.safetensors").read_bytes()[-4000:]
            for f, c in zip(files, (one, two), strict=True)
        )
        assert a == b
    rows = [json.loads(line) for line in (files[1] / "metrics.jsonl").read_text().splitlines()]
    assert "base" in rows[0]
    assert "base" not in rows[1]


def test_ten_in_a_row_stop_the_run(config, monkeypatch, capsys):
    poison(monkeypatch, range(4, 100))
    with pytest.raises(InputError, match="10 steps in a row were not finite .step 13: base = nan.*--optim.lr"):
        train(replace(config, steps=50))
    assert "step 12: base = nan" in capsys.readouterr().out


def test_nine_in_a_row_do_not(config, monkeypatch):
    poison(monkeypatch, {*range(2, 11), *range(12, 21)})
    train(replace(config, steps=22))


def test_a_gradient_that_is_not_finite_is_refused_too(config, monkeypatch, capsys):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, c: clip(p, c) * float("inf"))
    with pytest.raises(InputError, match="gradient norm = inf"):
        train(replace(config, steps=50))


def test_a_request_to_stop_ends_the_step_and_saves(config, monkeypatch, capsys):
    step = loop.take_step

    def asked(config, state, *rest):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(config, state, *rest)

    monkeypatch.setattr(loop, "take_step", asked)
    run = train(replace(config, checkpoint_every=100))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert "SIGTERM: stopped and saved at step 3" in capsys.readouterr().out
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(replace(config, checkpoint_every=100))
    assert load_run(run, print).step == 6


def test_previews_come_from_the_average_in_eval_mode(config, monkeypatch):
    seen = {}

    def spy(net, *args, **kwargs):
        seen["state"], seen["training"] = {k: v.clone() for k, v in net.state_dict().items()}, net.training
        return torch.zeros(100, 1, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(preview, "generate", spy)
    run = load_run(train(config), print)
    assert not seen["training"]
    assert all(torch.equal(seen["state"][k], v) for k, v in run.objective.net.state_dict().items())
    # The raw weights differ from the average, or this test says nothing.
    weights = load_file(run.path / "checkpoints/step-00000006/model.safetensors")
    assert not torch.equal(weights["x_embedder.proj.weight"], seen["state"]["x_embedder.proj.weight"])


def test_bf16_keeps_weights_average_and_moments_in_float32(config, tmp_path):
    torch.manual_seed(0)
    config = replace(config, precision="bf16", methods=("cbdm", "oc"))
    run = train(config)
    for name in ("model", "ema", "state"):
        tensors = load_file(run / f"checkpoints/step-00000006/{name}.safetensors")
        floats = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
        assert floats <= {"torch.float32", "torch.float64"}, floats


def test_initial_weights_are_the_seeds_and_torchs_generator_is_untouched(config):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b, c = (build_objective(replace(config, seed=s), (1, 8, 8), 10).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["net.y_embedder.embedding_table.weight"], c["net.y_embedder.embedding_table.weight"])


def test_accumulation_gives_the_whole_batchs_gradient(config):
    grads = []
    for slices in (1, 4):
        c = replace(config, accumulate=slices, batch_size=16)
        objective = build_objective(c, (1, 8, 8), 10)
        with torch.no_grad():  # at the start the output is zero and most gradients are
            torch.manual_seed(0)
            for p in objective.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn_like(p))
        state = TrainState(c, objective)
        source = source_for(c, objective)
        losses = loop.backward(c, state, source)
        grads.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None} | losses)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6)


def source_for(config, objective):
    data = load_training_data(config.data)
    order = DataOrder(data.train.labels, data.counts, config.seed, 1.0)
    d = config.diffusion
    return BatchSource(
        data.train, order, objective.path, data.counts, config.seed, d.drop_prob, d.drop_scope, config.flip
    )


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_a_batch_is_a_function_of_its_numbers(config, scope):
    c = replace(config, flip=True, diffusion=replace(config.diffusion, drop_prob=0.5, drop_scope=scope, path="flow"))
    objective = build_objective(c, (1, 8, 8), 10)
    source = source_for(c, objective)
    key = torch.arange(64) + 3 * 64
    whole, half = source.batch(3, key), source.batch(3, key[32:])
    for name in ("x0", "eps", "x_t", "t", "signal", "sigma", "noise", "dropped", "group", "key"):
        assert torch.equal(getattr(whole, name)[32:], getattr(half, name)), name
    torch.testing.assert_close(
        whole.x_t, whole.signal.view(-1, 1, 1, 1) * whole.x0 + whole.sigma.view(-1, 1, 1, 1) * whole.eps
    )
    shares = [float(source.batch(s, torch.arange(64) + 64 * s).dropped.float().mean()) for s in range(40)]
    if scope == "batch":
        assert set(shares) == {0.0, 1.0}
    else:
        assert min(shares) > 0
        assert max(shares) < 1
    assert abs(sum(shares) / 40 - 0.5) < 0.25
