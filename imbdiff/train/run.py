"""The run directory: what it holds, when it may be used again, and how a trained network comes out of it.

config.json       the resolved configuration
split.json        the long-tailed split: SHA-256, counts, groups, class names, image shape
metrics.jsonl     one line each `log_every` steps
checkpoints/      see checkpoint.py
grids/            previews
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imbdiff.data import TrainingData, class_rank
from imbdiff.errors import InputError
from imbdiff.files import write_text
from imbdiff.train import checkpoint
from imbdiff.train.build import build_objective
from imbdiff.train.config import TrainConfig, difference, from_dict, to_dict
from imbdiff.train.objective import Objective

OWNED = ("config.json", "split.json", "metrics.jsonl", "checkpoints", "grids", "samples", "report")


def open_run(config: TrainConfig, data: TrainingData, fresh: bool) -> Path:
    """The run directory, made or checked: another configuration or another split in it is an error with a diff."""
    run = Path(config.out)
    mine = without_place(to_dict(config))
    facts = split_facts(data)
    try:
        cleared = fresh and clear(run)
        run.mkdir(parents=True, exist_ok=True)
        if (run / "config.json").exists():
            for file, new in (("config.json", mine), ("split.json", facts)):
                old = without_place(read_json(run / file))
                if lines := difference(old, json.loads(json.dumps(new))):
                    raise InputError(
                        f"{run} holds a run with other settings ({file}):\n  " + "\n  ".join(lines) + "\n"
                        "Use another --out, the old settings, or --fresh to delete that run and start over."
                    )
        elif not cleared and (foreign := [p.name for p in run.iterdir() if p.name not in OWNED]):
            raise InputError(f"{run} holds no run but {', '.join(foreign[:3])}; choose another --out")
        else:
            write_text(run / "split.json", json.dumps(facts, indent=2))
            write_text(run / "config.json", json.dumps(to_dict(config), indent=2))
    except OSError as error:
        raise InputError(f"cannot use run directory {run}: {error}") from error
    return run


def clear(run: Path) -> bool:
    """Delete what a run made, and only in a directory that holds a run; whether it does."""
    if not (run / "config.json").exists():
        return False
    for name in OWNED:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return True


def split_facts(data: TrainingData) -> dict[str, Any]:
    return {
        "source": data.pool.name,
        "sha256": data.split_hash,
        "counts": data.counts.tolist(),
        "class_names": list(data.pool.class_names),
        "groups": {name: list(classes) for name, classes in data.groups.items()},
        "image_shape": list(data.pool.shape),
    }


def without_place(config: dict[str, Any]) -> dict[str, Any]:
    """A run may be moved: where it lies is no setting of it."""
    return {k: v for k, v in config.items() if k != "out"}


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{file.parent} is no run directory: it has no {file.name} (imbdiff train makes one)"
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}") from error


@dataclass(frozen=True)
class TrainedRun:
    """A run as samplers and reports see it; the network has the averaged weights and is in eval mode."""

    path: Path
    config: TrainConfig
    facts: dict[str, Any]
    objective: Objective
    step: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        c, h, w = self.facts["image_shape"]
        return c, h, w

    @property
    def num_classes(self) -> int:
        return len(self.facts["class_names"])

    @property
    def rank(self) -> list[int]:
        """Classes from most to least frequent."""
        return class_rank(self.facts["counts"])


def load_run(path: str | Path, warn: Callable[[str], None], device: torch.device | None = None) -> TrainedRun:
    """The newest whole checkpoint of a run, without its data set."""
    path = Path(path)
    config = from_dict(TrainConfig, read_json(path / "config.json"))
    facts = read_json(path / "split.json")
    found = checkpoint.load_latest(path, warn)
    if found is None:
        raise InputError(f"{path} has no checkpoint yet; the first comes at step {config.checkpoint_every}")
    c, h, w = facts["image_shape"]
    objective = build_objective(config, (c, h, w), len(facts["class_names"]))
    objective.load_state_dict(checkpoint.objective_names(found.ema))
    return TrainedRun(path, config, facts, objective.eval().to(device or torch.device("cpu")), found.step)
