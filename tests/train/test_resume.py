"""10 steps are 5 steps, kill -9, and the same command again: bit-equal weights, average, optimizer and metrics."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from imbdiff.methods import OCConfig
from imbdiff.train.config import TrainConfig, to_dict
from imbdiff.train.loop import train

# Dies without any farewell in step 8: after a checkpoint (5) and after lines of metrics (6, 7) that it does not cover.
KILLED = """
import json, os, signal, sys
from imbdiff.train import loop
from imbdiff.train.config import TrainConfig, from_dict
step = loop.take_step
def deadly(config, state, *rest):
    if state.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(config, state, *rest)
loop.take_step = deadly
loop.train(from_dict(TrainConfig, json.loads(sys.argv[1])))
"""


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


@pytest.mark.parametrize(
    "settings",
    [
        {"methods": ("ddpm",)},
        {"methods": ("cbdm",), "accumulate": 2, "flip": True},
        {"methods": ("oc",), "oc": OCConfig(transfer="full")},
        {"methods": ("cbdm", "oc"), "precision": "bf16"},
    ],
    ids=lambda s: "+".join(s["methods"]),
)
def test_resume_is_bit_exact(tmp_path, settings):
    whole = TrainConfig(
        out=str(tmp_path / "whole"), steps=10, batch_size=16, checkpoint_every=5, log_every=2, **settings
    )
    broken = replace(whole, out=str(tmp_path / "broken"))
    train(whole)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(to_dict(broken))], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -9, killed.stderr
    assert [r["step"] for r in rows(tmp_path / "broken")] == [2, 4, 6]
    assert [p.name for p in (tmp_path / "broken/checkpoints").iterdir()] == ["step-00000005"]
    train(broken)
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")
    assert len(rows(tmp_path / "whole")) == 5
    for name in ("model", "ema", "state"):
        files = [tmp_path / run / f"checkpoints/step-00000010/{name}.safetensors" for run in ("whole", "broken")]
        # The header holds the run's own --out; the tensors come after it.
        a, b = (f.read_bytes() for f in files)
        assert tensors(a) == tensors(b), name
    grids = [(tmp_path / run / "grids/step-00000010.png").read_bytes() for run in ("whole", "broken")]
    assert grids[0] == grids[1]


def tensors(file: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header.pop("__metadata__")
    return header, file[8 + size :]


def test_finished_run_is_left_as_it_is(tmp_path, capsys):
    config = TrainConfig(out=str(tmp_path / "run"), steps=2, batch_size=8)
    train(config)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    train(config)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert "going on from step 2" in capsys.readouterr().out
