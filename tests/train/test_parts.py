"""The small parts of the trainer: schedule, average, meter, metrics file, configuration."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from imbdiff.errors import InputError
from imbdiff.methods import CBDMConfig
from imbdiff.train.config import PRESETS, TrainConfig, difference, from_dict, to_dict
from imbdiff.train.ema import EMA
from imbdiff.train.log import Meter, Metrics, Reporter
from imbdiff.train.schedule import learning_rate


def test_learning_rate():
    def lr(images, schedule):
        return learning_rate(images, peak=2.0, warmup=100, total=1100, schedule=schedule)

    for schedule in ("constant", "cosine"):
        assert lr(50, schedule) == pytest.approx(1.0)
        assert lr(100, schedule) == pytest.approx(2.0)
    assert lr(10**9, "constant") == 2.0
    assert lr(600, "cosine") == pytest.approx(1.0)
    assert lr(350, "cosine") == pytest.approx(1 + 0.5**0.5)
    assert lr(1100, "cosine") == lr(5000, "cosine") == pytest.approx(0)
    assert learning_rate(5, peak=1.0, warmup=0, total=5, schedule="constant") == 1.0


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_average_is_by_name_in_float32_with_warm_up():
    module = Small()
    ema, expected = EMA(module, decay=0.9), torch.zeros(3)
    for step in range(1, 200):
        with torch.no_grad():
            module.w.fill_(step % 7)
            module.count.fill_(step)
        ema.update(module, step)
        d = min(0.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * (step % 7)
    torch.testing.assert_close(ema.tensors["w"], expected)
    assert ema.tensors["w"].dtype == torch.float32
    assert ema.tensors["count"] == 199
    assert torch.equal(ema.tensors["fixed"], torch.ones(2))


def test_average_does_not_share_memory_with_the_weights():
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.9)
    before = ema.tensors["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(ema.tensors["weight"], before)


def test_meter_means_and_starts_again():
    meter = Meter()
    for value in (1.0, 3.0):
        meter.add({"cbdm/reg": torch.tensor(2 * value), "base": torch.tensor(value)})
    assert list(meter.read().items()) == [("base", 2.0), ("cbdm/reg", 4.0)]
    assert meter.read() == {}


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, 0)
    for step in (2, 4, 6):
        metrics.write({"step": step})
    with file.open("a") as handle:
        handle.write('{"step": 8, "ba')  # torn by a crash
    Metrics(file, 4).write({"step": 6, "again": True})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 2},
        {"step": 4},
        {"step": 6, "again": True},
    ]


def test_a_terminal_gets_a_bar_and_a_file_plain_lines(capsys):
    for terminal in (False, True):
        console = Console(force_terminal=terminal, width=120)
        with Reporter("ddpm", 0, 100, 8, console) as report:
            report.advance(50)
            report.row(50, {"base": 0.25})
        out = capsys.readouterr().out
        assert "base 0.2500" in out
        assert "50/100" in out
        assert ("\x1b[" in out) == terminal
        assert ("s left" in out) != terminal


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_way_through_json(name):
    config = replace(PRESETS[name][1], methods=("cbdm", "oc"), cbdm=CBDMConfig(tau=0.5))
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_difference_names_nested_settings():
    old, new = to_dict(TrainConfig()), to_dict(TrainConfig(seed=3, cbdm=CBDMConfig(law="sqrt")))
    assert difference(old, new) == ["cbdm.law: train -> sqrt", "seed: 0 -> 3"]
    assert difference({"a": 1}, {}) == ["a: 1 -> absent"]
    with pytest.raises(InputError, match="TrainConfig has no setting tau"):
        from_dict(TrainConfig, {"tau": 1})
